"""What a binary product is made of, checked and brought to one form, and which delta each token takes.

Shapes: M tokens, N outputs, K inputs, T resident deltas of ``masks`` stacked sign matrices. Signs lie as
``kernels.packing`` packs them. Scales have one form for every kind: ``scale[t, mask, n, k // group_size]``, where the
axis of outputs and that of inputs may have length 1:

    tensor  (T, masks, 1, 1)          row     (T, masks, N, 1)
    column  (T, masks, 1, K), group_size 1
    group   (T, masks, N, ceil(K / group_size))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.packing import words_for


@dataclass(frozen=True)
class Segments:
    """Tokens grouped by delta, made once for a batch and used by each of its matrices; nothing waits for the device.

    ``order (M,)`` int32 is the token of each line, ``ids (M,)`` int32 its delta, ascending, -1 (the base alone) first;
    ``starts (T + 1,)`` int32 is the first line of each delta, and of what no delta claims.
    """

    order: torch.Tensor
    ids: torch.Tensor
    starts: torch.Tensor


def segments_of(delta_of: torch.Tensor, deltas: int) -> Segments:
    """``delta_of (M,)``: the delta of each token, -1 for the base alone, any order, any repeats; ``deltas`` is T.

    On a CPU an id that is not resident is refused. On a GPU looking would stall the stream: there the outputs of such a
    token are NaN, so that it can never be answered by another's delta.
    """
    if delta_of.dim() != 1 or delta_of.is_floating_point():
        raise ValueError(f"a map is one whole number a token, not {tuple(delta_of.shape)} {delta_of.dtype}")
    if delta_of.device.type == "cpu" and len(delta_of):
        lowest, highest = int(delta_of.min()), int(delta_of.max())
        if lowest < -1 or highest >= deltas:
            raise ValueError(f"the map names deltas {lowest} .. {highest}; {deltas} are resident, and -1 is the base")
    ids, order = torch.sort(delta_of.to(torch.int32), stable=True)
    bounds = torch.arange(deltas + 1, dtype=torch.int32, device=ids.device)
    return Segments(order.to(torch.int32), ids, torch.searchsorted(ids, bounds, out_int32=True))


@dataclass(frozen=True)
class Operands:
    """Checked operands: packed ``(T, masks, ceil(K/32), N)``, scale ``(T, masks, 1|N, 1|ceil(K/group_size))`` fp32,
    weight ``(N, K)`` or None, bias ``(N,)`` or ``(T + 1, N)`` (a row for each delta, the last for the base) or None."""

    packed: torch.Tensor
    scale: torch.Tensor
    group_size: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    segments: Segments | None


def operands_of(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    segments: Segments | None = None,
    group_size: int | None = None,
) -> Operands:
    """Bring operands to the one form; packed may leave out T and masks, and scale the last two axes with them."""
    if x.dim() != 2:
        raise ValueError(f"x of shape {tuple(x.shape)} is no (tokens, inputs)")
    inputs = x.shape[1]
    if not 2 <= packed.dim() <= 4 or packed.shape[-2] != words_for(inputs):
        raise ValueError(
            f"words of shape {tuple(packed.shape)} hold no matrix of {inputs} inputs: it has {words_for(inputs)} lines"
        )
    whole = packed.reshape((1,) * (4 - packed.dim()) + tuple(packed.shape))
    scales = _scales(scale, packed, x)
    size = inputs if group_size is None else group_size
    if size < 1:
        raise ValueError(f"groups of {size} inputs cannot share a scale: 1 at least")
    deltas, masks, _, outputs = whole.shape
    rows, columns = scales.shape[2:]
    if scales.shape[:2] != (deltas, masks) or rows not in (1, outputs) or columns != -(-inputs // size):
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} do not fit {deltas} deltas of {masks} masks, {outputs} outputs and"
            f" {inputs} inputs in groups of {size}"
        )
    _check_base(x, whole, weight, bias)
    if segments is None and deltas != 1:
        raise ValueError(f"{deltas} deltas are resident: say by segments which one each token takes")
    if segments is not None and (len(segments.order) != len(x) or len(segments.starts) != deltas + 1):
        raise ValueError(
            f"segments of {len(segments.order)} tokens and {len(segments.starts) - 1} deltas do not fit {len(x)} tokens"
            f" and {deltas} deltas"
        )
    return Operands(whole, scales, size, weight, bias, segments)


def _scales(scale: torch.Tensor | float, packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    scales = torch.as_tensor(scale, dtype=accumulator, device=x.device)
    if packed.dim() == 2 and scales.numel() == 1:
        return scales.reshape(1, 1, 1, 1)
    if scales.dim() == packed.dim() - 2:
        scales = scales[..., None, None]
    if scales.dim() != packed.dim():
        raise ValueError(f"scales of {scales.dim()} axes do not fit words of {packed.dim()}")
    return scales.reshape((1,) * (4 - scales.dim()) + tuple(scales.shape))


def _check_base(x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    deltas, outputs = packed.shape[0], packed.shape[3]
    if weight is not None:
        if tuple(weight.shape) != (outputs, x.shape[1]) or weight.dtype != x.dtype:
            raise ValueError(
                f"a base of {tuple(weight.shape)} {weight.dtype} does not fit {(outputs, x.shape[1])} {x.dtype}"
            )
        if weight.requires_grad:
            raise ValueError("the base is frozen: it gets no gradient here, so it must not ask for one")
    if bias is not None:
        if tuple(bias.shape) not in ((outputs,), (deltas + 1, outputs)):
            raise ValueError(f"a bias of {tuple(bias.shape)} is neither {(outputs,)} nor {(deltas + 1, outputs)}")
        if bias.requires_grad and bias.dim() == 2:
            raise ValueError("a bias for each delta gets no gradient here, so it must not ask for one")
