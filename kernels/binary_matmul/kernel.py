"""The binary product in Triton: base, deltas of any tenants, scales and bias in one kernel; words are read once.

Lines are tokens sorted by delta (``Segments``). Each program makes a ``(BLOCK_M, BLOCK_N)`` tile of y: first the
base's product for all its lines, then one product for each delta that occurs among them, in which the lines of others
are zero, so that a line's sum is made of its own numbers alone. A step over K reads ``BLOCK_K / 32`` lines of words and
opens them into +-1 in registers; the tail of K is masked on x, so that the zero bits after it (which would read as -1)
add nothing. Sums are fp32. Scales of a tensor or row are applied after the sum, those of groups of whole steps after
each step, and finer ones on the signs, then in fp32 (TF32 on tensor cores: three bits finer than bf16, in its range).

K is cut into spans of ``SPAN`` that are summed apart and then added in order. For few tokens each span has a program of
its own and a second kernel adds them (split-K without atomics), for many one program does all: the same bits. Grids
depend on shapes alone and lengths are read on the device, so a call can be captured in a CUDA graph. Tiles depend on a
bucket of M and nothing is tuned at run time; with ``invariant`` they do not even depend on that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.binary_matmul.gradients import scale_gradient, x_gradient
from kernels.binary_matmul.operands import Operands, Segments, operands_of
from kernels.binary_matmul.signs import minus_ones, open_pairs, pair_order, pair_up, segment_of
from kernels.precision import check_dtype, dot_precision, upcast

SPAN = 1024
"""Inputs summed together, a multiple of any step: 4 programs along a K of 4096 make its 32 tiles of N enough."""
FEW_TOKENS = 64
"""Up to here the spans are spread over programs; above, the tiles of M are enough of them."""
STEP = 64
"""Inputs of the smallest step over K."""
AT_THE_END, EACH_STEP, ON_SIGNS = 0, 1, 2


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, scale_ptr, weight_ptr, bias_ptr, order_ptr, ids_ptr, out_ptr,
    M, N, K, words, deltas, group_size, ones,
    stride_xm, stride_xk, stride_pm, stride_pr, stride_pn, stride_sm, stride_sn, stride_sc,
    stride_wn, stride_wk, stride_b,
    MASKS: tl.constexpr, FUSED: tl.constexpr, BIASED: tl.constexpr, MAPPED: tl.constexpr, SCALED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, SPAN: tl.constexpr, SPREAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, delta_of = segment_of(line, order_ptr, ids_ptr, M, MAPPED)
    # 64-bit offsets: M * K and N * K pass 2^31 elements on long batches and wide layers.
    row = row.to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < N
    inner = tl.arange(0, BLOCK_K)
    paired = pair_order(BLOCK_K)
    word_line = tl.arange(0, BLOCK_K // 32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if SPREAD:
        first, last = tl.program_id(2) * SPAN, tl.minimum(K, (tl.program_id(2) + 1) * SPAN)
    else:
        first, last = 0, K
    for span in range(first, last, SPAN):
        stop = tl.minimum(K, span + SPAN)
        part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if FUSED:
            for start in range(span, stop, BLOCK_K):
                index = start + inner
                is_index = index < K
                x = tl.load(
                    x_ptr + row[:, None] * stride_xm + index[None, :] * stride_xk,
                    mask=(line < M)[:, None] & is_index[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight_ptr + columns.to(tl.int64)[None, :] * stride_wn + index[:, None] * stride_wk,
                    mask=is_index[:, None] & is_column[None, :],
                    other=0.0,
                )
                if UPCAST:
                    part += tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
                else:
                    part += tl.dot(x, w)
        delta = tl.min(tl.where(delta_of >= 0, delta_of, deltas))
        while delta < deltas:
            own = delta_of == delta
            for mask in range(MASKS):
                matrix = (delta * MASKS + mask).to(tl.int64)
                scale_at = scale_ptr + matrix * stride_sm + columns * stride_sn
                signed = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for start in range(span, stop, BLOCK_K):
                    index = start + inner
                    x = tl.load(
                        x_ptr + row[:, None] * stride_xm + index[None, :] * stride_xk,
                        mask=own[:, None] & (index < K)[None, :],
                        other=0.0,
                    )
                    x = pair_up(x, BLOCK_M, BLOCK_K)
                    at = start // 32 + word_line
                    word = tl.load(
                        packed_ptr + matrix * stride_pm + at[None, :] * stride_pr + columns[:, None] * stride_pn,
                        mask=(at < words)[None, :] & is_column[:, None],
                        other=0,
                    )
                    if SCALED == 2:
                        index = start + paired
                        scale = tl.load(
                            scale_at[:, None] + (index // group_size)[None, :] * stride_sc,
                            mask=is_column[:, None] & (index < K)[None, :],
                            other=0.0,
                        )
                        weight = open_pairs(word, ones, tl.float32, BLOCK_N, BLOCK_K) * scale
                        signed += tl.dot(x.to(tl.float32), tl.trans(weight), input_precision=PRECISION)
                    else:
                        if UPCAST:
                            sign = open_pairs(word, ones, tl.float32, BLOCK_N, BLOCK_K)
                            product = tl.dot(x.to(tl.float32), tl.trans(sign), input_precision="ieee")
                        else:
                            product = tl.dot(x, tl.trans(open_pairs(word, ones, x.dtype, BLOCK_N, BLOCK_K)))
                        if SCALED == 1:
                            scale = tl.load(scale_at + (start // group_size) * stride_sc, mask=is_column, other=0.0)
                            signed += product * scale[None, :]
                        else:
                            signed += product
                if SCALED == 0:
                    signed = signed * tl.load(scale_at, mask=is_column, other=0.0)[None, :]
                part += signed
            delta = tl.min(tl.where(delta_of > delta, delta_of, deltas))
        total += part
    # A delta that is not resident must never be answered by another's.
    total = tl.where(((delta_of >= -1) & (delta_of < deltas))[:, None], total, float("nan"))
    if SPREAD:
        row += tl.program_id(2).to(tl.int64) * M
    elif BIASED:
        bias_row = tl.where(delta_of < 0, deltas, delta_of)
        total += tl.load(
            bias_ptr + bias_row[:, None] * stride_b + columns[None, :],
            mask=((line < M) & (bias_row <= deltas))[:, None] & is_column[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * N + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(line < M)[:, None] & is_column[None, :],
    )


@triton.jit
def _add_spans_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, bias_ptr, order_ptr, ids_ptr, y_ptr, M, N, deltas, spans, stride_b,
    BIASED: tl.constexpr, MAPPED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    row, delta_of = segment_of(line, order_ptr, ids_ptr, M, MAPPED)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64) * N + columns
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for span in range(0, spans):
        total += tl.load(parts_ptr + tl.cast(span, tl.int64) * M * N + at, mask=columns < N, other=0.0)
    if BIASED:
        bias_row = tl.where(delta_of < 0, deltas, delta_of)
        is_bias = (columns < N) & (bias_row <= deltas)
        total += tl.load(bias_ptr + bias_row * stride_b + columns, mask=is_bias, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=columns < N)


class _BinaryMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, operands: Operands, invariant: bool
    ) -> torch.Tensor:
        del scale, bias
        ctx.save_for_backward(x)
        ctx.operands = operands
        return _forward(x, operands, invariant)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), (x,) = gradients, ctx.saved_tensors
        wants_x, wants_scale, wants_bias = ctx.needs_input_grad[:3]
        dx = x_gradient(dy, x, ctx.operands) if wants_x else None
        dscale = scale_gradient(dy, x, ctx.operands) if wants_scale else None
        dbias = dy.sum(dim=0, dtype=torch.float32).to(ctx.operands.bias.dtype) if wants_bias else None
        return dx, dscale, dbias, None, None


def _forward(x: torch.Tensor, operands: Operands, invariant: bool) -> torch.Tensor:
    (tokens, inputs), outputs = x.shape, operands.packed.shape[3]
    y = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    deltas, masks, words, _ = operands.packed.shape
    weight, bias, segments = operands.weight, operands.bias, operands.segments
    order, ids = (segments.order, segments.ids) if segments else (operands.packed, operands.packed)
    scaled = _scaled(operands)
    block_m, block_n, block_k, warps = _tile(
        few=invariant or tokens <= 16,
        wide=upcast(x.dtype) or scaled == ON_SIGNS,
        step=operands.group_size if scaled == EACH_STEP else 0,
    )
    spans = triton.cdiv(inputs, SPAN)
    spread = spans > 1 and tokens <= FEW_TOKENS
    out = torch.empty((spans, tokens, outputs), dtype=torch.float32, device=x.device) if spread else y
    stride_w = (0, 0) if weight is None else weight.stride()
    stride_b = bias.stride(0) if bias is not None and bias.dim() == 2 else 0
    grid = (triton.cdiv(tokens, block_m), triton.cdiv(outputs, block_n), spans if spread else 1)
    _forward_kernel[grid](
        x, operands.packed, operands.scale, x if weight is None else weight, x if bias is None else bias,
        order, ids, out,
        tokens, outputs, inputs, words, deltas, operands.group_size, minus_ones(x.dtype),
        *x.stride(), *operands.packed.stride()[1:], *_scale_strides(operands.scale), *stride_w, stride_b,
        MASKS=masks, FUSED=weight is not None, BIASED=bias is not None, MAPPED=segments is not None,
        SCALED=scaled, UPCAST=upcast(x.dtype), PRECISION=dot_precision(x.dtype), SPAN=SPAN, SPREAD=spread,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    if spread:
        _add_spans_kernel[(tokens, triton.cdiv(outputs, 1024))](
            out, x if bias is None else bias, order, ids, y, tokens, outputs, deltas, spans, stride_b,
            BIASED=bias is not None, MAPPED=segments is not None, BLOCK_N=1024,
        )  # fmt: skip
    return y


def _tile(*, few: bool, wide: bool, step: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K and warps. ``wide`` products are of fp32 tiles, which registers must hold; a step over
    K lies inside a group of ``step`` inputs that share a scale, where there are such."""
    if wide:
        return (16, 64, STEP, 4) if few else (32, 64, STEP, 8)
    if not few:
        return 64, 128, STEP, 8
    return 16, 128, 2 * STEP if step % (2 * STEP) == 0 else STEP, 4


