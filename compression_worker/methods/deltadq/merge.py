"""From base and artifact back to weights: ``W = W_b + D_hat``, with the mask made again from the seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import Json
from compression_worker.deltas.merged import Merged
from compression_worker.making.loading import dense_model
from compression_worker.making.table import sides_of
from compression_worker.making.threads import ahead
from compression_worker.methods.deltadq.layout import GRIDS_FILE, LAYOUT, SCALES, ZEROS
from compression_worker.methods.deltadq.quantize import Dropout, Grid, delta_rows, delta_tiles, loaded, row_tiles
from compression_worker.tensors import TensorFile


class MergedSparse(Merged):
    """The tensors of a DeltaDQ artifact."""

    def __init__(self, base: Checkpoint, artifact: Artifact) -> None:
        super().__init__(base, artifact, LAYOUT, {"sparse": self})
        self._seed = artifact.manifest["seed"]
        with TensorFile(artifact.paths[GRIDS_FILE]) as file:
            self._scales, self._zeros = file.tensor(SCALES), file.tensor(ZEROS)

    def dropout(self, name: str) -> Dropout:
        """What the mask of a linear is made from."""
        entry = self.table[name]
        return Dropout(seed=self._seed, tensor=entry["place"], alpha=entry["alpha"], group_size=entry["group_size"])

    def grid(self, name: str) -> Grid:
        place = self.table[name]["place"]
        return Grid(float(self._scales[place]), float(self._zeros[place]))

    def codes(self, name: str) -> torch.Tensor:
        """The survivors' codes, uint8 ``(N, kept)``, or their values in bf16."""
        entry = self.table[name]
        outputs, inputs = sides_of(entry)
        data = self._own.file(name).tensor(name).numpy().tobytes()
        return loaded(data, entry["coding"], entry["bits"], outputs, self.dropout(name).kept(inputs))

    def delta(self, name: str) -> Iterator[torch.Tensor]:
        """``D_hat (N, K)`` in fp32, some rows at a time."""
        return delta_tiles(self.codes(name), self.grid(name), self.dropout(name), sides_of(self.table[name])[1])

    def tiles(self, name: str, entry: Json, base: TensorFile) -> Iterator[torch.Tensor]:
        """``W_b + D_hat`` in fp32, some rows at a time; a transposed matrix is made whole."""
        if entry.get("transposed"):
            return iter([base.tensor(name).to(torch.float32).add_(torch.cat(list(self.delta(name))).T)])
        outputs, inputs = entry["shape"]
        made = self.codes(name), self.grid(name), self.dropout(name), inputs

        def merged(rows: range) -> torch.Tensor:
            return base.rows(name, rows).to(torch.float32).add_(delta_rows(*made, rows))

        return ahead(merged, row_tiles(outputs, inputs))


def load_model(
    base: Checkpoint, artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """The compressed model in memory, merged once and dense."""
    with MergedSparse(base, artifact) as merged:
        model: torch.nn.Module = dense_model(merged, dtype)
    return model.to(device).eval().requires_grad_(False)
