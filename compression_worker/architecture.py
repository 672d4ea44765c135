"""What a config.json promises without any weight: the linears of each transformer block, and the part of each tensor.

The architecture is built on torch's meta device, which has shapes and no memory, so that any family that transformers
knows is understood by the type and the place of its modules and not by their names. Names are those of a checkpoint:
each expert of a mixture is a linear of its block, although the model in memory stacks them in one parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compression_worker.contracts import CompressionError, Json
from compression_worker.experts import Slice, Written, written


@dataclass(frozen=True)
class Linear:
    """One linear of a transformer block: the name of its weight, and ``y (N) = W x (K)``.

    ``transposed`` marks a weight stored as ``(K, N)``, as GPT-2 does.
    """

    name: str
    block: int
    outputs: int
    inputs: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape as stored."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)


@dataclass(frozen=True)
class Architecture:
    """``blocks`` lists the linears of each transformer block; ``shapes`` and ``parts`` know every unique tensor.

    A part is one of ``linears``, ``embeddings``, ``head``, ``norms``, ``biases``, ``other``. ``stacks`` maps a
    parameter that exists in memory only to the matrices of its experts; ``memory`` maps every other tensor that the
    model in memory calls otherwise to that name.
    """

    blocks: tuple[tuple[Linear, ...], ...]
    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, str]
    prefix: str
    stacks: dict[str, tuple[Slice, ...]] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)

    def linears(self) -> Iterable[Linear]:
        return (linear for block in self.blocks for linear in block)

    def stacked(self) -> set[str]:
        """The linears that are no module of their own in memory: the experts of mixtures."""
        return {one.name for slices in self.stacks.values() for one in slices}

    def renamed_for(self, names: Collection[str]) -> Architecture:
        """The same under the names a checkpoint uses: some files leave out the model's prefix (``transformer.``).

        Refuses one that holds stacked experts, as a store may have it of old: no matrix there has a name.
        """
        if stacked := next((name for name in self.stacks if name in names), None):
            raise CompressionError(
                "stacked_experts",
                f"the checkpoint keeps the experts of a layer in one tensor, '{stacked}': import it again, which takes "
                "in a matrix for each expert",
            )
        short = {name: name.removeprefix(self.prefix) for name in self.shapes}
        new = {name: short[name] if name not in names and short[name] in names else name for name in self.shapes}
        return replace(
            self,
            blocks=tuple(tuple(replace(linear, name=new[linear.name]) for linear in block) for block in self.blocks),
            shapes={new[name]: shape for name, shape in self.shapes.items()},
            parts={new[name]: part for name, part in self.parts.items()},
            stacks={
                stack: tuple(replace(one, name=new[one.name]) for one in slices)
                for stack, slices in self.stacks.items()
            },
            memory={
                new[name]: self.memory.get(name, name)
                for name in self.shapes.keys() - self.stacked()
                if new[name] != self.memory.get(name, name)
            },
        )


def describe(config: Json) -> Architecture:
    """The architecture that ``config`` (a parsed config.json) stands for; no weight is read or made."""
    model = build(config)
    disk = written(model, _tensors(model))
    blocks = tuple(tuple(_linears(name, block, index, disk)) for index, (name, block) in enumerate(blocks_of(model)))
    if not any(blocks):
        raise CompressionError("no_linears", f"the blocks of a {type(model).__name__} hold no linear layer to compress")
    linears = {linear.name: linear for block in blocks for linear in block}
    kept = {disk.names.get(name, name): tensor for name, tensor in _tensors(model) if name not in disk.stacks}
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()} | {n: one.shape for n, one in linears.items()}
    parts = {disk.names.get(name, name): part for name, part in _parts(model).items()} | dict.fromkeys(
        linears, "linears"
    )
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return Architecture(
        blocks=blocks,
        shapes=shapes,
        parts={name: parts.get(name, "other") for name in shapes},
        prefix=prefix,
        stacks=disk.stacks,
        memory={name: own for own, name in disk.names.items() if name != own},
    )


def build(config: Json) -> Any:
    """The causal language model of ``config`` on the meta device."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(parsed(config))
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise CompressionError(
            "bad_config", f"config.json does not describe a causal language model: {_first_line(error)}"
        ) from error


def parsed(config: Json) -> Any:
    """The config as transformers' own object."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CompressionError("unknown_architecture", f"this version of transformers knows no model type {kind!r}")
    try:
        return CONFIG_MAPPING[kind].from_dict(config)
    except Exception as error:  # validators of transformers raise their own, undocumented classes
        raise CompressionError("bad_config", f"config.json is refused by transformers: {_first_line(error)}") from error


def blocks_of(model: Any) -> list[tuple[str, Any]]:
    """The members of the module list that holds the most weights: the stack of transformer blocks."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise CompressionError("no_blocks", f"a {type(model).__name__} has no stack of transformer blocks")
    # An outer list holds at least what an inner one does; max keeps the first, which is the outer.
    name, stack = max(lists, key=lambda item: sum(tensor.numel() for tensor in item[1].parameters()))
    return [(f"{name}.{index}", block) for index, block in enumerate(stack)]


def _linears(prefix: str, block: Any, index: int, disk: Written) -> Iterable[Linear]:
    from transformers.pytorch_utils import Conv1D

    for path, module in block.named_modules(prefix=prefix):
        name = disk.names.get(f"{path}.weight", f"{path}.weight")
        if isinstance(module, torch.nn.Linear):
            yield Linear(name, index, module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            yield Linear(name, index, module.weight.shape[1], module.weight.shape[0], transposed=True)
        for own, stack in module.named_parameters(prefix=path, recurse=False):
            yield from (Linear(one.name, index, one.rows, stack.shape[-1]) for one in disk.stacks.get(own, ()))


def _tensors(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers; a tied tensor once, under its first name."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, tensor) for name, tensor in model.named_buffers() if name in saved)


def _parts(model: Any) -> dict[str, str]:
    head = model.get_output_embeddings()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    parts = {}
    for name, tensor in _tensors(model):
        if id(tensor) in embeddings:
            parts[name] = "embeddings"
        elif head is not None and tensor is head.weight:
            parts[name] = "head"
        elif name.endswith(".bias"):
            parts[name] = "biases"
        else:
            parts[name] = "norms" if tensor.ndim == 1 else "other"
    return parts


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
