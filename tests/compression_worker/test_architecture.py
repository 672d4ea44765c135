"""What config.json promises is what transformers writes to disk, for every family; experts are ordinary linears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compression_worker.architecture import describe
from compression_worker.contracts import CompressionError, Json
from tests.families import FAMILIES, MIXTURES, make_family_pair, make_model


def config_of(folder: Path) -> Json:
    config: Json = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_alone_names_every_tensor_that_lies_on_disk(family: str, tmp_path: Path) -> None:
    base, _ = make_family_pair(tmp_path, family)
    found = describe(config_of(base))
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()}
    assert found.parts.keys() == found.shapes.keys()
    matrices = {name for name, shape in found.shapes.items() if len(shape) == 2}
    ends = {name for name, part in found.parts.items() if part in ("embeddings", "head")}
    routers = {name for name in matrices if name.endswith("gate.weight")} if family in MIXTURES else set()
    assert {linear.name for linear in found.linears()} == matrices - ends - routers


def test_each_expert_is_a_linear_of_its_block() -> None:
    found = describe(make_model("mixtral").config.to_dict())
    experts = [linear for linear in found.blocks[1] if ".experts." in linear.name]
    assert [linear.name for linear in experts[:3]] == [
        "model.layers.1.block_sparse_moe.experts.0.w1.weight",
        "model.layers.1.block_sparse_moe.experts.0.w3.weight",
        "model.layers.1.block_sparse_moe.experts.1.w1.weight",
    ]
    assert {(linear.name[-9:], linear.shape) for linear in experts} == {
        ("w1.weight", (40, 32)),
        ("w2.weight", (32, 40)),
        ("w3.weight", (40, 32)),
    }
    assert len(experts) == 12
    assert found.stacked() >= {linear.name for linear in experts}


@pytest.mark.parametrize("family", MIXTURES)
def test_the_slices_of_a_stack_are_where_transformers_puts_the_experts(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, _ = make_family_pair(tmp_path, family)
    state = load_file(base / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base)
    found = describe(config_of(base))
    for stack, slices in found.stacks.items():
        flat = model.get_parameter(stack).flatten(0, 1)
        assert sum(one.rows for one in slices) == len(flat)
        for one in slices:
            assert torch.equal(flat[one.first : one.first + one.rows], state[one.name]), one.name
    for name, own in found.memory.items():
        assert torch.equal(model.get_parameter(own), state[name]), name


def test_a_renamed_tensor_is_known_by_both_names() -> None:
    found = describe(make_model("mixtral").config.to_dict())
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert found.memory[gate] == "model.layers.0.mlp.gate.weight"
    assert found.parts[gate] == "other"


def test_a_checkpoint_of_stacked_experts_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = make_model("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors")
    with pytest.raises(CompressionError, match="import it again") as refused:
        describe(config_of(tmp_path)).renamed_for(names)
    assert refused.value.code == "stacked_experts"


def test_a_checkpoint_without_the_models_prefix_keeps_its_own_names() -> None:
    found = describe(make_model("mixtral").config.to_dict())
    short = found.renamed_for({name.removeprefix("model.") for name in found.shapes})
    gate = "layers.0.block_sparse_moe.gate.weight"
    assert short.memory[gate] == "model.layers.0.mlp.gate.weight"
    assert "layers.0.block_sparse_moe.experts.3.w2.weight" in short.stacked()
    assert short.stacked() <= {linear.name for linear in short.linears()}
