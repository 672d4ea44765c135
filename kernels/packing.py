"""Signs into 32-bit words and back, and codes of 1 to 8 bits into bytes or words.

A weight matrix ``(N, K)`` (N outputs, K inputs) is packed along K on its transpose: word ``packed[r, n]`` (int32) holds
inputs ``32r .. 32r+31`` of output ``n``; bit ``j``, counted from the least significant, is 1 where the sign is +1. The
shape is ``(ceil(K / 32), N)``. Bits past the true K are zero; the caller keeps K, and readers mask the tail.

Codes are a stream of bits without gaps, least significant first: whole for a file, a stream for each row (N of them,
each ended by its word) for a kernel, which must find the codes of row n without those before it.
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


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``codes (n,)`` of 0 .. 2^bits - 1 -> one stream ``(ceil(n * bits / 8),)`` uint8, the form on disk.

    Code ``i`` takes the bits ``i * bits .. (i + 1) * bits - 1`` of the stream, least significant first; the bits past
    the last code are zero.
    """
    if codes.dim() != 1:
        raise ValueError(f"codes of shape {tuple(codes.shape)} make no stream: one dimension is needed")
    octets = _packed_rows(codes.unsqueeze(0), bits)
    return torch.from_numpy(octets[0, : -(-len(codes) * bits // 8)].copy()).to(codes.device)


def unpack_codes(packed: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """A stream of :func:`pack_codes` -> ``codes (count,)`` uint8."""
    _check_bits(bits)
    wanted = -(-count * bits // 8)
    if packed.dim() != 1 or packed.dtype != torch.uint8 or len(packed) != wanted:
        raise ValueError(
            f"a stream of {count} codes of {bits} bits is {wanted} bytes long, not {tuple(packed.shape)} {packed.dtype}"
        )
    return torch.from_numpy(_unpacked_rows(packed.cpu().numpy()[None], count, bits)[0]).to(packed.device)


def code_words(count: int, bits: int) -> int:
    """How many 32-bit words hold a row of ``count`` codes: ``ceil(count * bits / 32)``."""
    return -(-count * bits // WORD_BITS)


def pack_code_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``codes (N, n)`` -> ``words (N, ceil(n * bits / 32))`` int32: a stream for each row, as kernels read it."""
    if codes.dim() != 2:
        raise ValueError(f"codes of shape {tuple(codes.shape)} are no rows: two dimensions are needed")
    octets, wanted = _packed_rows(codes, bits), 4 * code_words(codes.shape[1], bits)
    whole = np.zeros((len(octets), wanted), dtype=np.uint8)
    # Eight codes are packed at a time, so there may be more bytes than are wanted: zeros.
    whole[:, : octets.shape[1]] = octets[:, :wanted]
    return torch.from_numpy(whole.view("<i4").astype(np.int32, copy=False)).to(codes.device)


def unpack_code_rows(words: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """``words (N, ceil(count * bits / 32))`` int32 -> ``codes (N, count)`` uint8."""
    _check_bits(bits)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != code_words(count, bits):
        raise ValueError(
            f"a row of {count} codes of {bits} bits is {code_words(count, bits)} words of int32 long,"
            f" not {tuple(words.shape)} {words.dtype}"
        )
    octets = np.ascontiguousarray(words.cpu().numpy()).astype("<i4", copy=False).view(np.uint8)
    return torch.from_numpy(_unpacked_rows(octets, count, bits)).to(words.device)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed: 1 to 8 bits can")


def _packed_rows(codes: torch.Tensor, bits: int) -> np.ndarray:
    """``(N, n)`` -> octets ``(N, ceil(n / 8) * bits)``: eight codes of k bits fill k bytes, through one 64-bit word."""
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes are whole numbers, not {codes.dtype}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(
            f"codes of {bits} bits lie in 0 .. {(1 << bits) - 1}; these lie in {int(codes.min())} .. {int(codes.max())}"
        )
    rows, count = codes.shape
    blocks = -(-count // 8)
    eights = np.zeros((rows, blocks, 8), dtype=np.uint8)
    eights.reshape(rows, blocks * 8)[:, :count] = codes.cpu().numpy()
    word = np.zeros((rows, blocks), dtype="<u8")
    for place in range(8):
        word |= eights[:, :, place].astype("<u8") << np.uint64(place * bits)
    octets = word.view(np.uint8).reshape(rows, blocks, 8)[:, :, :bits]
    return np.ascontiguousarray(octets).reshape(rows, blocks * bits)


def _unpacked_rows(octets: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Octets ``(N, any)`` that hold the codes -> ``(N, count)`` uint8."""
    rows, blocks = len(octets), -(-count // 8)
    filled = np.zeros((rows, blocks * bits), dtype=np.uint8)
    used = min(octets.shape[1], filled.shape[1])
    filled[:, :used] = octets[:, :used]
    word = np.zeros((rows, blocks, 8), dtype=np.uint8)
    word[:, :, :bits] = filled.reshape(rows, blocks, bits)
    wide, codes = word.view("<u8")[:, :, 0], np.empty((rows, blocks, 8), dtype=np.uint8)
    for place in range(8):
        codes[:, :, place] = (wide >> np.uint64(place * bits)) & np.uint64((1 << bits) - 1)
    return np.ascontiguousarray(codes.reshape(rows, blocks * 8)[:, :count])
