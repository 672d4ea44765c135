"""Codes of 2, 3, 4 or 8 bits into 32-bit words and back, in the layout of GPTQ checkpoints (format ``gptq_v2``).

K inputs, N outputs, G groups of inputs, b bits:

    qweight  int32 (K b / 32, N)   codes of each output, packed along the inputs
    qzeros   int32 (G, N b / 32)   the zero point of each group and output, packed along the outputs
    scales   fp16  (G, N)
    g_idx    int32 (K,)            the group of each input

32 codes fill b words, as one stream of bits, the least significant first; with 3 bits, code 10 and code 21 of 32
straddle two words. ``W_hat[n, k] = scales[g, n] * (code[k, n] - zero[g, n])`` with ``g = g_idx[k]``. (Format v1 stores
zeros less one; it is not read here.) GPTQ, arXiv 2210.17323; the format is that of AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

import torch

BITS = (2, 3, 4, 8)
BLOCK = 32
"""Codes that fill whole words, for any number of bits."""


def pack_gptq(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``codes (K, N)`` of 0 .. 2^bits - 1 -> qweight ``(K bits / 32, N)`` int32, packed along K.

    ValueError where K is no multiple of 32, or a code does not fit.
    """
    _check(codes, bits, "inputs")
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"codes are whole numbers, not {codes.dtype}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ValueError(
            f"codes of {bits} bits lie in 0 .. {(1 << bits) - 1}; these lie in {int(codes.min())} .. {int(codes.max())}"
        )
    count, width = _unit(bits)
    blocks = codes.reshape(-1, count, codes.shape[1])
    words = torch.zeros((len(blocks), width, codes.shape[1]), dtype=torch.int64, device=codes.device)
    for place in range(count):
        word, shift = divmod(place * bits, 32)
        wide = blocks[:, place].to(torch.int64) << shift
        words[:, word] |= wide & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= wide >> 32
    # Words from 2^31 on become negative numbers of the same bits.
    return words.to(torch.int32).reshape(-1, codes.shape[1])


def unpack_gptq(qweight: torch.Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """qweight ``(K bits / 32, N)`` int32 -> ``codes (K, N)`` of ``dtype``. Any whole blocks can be opened."""
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits have no such layout: {', '.join(map(str, BITS))} bits have")
    if qweight.dim() != 2 or qweight.dtype != torch.int32 or len(qweight) % bits:
        raise ValueError(f"words of shape {tuple(qweight.shape)} {qweight.dtype} hold no blocks of 32 codes")
    (count, width), outputs = _unit(bits), qweight.shape[1]
    words = qweight.reshape(-1, width, outputs)
    codes = torch.empty((len(words), count, outputs), dtype=dtype, device=qweight.device)
    for place in range(count):
        word, shift = divmod(place * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            low = 32 - shift
            code = (code & ((1 << low) - 1)) | (words[:, word + 1] << low)
        codes[:, place] = code & ((1 << bits) - 1)
    return codes.reshape(-1, outputs)


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """``zeros (G, N)`` -> qzeros ``(G, N bits / 32)`` int32. ValueError where N is no multiple of 32."""
    _check(zeros.T if zeros.dim() == 2 else zeros, bits, "outputs")
    return pack_gptq(zeros.T, bits).T.contiguous()


def unpack_zeros(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """qzeros ``(G, N bits / 32)`` int32 -> ``zeros (G, N)`` uint8."""
    return unpack_gptq(qzeros.T, bits).T.contiguous()


def _unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole words, and the words."""
    return (BLOCK, bits) if bits == 3 else (BLOCK // bits, 1)


def _check(codes: torch.Tensor, bits: int, axis: str) -> None:
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits have no such layout: {', '.join(map(str, BITS))} bits have")
    if codes.dim() != 2:
        raise ValueError(f"codes of shape {tuple(codes.shape)} are no matrix")
    if len(codes) % BLOCK:
        raise ValueError(
            f"{len(codes)} {axis} cannot be packed: this layout takes 32 at a time; pad the matrix or keep it whole"
        )
