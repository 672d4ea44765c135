"""The matrices of a model that may be shared: found by the type and the place of their modules, from config.json alone.

A block's attention is what transformers calls so; its MLP is the other child that holds linears (or, in a family that
keeps them loose, those linears). Experts of a mixture are not shared: which token reaches which expert differs from
block to block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compression_worker.architecture import Architecture, Linear, blocks_of, build
from compression_worker.contracts import CompressionError, Json
from compression_worker.making.loading import module_path

ATTENTION, MLP, OTHER = "attention", "mlp", ""
_MLP_NAMES = ("mlp", "feedforward", "ffn", "conv1d", "linear")


@dataclass(frozen=True)
class SharedMatrix:
    """One linear of a block that may be shared.

    ``path`` is its module in the model in memory, ``role`` its place inside the block: matrices of equal role and shape
    can share. ``kind`` says whether it belongs to the MLP or to attention.
    """

    linear: Linear
    path: str
    role: str
    kind: str

    @property
    def name(self) -> str:
        """The name of its weight in the checkpoint."""
        return self.linear.name

    @property
    def sides(self) -> tuple[int, int]:
        """``(N, K)``"""
        return self.linear.outputs, self.linear.inputs


@dataclass(frozen=True)
class Shareable:
    """``blocks``: the matrices of each block that may be shared; ``alike``: blocks whose matrices have equal shapes."""

    blocks: tuple[tuple[SharedMatrix, ...], ...]
    alike: tuple[int, ...]

    @property
    def sides(self) -> list[tuple[int, int]]:
        """``(N, K)`` of the matrices of each of the blocks that are alike."""
        return [one.sides for one in self.blocks[self.alike[0]]] if self.alike else []

    def pairs(self, groups: Mapping[int, int]) -> list[tuple[SharedMatrix, SharedMatrix]]:
        """Follower and anchor of every shared matrix of ``groups`` (follower -> anchor), in the order of blocks."""
        found = []
        for follower in sorted(groups):
            theirs = {one.role: one for one in self.blocks[groups[follower]]}
            found += [(one, theirs[one.role]) for one in self.blocks[follower]]
        return found

    def taken(self, groups: Mapping[int, int], left_out: Collection[int]) -> set[str]:
        """The names of weights that follow, or that a follower uses: those of ``left_out`` use none."""
        return {
            one.name
            for follower, anchor in self.pairs(groups)
            for one in ([follower] if follower.linear.block in left_out else [follower, anchor])
        }


def unshared(
    config: Json, architecture: Architecture, taken: Collection[str]
) -> dict[str, tuple[str, tuple[int, int]]]:
    """The block linears that neither follow nor are followed, which are ``taken``: name -> path and ``(N, K)``.

    Experts of a mixture, which are no modules of their own, are not among them.
    """
    taken = {*taken, *architecture.stacked()}
    model = build(config)
    modules = dict(model.named_modules())
    found = {}
    for linear in (one for one in architecture.linears() if one.name not in taken):
        own = architecture.memory.get(linear.name, linear.name)
        path = module_path(own, modules, model.base_model_prefix)
        found[linear.name] = (path, (linear.outputs, linear.inputs))
    return found


def shareable(config: Json, architecture: Architecture, kinds: Sequence[str]) -> Shareable:
    """What may be shared of a model. ``architecture`` has the names of its checkpoint.

    Raises :class:`CompressionError` (``experts``) where MLPs are to be shared and are mixtures of experts.
    """
    if MLP in kinds and architecture.stacked():
        raise CompressionError(
            "experts",
            "the MLPs of this model are mixtures of experts, which layers cannot share: set modules=attention to share "
            "its attention alone",
        )
    model = build(config)
    stacked = architecture.stacked()
    modules = dict(model.named_modules())
    blocks = []
    for (path, block), linears in zip(blocks_of(model), architecture.blocks, strict=True):
        kind_of = {name: _kind(child) for name, child in block.named_children()}
        found = []
        for linear in (one for one in linears if one.name not in stacked):
            own = module_path(architecture.memory.get(linear.name, linear.name), modules, model.base_model_prefix)
            role = own.removeprefix(f"{path}.")
            kind = kind_of.get(role.partition(".")[0], OTHER)
            if kind in kinds:
                found.append(SharedMatrix(linear, own, role, kind))
        blocks.append(tuple(found))
    return Shareable(tuple(blocks), _alike(blocks, kinds))


def _kind(child: Any) -> str:
    name = type(child).__name__.lower()
    if "attention" in name:
        return ATTENTION
    return MLP if any(word in name for word in _MLP_NAMES) and _holds_linears(child) else OTHER


def _holds_linears(child: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, (torch.nn.Linear, Conv1D)) for module in child.modules())


def _alike(blocks: Sequence[tuple[SharedMatrix, ...]], kinds: Sequence[str]) -> tuple[int, ...]:
    """The largest set of blocks whose matrices have equal roles and shapes."""
    shapes = [tuple((one.role, *one.sides) for one in block) for block in blocks]
    whole = [
        shape if {one.kind for one in block} == set(kinds) else () for shape, block in zip(shapes, blocks, strict=True)
    ]
    counts = Counter(shape for shape in whole if shape)
    if not counts:
        return ()
    (shape, _), *_ = counts.most_common(1)
    return tuple(index for index, one in enumerate(whole) if one == shape)
