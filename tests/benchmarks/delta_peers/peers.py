"""Baselines: 1 bit with its first scale, random dropping (DARE), magnitude pruning, low rank, lossless zstandard.

A peer turns a pair into tensors for one file (``encode``) and these back into weights (``weight``). A *dial* sets its
size where it has one: the share of entries that is kept, or how many singular triples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kernels.packing import pack_bits, unpack_signs
from tests.benchmarks.delta_peers.pair import BLOCKS, EVERYTHING, MATRICES, Pair, Scope
from tests.benchmarks.delta_peers.sparse import (
    POSITIONS,
    Tensors,
    pack_positions,
    pack_values,
    squeeze,
    unpack_positions,
    unpack_values,
    unsqueeze,
)

SEED = 20_240_211
LEAST_SHARE = 1e-4

Stored = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """``label`` and what it compresses; no dial unless a subclass gives one."""

    label: str
    scope: Scope = BLOCKS
    whole_dial = False
    """Whether a dial counts things."""
    weights_file = "delta.safetensors"

    def dials(self, pair: Pair) -> tuple[float, float] | None:
        """The dial of the smallest and of the largest form; None where there is but one form."""
        return None

    def dial_words(self, pair: Pair, dial: float) -> str:
        return ""

    def encode(self, pair: Pair, dial: float) -> Tensors:
        raise NotImplementedError

    def delta(self, pair: Pair, stored: Stored, name: str) -> torch.Tensor:
        """The decoded delta of one tensor in fp32, as a matrix."""
        raise NotImplementedError

    def weight(self, pair: Pair, stored: Stored, name: str) -> torch.Tensor:
        base = pair.base.tensor(name).float()
        return base + self.delta(pair, stored, name).view(base.shape)

    def kept_key(self, name: str) -> str:
        """The name in the file of a tensor that is stored as it is."""
        return name

    def extra_files(self, pair: Pair, dial: float) -> dict[str, bytes]:
        return {}

    def is_position(self, key: str) -> bool:
        """Whether a tensor of the file says where values are: what papers do not count."""
        return key.rpartition(".")[2] in POSITIONS


@dataclass(frozen=True, kw_only=True)
class OneBit(Peer):
    """Signs, and the mean absolute delta of each matrix: BitDelta before its scales are trained."""

    def encode(self, pair: Pair, dial: float) -> Tensors:
        stored: Tensors = {}
        for name in pair.compressed(self.scope):
            delta = pair.delta(name)
            stored |= {f"{name}.signs": pack_bits(delta >= 0), f"{name}.scale": delta.abs().mean()}
        return stored

    def delta(self, pair: Pair, stored: Stored, name: str) -> torch.Tensor:
        inputs = pair.base.tensor(name).shape[-1]
        return stored[f"{name}.scale"] * unpack_signs(stored[f"{name}.signs"], inputs)


@dataclass(frozen=True, kw_only=True)
class Sparse(Peer):
    """Some entries of each matrix at ``bits`` each, and where they are. ``random`` is DARE: survivors / share kept.

    A random mask from a ``seed`` is made again by the reader instead of stored. Entries that are zero are not stored,
    unless a seeded mask asks for them.
    """

    random: bool
    bits: int
    seeded: bool = False

    def dials(self, pair: Pair) -> tuple[float, float]:
        return LEAST_SHARE, 1.0

    def dial_words(self, pair: Pair, dial: float) -> str:
        return f"{100 * dial:.3g} % kept"

    def encode(self, pair: Pair, dial: float) -> Tensors:
        stored: Tensors = {"mask": torch.tensor([SEED, dial], dtype=torch.float64)} if self.seeded else {}
        for index, name in enumerate(pair.compressed(self.scope)):
            delta = pair.delta(name)
            mask = random_mask(delta.shape, dial, SEED + index) if self.random else largest(delta, dial)
            if not self.seeded:
                mask &= delta != 0
            values = delta[mask] / dial if self.random else delta[mask]
            if values.numel():
                parts = pack_values(values, self.bits) | ({} if self.seeded else pack_positions(mask))
                stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return stored

    def delta(self, pair: Pair, stored: Stored, name: str) -> torch.Tensor:
        shape = matrix_shape(pair, name)
        prefix = f"{name}."
        parts = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
        delta = torch.zeros(shape)
        if parts:
            mask = self._mask(pair, stored, name, shape) if self.seeded else unpack_positions(parts, shape)
            delta[mask] = unpack_values(parts, int(mask.sum()))
        return delta

    def _mask(self, pair: Pair, stored: Stored, name: str, shape: tuple[int, int]) -> torch.Tensor:
        seed, share = stored["mask"].tolist()
        return random_mask(shape, share, int(seed) + pair.compressed(self.scope).index(name))


@dataclass(frozen=True, kw_only=True)
class LowRank(Peer):
    """Truncated singular value decompositions with bf16 factors; triples go where they take most error for a byte."""

    whole_dial = True

    def dials(self, pair: Pair) -> tuple[float, float]:
        return 1, sum(pair.factors(name).singular.numel() for name in pair.compressed(self.scope))

    def dial_words(self, pair: Pair, dial: float) -> str:
        return f"mean rank {dial / len(pair.compressed(self.scope)):.3g}"

    def encode(self, pair: Pair, dial: float) -> Tensors:
        stored: Tensors = {}
        for name, rank in self._ranks(pair, int(dial)).items():
            factors = pair.factors(name)
            left, right = factors.left[:, :rank].contiguous(), factors.right[:rank].contiguous()
            stored |= {f"{name}.left": left.bfloat16(), f"{name}.right": right.bfloat16()}
        return stored

    def delta(self, pair: Pair, stored: Stored, name: str) -> torch.Tensor:
        if f"{name}.left" not in stored:
            return torch.zeros(matrix_shape(pair, name))
        return stored[f"{name}.left"].float() @ stored[f"{name}.right"].float()

    def _ranks(self, pair: Pair, triples: int) -> dict[str, int]:
        names = pair.compressed(self.scope)
        gains = [pair.factors(name).gain for name in names]
        owners = torch.arange(len(names)).repeat_interleave(torch.tensor([gain.numel() for gain in gains]))
        best = torch.cat(gains).argsort(descending=True, stable=True)[:triples]
        counts = torch.bincount(owners[best], minlength=len(names))
        return {name: rank for name, rank in zip(names, counts.tolist(), strict=True) if rank}


@dataclass(frozen=True, kw_only=True)
class Lossless(Peer):
    """The bits of the variant XOR those of the base after zstandard, with or without a plane for each byte."""

    scope: Scope = EVERYTHING
    split: bool

    def encode(self, pair: Pair, dial: float) -> Tensors:
        stored: Tensors = {}
        for name in pair.compressed(self.scope):
            mixed = _octets(pair.base.tensor(name)) ^ _octets(pair.variant.tensor(name))
            stored[f"{name}.mixed"] = squeeze((mixed.T if self.split else mixed).tobytes())
        return stored

    def weight(self, pair: Pair, stored: Stored, name: str) -> torch.Tensor:
        base = pair.base.tensor(name)
        octets = _octets(base)
        mixed = np.frombuffer(unsqueeze(stored[f"{name}.mixed"]), dtype=np.uint8)
        mixed = mixed.reshape(octets.shape[::-1]).T if self.split else mixed.reshape(octets.shape)
        raw = np.ascontiguousarray(octets ^ mixed)
        return torch.from_numpy(raw).view(-1).view(base.dtype).view(base.shape).float()


def matrix_shape(pair: Pair, name: str) -> tuple[int, int]:
    """Of a tensor as a matrix; the base's shape is the variant's."""
    tensor = pair.base.tensor(name)
    return tensor.numel() // tensor.shape[-1], tensor.shape[-1]


def random_mask(shape: tuple[int, ...], share: float, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def largest(delta: torch.Tensor, share: float) -> torch.Tensor:
    """The ``share`` of entries that are farthest from zero, exactly as many."""
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.abs().view(-1).topk(max(1, round(share * delta.numel())), sorted=False).indices] = True
    return mask.view(delta.shape)


def _octets(tensor: torch.Tensor) -> np.ndarray:
    """``[elements, bytes of one]``."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().reshape(-1, tensor.element_size())


def of_scope(scope: Scope) -> list[Peer]:
    """The peers that can compress this scope."""
    return [
        OneBit(label="naive 1 bit", scope=scope),
        Sparse(label="DARE, fp16", scope=scope, random=True, bits=16),
        Sparse(label="DARE, 4 bits", scope=scope, random=True, bits=4),
        Sparse(label="DARE, 4 bits, seeded mask", scope=scope, random=True, bits=4, seeded=True),
        Sparse(label="magnitude pruning, fp16", scope=scope, random=False, bits=16),
        Sparse(label="magnitude pruning, 4 bits", scope=scope, random=False, bits=4),
        LowRank(label="SVD, bf16", scope=scope),
    ]


def baselines() -> list[Peer]:
    """All but the adapter, which has a file of its own."""
    lossless: list[Peer] = [
        Lossless(label="XOR, zstd -3 (lossless)", split=False),
        Lossless(label="XOR, byte split, zstd -3 (lossless)", split=True),
    ]
    return [*of_scope(BLOCKS), *of_scope(MATRICES), *lossless]