def _scale_strides(scale: torch.Tensor) -> tuple[int, int, int]:
    """Of a matrix, an output and a group: 0 along an axis of length 1, which all of them share."""
    return scale.stride(1), *(0 if scale.shape[axis] == 1 else scale.stride(axis) for axis in (2, 3))


def _scaled(operands: Operands) -> int:
    """Where the scale is applied."""
    if operands.scale.shape[3] == 1:
        return AT_THE_END
    return EACH_STEP if operands.group_size % STEP == 0 else ON_SIGNS


def binary_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    segments: Segments | None = None,
    group_size: int | None = None,
    invariant: bool | None = None,
) -> torch.Tensor:
    """x ``(M, K)`` -> ``(M, N)`` in x's dtype; differentiable in x, scale and bias. Shapes as in ``operands``.

    ``invariant`` True makes a token's result independent, bit for bit, of how many others stand in the batch, for
    which long prompts pay (one small tile for any M); None means True where there are segments, else False. Under
    capture the scale must lie on the device already, in fp32: a number would be copied there.
    """
    check_dtype(x.dtype)
    operands = operands_of(
        x, packed.contiguous(), scale, weight=weight, bias=bias, segments=segments, group_size=group_size
    )
    operands = replace(operands, scale=operands.scale.contiguous())
    steady = segments is not None if invariant is None else invariant
    y: torch.Tensor = _BinaryMatmul.apply(x, operands.scale, bias, operands, steady)
    return y
