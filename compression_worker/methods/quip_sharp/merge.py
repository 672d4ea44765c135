"""From code words back to weights: ``W_i = scale_i diag(s_out) Q_out Wt_hat Q_in^T diag(s_in)``, a stack at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json
from compression_worker.making.reading import ArtifactTensors
from compression_worker.methods.quip_sharp.layout import (
    CODES,
    LAYOUT,
    MATRIX,
    SCALES,
    SECOND,
    SIGNS_IN,
    SIGNS_OUT,
    key,
)
from compression_worker.methods.quip_sharp.quantize import code_words, unscaled
from compression_worker.methods.quip_sharp.rotation import WORD, Rotation
from compression_worker.tensors import TensorFile, TensorFiles
from kernels.e8p_matmul.reference import decode_matrix


@dataclass(frozen=True)
class StoredStack:
    """A stack as it lies in the artifact: its matrices ``names`` have ``rows`` each.

    ``planes``: each ``(N', K'/8)``; ``scales (pieces,)``; ``signs``: ``s_in (K,)``, ``s_out (N,)``.
    """

    bits: int
    rotation: Rotation
    planes: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    signs: tuple[torch.Tensor, torch.Tensor]
    names: tuple[str, ...]
    rows: tuple[int, ...]

    def turned(self) -> torch.Tensor:
        """``M (N, K)`` in fp32, in units of the codebook."""
        return self.rotation.back(decode_matrix(code_words(self.planes, self.bits)))

    def row_scales(self) -> torch.Tensor:
        """``scale_i`` of each row, ``(N,)``."""
        return self.scales.repeat_interleave(torch.tensor(self.rows))

    def weights(self) -> torch.Tensor:
        """All its matrices below each other, ``(N, K)`` in fp32."""
        s_in, s_out = self.signs
        return unscaled(self.turned(), s_in, s_out * self.row_scales())


class LatticeTensors(ArtifactTensors):
    """The tensors of a QuIP# artifact."""

    def __init__(self, artifact: Artifact) -> None:
        table = artifact.manifest["tensors"]
        super().__init__(
            artifact, LAYOUT, TensorFiles({name: artifact.paths[entry["file"]] for name, entry in table.items()})
        )
        self._seed = artifact.manifest["seed"]
        self._dense = lru_cache(maxsize=1)(lambda name: self.stack(name).weights())

    def stacks(self) -> Iterator[str]:
        """The names of all stacks."""
        return (name for name, entry in self.table.items() if "rotation" in entry)

    def stack(self, name: str) -> StoredStack:
        """The stack called ``name``. Raises :class:`CompressionError` where its tensors do not fit its line."""
        entry, file = self.table[name], self._own.file(name)
        try:
            rotation = Rotation.from_json(entry["rotation"], self._seed)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(name) from error
        pieces = [CODES] if entry["bits"] == 2 else [CODES, SECOND]
        planes = tuple(_tensor(file, key(name, piece)) for piece in pieces)
        scales = _tensor(file, key(name, SCALES))
        trained = entry.get("trained", False)
        signs = (
            (_tensor(file, key(name, SIGNS_IN)).float(), _tensor(file, key(name, SIGNS_OUT)).float())
            if trained
            else rotation.signs()
        )
        rows = tuple(self._outputs(one) for one in entry["pieces"])
        shape = (rotation.output_plan.n, rotation.input_plan.n // WORD)
        fits = all(plane.shape == shape for plane in planes) and len(scales) == len(rows)
        if not fits or sum(rows) != rotation.outputs or [len(one) for one in signs] != [rotation.inputs, sum(rows)]:
            raise _damaged(name)
        return StoredStack(entry["bits"], rotation, planes, scales, signs, tuple(entry["pieces"]), rows)

    def tiles_of(self, name: str) -> Iterator[torch.Tensor]:
        entry = self.table[name]
        if entry["coding"] != MATRIX:
            yield self._own.file(name).tensor(name).to(torch.float32)
            return
        whole = self._dense(entry["stack"])
        weight = whole[entry["first"] : entry["first"] + self._outputs(name)]
        yield weight.T if entry.get("transposed") else weight

    def _outputs(self, name: str) -> int:
        entry: Json = self.table[name]
        return int(entry["shape"][1 if entry.get("transposed") else 0])


def open_merged(base: Checkpoint | None, artifact: Artifact) -> LatticeTensors:
    """The tensors of the compressed model, for a restore; ``base`` is of no use."""
    return LatticeTensors(artifact)


def _tensor(file: TensorFile, name: str) -> torch.Tensor:
    if name not in file.entries:
        raise _damaged(name)
    return file.tensor(name)


def _damaged(name: str) -> CompressionError:
    return CompressionError("damaged_artifact", f"what the artifact stores of '{name}' does not fit its line")
