"""The pair that all rows compress: its tensors by part, their deltas, and the bytes that every row pays alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compression_worker.architecture import Architecture, describe
from compression_worker.checkpoints import Checkpoint, attach_folder, load_model, load_tokenizer, require_pair
from compression_worker.making.assembly import side_files
from compression_worker.store import Store


@dataclass(frozen=True)
class Scope:
    """Which parts of a model are compressed; the others are stored as they are."""

    parts: frozenset[str]


BLOCKS = Scope(frozenset({"linears"}))
MATRICES = Scope(frozenset({"linears", "embeddings", "head"}))
EVERYTHING = Scope(frozenset({"linears", "embeddings", "head", "norms", "biases", "other"}))

NOISE = 1e-7
"""Of the greatest singular value."""


@dataclass(frozen=True)
class Factors:
    """``delta = left @ right`` (columns and rows by falling singular value), both with the root of that value."""

    left: torch.Tensor
    right: torch.Tensor
    singular: torch.Tensor

    @property
    def gain(self) -> torch.Tensor:
        """Squared error that each triple removes, for each number that it costs."""
        return self.singular.square() / (self.left.shape[0] + self.right.shape[1])


class Pair:
    """A base and its variant. Tensors equal to the base's cost nothing in any row, as in our artifacts."""

    def __init__(self, store: Store, base: Path, variant: Path) -> None:
        self.base = Checkpoint.open(store, attach_folder(store, base))
        self.variant = Checkpoint.open(store, attach_folder(store, variant))
        require_pair(self.base.manifest, self.variant.manifest)
        aliases = dict(self.variant.manifest["aliases"])
        self.names = [name for name in self.variant.names if name not in aliases]
        self._factors: dict[str, Factors] = {}

    @cached_property
    def architecture(self) -> Architecture:
        return describe(self.variant.manifest["config"]).renamed_for(self.names)

    @property
    def source_bytes(self) -> int:
        return int(self.variant.manifest["weight_bytes"])

    @property
    def parameters(self) -> int:
        return int(self.variant.manifest["parameters"])

    @property
    def side_bytes(self) -> int:
        """Config, tokenizer and other files beside the weights, but for a vocabulary that is the base's own."""
        files = self.variant.manifest["files"]
        return sum(int(files[name]["size"]) for name in side_files(self.base, self.variant)[0])

    @cached_property
    def changed(self) -> list[str]:
        return [name for name in self.names if not torch.equal(bits(self.base, name), bits(self.variant, name))]

    def compressed(self, scope: Scope) -> list[str]:
        """Changed tensors that a peer of this scope codes: matrices only, unless the scope is everything."""
        wanted = [name for name in self.changed if self.architecture.parts[name] in scope.parts]
        return [name for name in wanted if scope is EVERYTHING or self.variant.tensor(name).ndim > 1]

    def kept(self, scope: Scope) -> list[str]:
        """Changed tensors that are stored as they are."""
        coded = set(self.compressed(scope))
        return [name for name in self.changed if name not in coded]

    def kept_words(self, scope: Scope) -> str:
        """What :meth:`kept` comes to, for a table."""
        return words_for_parts({self.architecture.parts[name] for name in self.kept(scope)})

    def delta(self, name: str) -> torch.Tensor:
        """Variant minus base in fp32, as a matrix."""
        difference = self.variant.tensor(name).float() - self.base.tensor(name).float()
        return difference.reshape(-1, difference.shape[-1])

    def factors(self, name: str) -> Factors:
        """The singular value decomposition of a delta, by the eigenvectors of its smaller Gram matrix in float64."""
        if name not in self._factors:
            self._factors[name] = decompose(self.delta(name))
        return self._factors[name]

    def part_bytes(self, parts: frozenset[str]) -> int:
        """Bytes of the changed tensors of some parts, as the variant stores them."""
        tensors = [self.variant.tensor(name) for name in self.changed if self.architecture.parts[name] in parts]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def model(self, side: str) -> Any:
        """The ``base`` or the ``variant`` in fp32."""
        return load_model({"base": self.base, "variant": self.variant}[side], dtype=torch.float32)

    def tokenizer(self) -> Any:
        return load_tokenizer(self.variant)


def words_for_parts(parts: set[str]) -> str:
    """Parts in one order; biases and the like are few bytes and go with the norms."""
    small = {"biases", "other"}
    named = {"norms" if part in small else part for part in parts}
    return ", ".join(part for part in ("linears", "embeddings", "head", "norms") if part in named) or "nothing"


def bits(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor's bits as integers, so that NaN equals itself and -0 differs from 0."""
    tensor = checkpoint.tensor(name).contiguous()
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def decompose(delta: torch.Tensor) -> Factors:
    if delta.shape[0] < delta.shape[1]:
        turned = decompose(delta.T)
        return Factors(turned.right.T.contiguous(), turned.left.T.contiguous(), turned.singular)
    wide = delta.double()
    squares, vectors = torch.linalg.eigh(wide.T @ wide)
    singular = squares.clamp(min=0).sqrt().flip(0)
    vectors = vectors.flip(1)
    # Below the rounding of the Gram matrix a vector is noise, and dividing by its value would make it large.
    real = singular > NOISE * singular[:1]
    left = (wide @ vectors) * (singular.rsqrt() * real).nan_to_num(posinf=0.0)
    right = (vectors * singular.sqrt()).T
    return Factors(left.float(), right.float().contiguous(), singular * real)
