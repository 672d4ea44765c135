"""What DeltaLLM is measured beside: a sliced model computes, weighs and can do what it should; rows take groups over."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_worker.checkpoints import load_folder
from tests.benchmarks.layer_sharing import slicing
from tests.benchmarks.layer_sharing.peers import PEERS, Impossible, deleted_directions, linears_of, parameters
from tests.benchmarks.layer_sharing.rows import SharingRow
from tests.benchmarks.layer_sharing.slicing import cut, is_tied, sliced_parameters, stays_tied
from tests.benchmarks.layer_sharing.training import Lesson, merged, prepared
from tests.tiny import HIDDEN, make_tiny_pair

WINDOWS = torch.randint(2, 100, (5, 24), generator=torch.Generator().manual_seed(5))
SMALL, LARGE = 100, 1000
"""A vocabulary whose head weighs less than turns and embeddings of full width, and one whose head weighs more."""


def model_of(folder: Path, *, tied: bool, vocab: int = SMALL) -> Any:
    """Four blocks whose norms have weights that are not one."""
    model = load_folder(make_tiny_pair(folder, tied=tied, layers=4, vocab=vocab)[0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, one in model.named_parameters():
        if "norm" in name:
            one.data = 0.5 + torch.rand(one.shape, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(WINDOWS, use_cache=False).logits
    return found


@pytest.mark.parametrize(("tied", "vocab"), [(False, SMALL), (True, SMALL), (True, LARGE)])
def test_with_nothing_deleted_a_turned_model_answers_as_before(tied: bool, vocab: int, tmp_path: Path) -> None:
    model = model_of(tmp_path, tied=tied, vocab=vocab)
    expected, promised = logits(model), sliced_parameters(model, HIDDEN)
    assert stays_tied(model, HIDDEN) == (tied and vocab == LARGE)
    before = parameters(model)
    cut(model, WINDOWS, HIDDEN)
    model.tie_weights()  # as those do that measure any model
    assert parameters(model) == promised > before, "adapters are counted"
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("tied", "vocab"), [(False, SMALL), (True, SMALL), (True, LARGE)])
def test_as_many_directions_stay_as_parameters_may(tied: bool, vocab: int, tmp_path: Path) -> None:
    model = model_of(tmp_path, tied=tied, vocab=vocab)
    whole = parameters(model)
    most = int(0.3 * whole)
    size = next(size for size in range(1, HIDDEN) if whole - sliced_parameters(model, size) <= most)
    promised, narrower = (sliced_parameters(model, one) for one in (size, size - 1))
    deleted_directions(model, WINDOWS, most)
    assert parameters(model) == promised
    assert narrower < whole - most <= promised < whole
    assert {linear.weight.shape for name, linear in linears_of(model) if name.endswith("up_proj")} == {(128, size)}
    assert logits(model).isfinite().all()


def test_a_stream_of_few_directions_loses_nothing(tmp_path: Path) -> None:
    """Weights of rank 40 write into 40 directions: as many suffice, whatever the norms divide by."""
    model = model_of(tmp_path, tied=False)
    generator = torch.Generator().manual_seed(2)
    basis, _ = torch.linalg.qr(torch.randn((HIDDEN, 40), generator=generator))
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(basis @ (basis.T @ linear.weight))
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ basis @ basis.T)
    expected = logits(model)
    narrow = copy.deepcopy(model)
    cut(model, WINDOWS, 40)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    cut(narrow, WINDOWS, 20)
    assert (logits(narrow) - expected).abs().max() > 0.01


def test_principal_directions_lose_less_than_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tmp_path, tied=False)
    expected, errors = logits(model), []
    principal = slicing._turn
    least = lambda streams, norm, size: principal(streams, norm, HIDDEN).flip(1)[:, :size]  # noqa: E731
    for turn in (principal, least):
        monkeypatch.setattr(slicing, "_turn", turn)
        made = copy.deepcopy(model)
        cut(made, WINDOWS, 40)
        errors.append(float((logits(made) - expected).square().mean()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_may_weigh_more_than_goes(tied: bool, tmp_path: Path) -> None:
    model = model_of(tmp_path, tied=tied)
    with pytest.raises(Impossible, match="no longer tied, weigh" if tied else "because adapters weigh"):
        deleted_directions(model, WINDOWS, 100)
    assert is_tied(model) is tied, "nothing was changed"


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_a_sliced_model_writes_with_a_cache_what_it_writes_without(vocab: int, tmp_path: Path) -> None:
    model = model_of(tmp_path, tied=True, vocab=vocab)
    deleted_directions(model, WINDOWS, parameters(model) // 5)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    written = [model.generate(WINDOWS[:2, :6], use_cache=cache, **settings) for cache in (True, False)]
    assert written[0].shape == (2, 18)
    assert torch.equal(*written)


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_a_sliced_model_learns_by_adapters_that_merge(vocab: int, tmp_path: Path) -> None:
    model = model_of(tmp_path, tied=True, vocab=vocab)
    lesson = Lesson(model, WINDOWS.repeat(8, 1), 5)
    PEERS["directions deleted (SliceGPT)"](model, WINDOWS, parameters(model) // 4)
    left = parameters(model)
    trained = prepared(model, 8_000)
    assert len(trained) == 2 * 4 * 7, "two factors on each linear of each block"
    losses = lesson.teach(model, trained, 3e-3)
    assert losses[-1] < losses[0]
    learned = logits(model)
    merged(model)
    assert parameters(model) == left
    torch.testing.assert_close(logits(model), learned, rtol=1e-4, atol=1e-4)


def test_a_row_takes_groups_over_with_the_ranks_that_they_have() -> None:
    row = SharingRow(name="one", bits=16, method="deltallm", set=("start=zero",), groups_of="another")
    sharing: dict[str, Any] = {"groups": {"2": [3, 4], "5": [6]}, "rank": 32}
    assert row.among(sharing, {"start": "svd"}).set == ("start=zero", "groups=2:3,4;5:6", "rank=32")
    told = row.among(sharing | {"group_ranks": {"3": 8, "4": 8, "6": 32}}, {}).set
    assert told == ("start=zero", "groups=2:3,4@8;5:6@32", "rank=32")
