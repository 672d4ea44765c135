"""Which matrices of a run of blocks are coded together: a stack is what reads one input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compression_worker.architecture import Architecture, Linear
from compression_worker.contracts import Json
from compression_worker.methods.quip_sharp.rotation import Rotation
from compression_worker.tensors import TensorFiles


@dataclass(frozen=True)
class Stack:
    """``linears`` of one block in the order of their rows; ``stream`` is the first one's number among all linears."""

    linears: tuple[Linear, ...]
    stream: int

    @property
    def name(self) -> str:
        return self.linears[0].name

    @property
    def block(self) -> int:
        return self.linears[0].block

    @property
    def outputs(self) -> int:
        """``N``"""
        return sum(linear.outputs for linear in self.linears)

    @property
    def inputs(self) -> int:
        """``K``"""
        return self.linears[0].inputs

    def rotation(self, seed: int) -> Rotation:
        return Rotation.of(self.outputs, self.inputs, seed, self.stream)

    def weights(self, files: TensorFiles) -> list[torch.Tensor]:
        """Each ``(N_i, K)`` in fp32."""
        return [read_weight(files, linear) for linear in self.linears]


def read_weight(files: TensorFiles, linear: Linear) -> torch.Tensor:
    """``W (N, K)`` in fp32."""
    weight = files.file(linear.name).tensor(linear.name).to(torch.float32)
    return weight.T.contiguous() if linear.transposed else weight


def stacks_of(architecture: Architecture, run: range, input_of: Callable[[str], str], *, fuse: bool) -> Iterator[Stack]:
    """The stacks of the blocks ``run``. ``input_of`` names the Hessian of a linear; ``fuse`` False keeps each alone."""
    numbers = {linear.name: number for number, linear in enumerate(architecture.linears())}
    for block in run:
        together: dict[str, list[Linear]] = {}
        for linear in architecture.blocks[block]:
            together.setdefault(input_of(linear.name) if fuse else linear.name, []).append(linear)
        for linears in together.values():
            yield Stack(tuple(linears), numbers[linears[0].name])


def stack_line(stack: Stack, rotation: Rotation, **more: Any) -> Json:
    """A stack in a step's output, with ``more`` that is said of it."""
    return {"linears": [asdict(linear) for linear in stack.linears], "rotation": rotation.to_json(), **more}


def from_line(line: Json) -> Stack:
    """The stack that :func:`stack_line` wrote down."""
    return Stack(tuple(Linear(**linear) for linear in line["linears"]), line["rotation"]["stream"])
