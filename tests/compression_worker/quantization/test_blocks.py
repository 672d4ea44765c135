"""Blocks run one at a time give what the whole model gives, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compression_worker.checkpoints import Checkpoint, attach_folder, load_model
from compression_worker.quantization.blocks import BlockRunner, split, window_batches
from compression_worker.store import Store
from tests.families import FAMILIES, MIXTURES, make_family_pair


def opened(folder: Path, family: str) -> Checkpoint:
    base, _ = make_family_pair(folder, family)
    store = Store(folder / "store", durable=False)
    return Checkpoint.open(store, attach_folder(store, base))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_a_row_are_the_model(tmp_path: Path, family: str) -> None:
    checkpoint = opened(tmp_path, family)
    tokens = torch.randint(0, 280, (3, 20), generator=torch.Generator().manual_seed(0))
    model = load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    with BlockRunner(checkpoint) as runner, torch.no_grad():
        hidden = runner.embed(tokens)
        for index in range(len(runner)):
            torch.testing.assert_close(hidden, wanted[index], rtol=0, atol=0)
            with runner.block(index) as block:
                hidden = block(hidden)
    # The last of transformers' hidden states is behind the final norm.
    assert not torch.equal(hidden, wanted[-2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_in_one_group_whose_inputs_give_its_outputs(tmp_path: Path, family: str) -> None:
    checkpoint = opened(tmp_path, family)
    tokens = torch.randint(0, 280, (4, 24), generator=torch.Generator().manual_seed(1))
    with BlockRunner(checkpoint) as runner:
        hidden = runner.embed(tokens)
        with runner.block(0) as block:
            groups = block.groups(hidden[:1])
            assert sorted(one.name for group in groups for one in group.linears) == sorted(
                linear.name for linear in block.linears
            )
            seen: dict[str, torch.Tensor] = {}
            block.see(groups, hidden, lambda group, x: seen.update({group.name: x}), stop=True)
            for group in groups:
                assert seen[group.name].shape[1] == group.inputs
                if group.expert < 0:
                    for linear in group.linears:
                        out: list[torch.Tensor] = []
                        handle = block.owner(linear).register_forward_hook(lambda m, i, o, out=out: out.append(o))
                        with torch.no_grad():
                            block(hidden)
                        handle.remove()
                        bias = getattr(block.owner(linear), "bias", None)
                        made = seen[group.name] @ block.weight(linear).T + (0 if bias is None else bias)
                        torch.testing.assert_close(made, out[0].flatten(0, -2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_get_the_rows_that_chose_them(tmp_path: Path, family: str) -> None:
    checkpoint = opened(tmp_path, family)
    tokens = torch.randint(0, 280, (4, 24), generator=torch.Generator().manual_seed(1))
    with BlockRunner(checkpoint) as runner:
        hidden = runner.embed(tokens)
        with runner.block(0) as block:
            groups = [group for group in block.groups(hidden[:1]) if group.owner]
            experts = {group.expert for group in groups}
            assert experts == {0, 1, 2, 3}
            seen: dict[str, torch.Tensor] = {}
            block.see(groups, hidden, lambda group, x: seen.update({group.name: x}), stop=True)
            # Two experts a token.
            for side in ("input", "between"):
                assert sum(len(seen[group.name]) for group in groups if group.side == side) == 2 * tokens.numel()
            # gate and up of an expert, its activation between, and what reads that, are one another's.
            read = {(group.expert, group.side): group for group in groups}
            for expert in experts:
                first, second = read[expert, "input"], read[expert, "between"]
                gate, up = (seen[first.name] @ block.weight(linear).T for linear in first.linears)
                made = torch.nn.functional.silu(gate) * up
                torch.testing.assert_close(made, seen[second.name], rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_set_is_what_the_block_computes_with(tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "mixtral"):
        checkpoint = opened(tmp_path / family, family)
        with BlockRunner(checkpoint) as runner:
            hidden = runner.embed(torch.arange(40, 60).view(1, 20))
            with runner.block(1) as block, torch.no_grad():
                before = block(hidden)
                for linear in block.linears:
                    weight = block.weight(linear)
                    assert tuple(weight.shape) == (linear.outputs, linear.inputs)
                    block.set_weight(linear, weight * 1.5)
                    torch.testing.assert_close(block.weight(linear), weight * 1.5)
                assert not torch.allclose(block(hidden), before)
                for linear in block.linears:
                    block.set_weight(linear, block.weight(linear) / 1.5)
                torch.testing.assert_close(block(hidden), before)
            with runner.block(1) as block, torch.no_grad():
                torch.testing.assert_close(block(hidden), before, rtol=0, atol=0)


def test_a_block_leaves_no_weight_behind(tmp_path: Path) -> None:
    with BlockRunner(opened(tmp_path, "llama")) as runner:
        with runner.block(0) as block:
            module = block.module
            assert not any(parameter.is_meta for parameter in module.parameters())
        assert all(parameter.is_meta for parameter in module.parameters())


def test_runs_and_batches_cover_everything_once() -> None:
    assert [list(run) for run in split(5, 2)] == [[0, 1], [2, 3, 4]]
    assert [list(run) for run in split(3, 8)] == [[0], [1], [2]]
    assert [list(batch) for batch in window_batches(5, 100, 250)] == [[0, 1], [2, 3], [4]]
    assert [list(batch) for batch in window_batches(2, 5000, 2048)] == [[0], [1]]
