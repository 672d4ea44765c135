"""Embeddings by changed row: what did not change costs a bit, added rows are exact, and pieces come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compression_worker.contracts import CompressionError, Json
from compression_worker.deltas.moments import Moments
from compression_worker.deltas.rows import (
    CODINGS,
    CodedRows,
    RowsReader,
    code_rows,
    merged_rows,
    pieces_specs,
    rows_entry,
    rows_losses,
)
from compression_worker.tensors import Spec, TensorFile, write_file

NAME = "embed"
Opened = Callable[[torch.Tensor], TensorFile]


@pytest.fixture(name="opened")
def fixture_opened(tmp_path: Path) -> Iterator[Opened]:
    with ExitStack() as stack:

        def opened(tensor: torch.Tensor) -> TensorFile:
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
            save_file({NAME: tensor}, path)
            return stack.enter_context(TensorFile(path))

        yield opened


def pair(rows: int = 60, width: int = 37, added: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A base, and a variant in which every third row changed and ``added`` rows are new; bf16."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn((rows, width), generator=generator).to(torch.bfloat16)
    variant = torch.cat([base, torch.randn((added, width), generator=generator).to(torch.bfloat16)])
    variant[:rows:3] += (0.1 * torch.randn((len(base[::3]), width), generator=generator)).to(torch.bfloat16)
    return base, variant


def written(tmp_path: Path, coded: CodedRows) -> TensorFile:
    path = tmp_path / "rows.safetensors"
    with path.open("wb") as file:
        write_file(file, pieces_specs(NAME, coded))
    return TensorFile(path)


def line(variant: torch.Tensor, coding: str, coded: CodedRows) -> Json:
    return rows_entry(Spec("BF16", tuple(variant.shape)), "embeddings", coding, coded, "0" * 64)


@pytest.mark.parametrize("coding", CODINGS[1:])
@pytest.mark.parametrize("added", [0, 5])
def test_rows_come_back_and_only_changed_ones_are_stored(
    coding: str, added: int, opened: Opened, tmp_path: Path
) -> None:
    base, variant = pair(added=added)
    coded = code_rows(coding, opened(base), opened(variant), NAME)
    assert coded.changed == 20
    with written(tmp_path, coded) as file:
        merged = torch.cat(list(RowsReader(file).tiles(NAME, line(variant, coding, coded), opened(base))))
    assert torch.equal(merged[:60].to(torch.bfloat16)[1::3], variant[1:60:3])
    assert torch.equal(merged[60:].to(torch.bfloat16), variant[60:])
    assert torch.equal(merged, merged_rows(coding, opened(base), opened(variant), NAME))
    error = float((merged - variant.float()).square().sum())
    assert error == pytest.approx(coded.error, rel=1e-4)
    assert 0 < error < coded.energy
    most = {"sign": 0.7, "int4": 0.02, "int8": 1e-4}
    assert error / coded.energy < most[coding]


def test_the_bytes_of_a_line_are_those_of_its_pieces(opened: Opened, tmp_path: Path) -> None:
    base, variant = pair(added=3)
    for coding in CODINGS[1:]:
        coded = code_rows(coding, opened(base), opened(variant), NAME)
        with written(tmp_path, coded) as file:
            stored = sum(entry.spec.size for entry in file.entries.values())
        assert line(variant, coding, coded)["bytes"] == stored
        ((size, _),) = rows_losses([coding], opened(base), opened(variant), NAME, [])
        assert size == stored


def test_losses_weigh_rows_by_how_often_they_are_read(opened: Opened) -> None:
    base, variant = pair()
    coded = code_rows("sign", opened(base), opened(variant), NAME)
    even = Moments(torch.ones(60), torch.ones(37))
    ((_, lost),) = rows_losses(["sign"], opened(base), opened(variant), NAME, [even])
    assert lost == pytest.approx(coded.error, rel=1e-5)
    unread = Moments(torch.zeros(60), torch.ones(37))
    ((_, nothing),) = rows_losses(["sign"], opened(base), opened(variant), NAME, [unread])
    assert nothing == 0
    ((_, twice),) = rows_losses(["sign"], opened(base), opened(variant), NAME, [even, even])
    assert twice == pytest.approx(2 * lost)


def test_a_vocabulary_that_shrank_is_coded_as_far_as_it_goes(opened: Opened, tmp_path: Path) -> None:
    base, variant = pair()
    variant = variant[:41].clone()
    coded = code_rows("int8", opened(base), opened(variant), NAME)
    with written(tmp_path, coded) as file:
        merged = torch.cat(list(RowsReader(file).tiles(NAME, line(variant, "int8", coded), opened(base))))
    assert merged.shape == (41, 37)
    torch.testing.assert_close(merged, variant.float(), rtol=0.0, atol=0.01)


def test_a_variant_without_a_changed_row_costs_a_bit_a_row(opened: Opened) -> None:
    base, _ = pair()
    coded = code_rows("sign", opened(base), opened(base.clone()), NAME)
    assert coded.changed == 0
    assert sum(piece.numel() * piece.element_size() for piece in coded.pieces.values()) == 8


def test_rows_that_are_not_finite_are_refused(opened: Opened) -> None:
    base, variant = pair()
    variant[3] = torch.nan
    with pytest.raises(CompressionError, match="not finite"):
        code_rows("sign", opened(base), opened(variant), NAME)


def test_pieces_that_do_not_fit_are_refused(opened: Opened, tmp_path: Path) -> None:
    base, variant = pair()
    coded = code_rows("int4", opened(base), opened(variant), NAME)
    entry = line(variant, "int4", coded)
    short = CodedRows(coded.pieces | {"scales": coded.pieces["scales"][:-1]}, 20, 0, 0)
    with written(tmp_path, short) as file, pytest.raises(CompressionError, match="do not fit"):
        list(RowsReader(file).tiles(NAME, entry, opened(base)))
    with written(tmp_path, coded) as file, pytest.raises(CompressionError, match="another shape in the base"):
        list(RowsReader(file).tiles(NAME, entry, opened(base[:, :20].contiguous())))
