"""Signs into 32-bit words and back.

A weight matrix ``(N, K)`` (N outputs, K inputs) is packed along K on its transpose: word ``packed[r, n]`` (int32) holds
inputs ``32r .. 32r+31`` of output ``n``; bit ``j``, counted from the least significant, is 1 where the sign is +1. The
shape is ``(ceil(K / 32), N)``. Bits past the true K are zero; the caller keeps K, and readers mask the tail.
"""

from __future__ import annotations

import numpy as np
import torch

WORD_BITS = 32


def words_for(inputs: int) -> int:
    """How many words hold ``inputs`` bits: ``ceil(inputs / 32)``."""
    return -(-inputs // WORD_BITS)


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """``bits (N, K)`` bool -> ``packed (ceil(K/32), N)`` int32. True means +1."""
    rows, inputs = bits.shape
    words = np.zeros((rows, words_for(inputs)), dtype="<i4")
    octets = np.packbits(bits.cpu().numpy(), axis=1, bitorder="little")
    words.view(np.uint8)[:, : octets.shape[1]] = octets
    return torch.from_numpy(np.ascontiguousarray(words.T.astype(np.int32, copy=False))).to(bits.device)


def unpack_bits(packed: torch.Tensor, inputs: int) -> torch.Tensor:
    """``packed (ceil(K/32), N)`` int32 -> bool ``(N, K)`` with K = ``inputs``."""
    words, rows = packed.shape
    if words != words_for(inputs):
        raise ValueError(f"{words} words hold no matrix of {inputs} inputs: {words_for(inputs)} are needed")
    octets = np.ascontiguousarray(packed.cpu().numpy().T).astype("<i4", copy=False).view(np.uint8)
    bits = np.unpackbits(octets.reshape(rows, words * 4), axis=1, count=inputs, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).to(packed.device)


def unpack_signs(packed: torch.Tensor, inputs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``packed (ceil(K/32), N)`` -> signs ``(N, K)`` in {-1, +1} of ``dtype``."""
    return unpack_bits(packed, inputs).to(dtype).mul_(2).sub_(1)
