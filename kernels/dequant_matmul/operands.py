"""A matrix packed on a group grid, checked once when it is loaded, and what its product may be multiplied with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.dequant_matmul.layout import BITS, BLOCK


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``(N, K)`` in the layout of ``kernels.dequant_matmul.layout``, frozen.

    ``group_size`` is the length of its groups where input k lies in group ``k // group_size`` (the last may be
    shorter), and None where ``g_idx`` puts inputs in any other order. Made by :func:`packed_weight`.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bits: int
    group_size: int | None

    @property
    def inputs(self) -> int:
        return len(self.g_idx)

    @property
    def outputs(self) -> int:
        return self.scales.shape[1]


def packed_weight(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> PackedWeight:
    """Check the four tensors of a matrix and find whether its groups lie in order.

    Looks at the numbers of ``g_idx``, for which a GPU is waited: once a matrix, not in its product. ValueError where
    shapes, dtypes or groups do not fit, K or N is no multiple of 32, or a tensor asks for a gradient.
    """
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits have no such layout: {', '.join(map(str, BITS))} bits have")
    if scales.dim() != 2 or g_idx.dim() != 1 or not scales.is_floating_point() or g_idx.dtype != torch.int32:
        raise ValueError(
            f"scales {tuple(scales.shape)} {scales.dtype} and g_idx {tuple(g_idx.shape)} {g_idx.dtype} are not (groups,"
            " outputs) and (inputs,) int32"
        )
    (groups, outputs), inputs = scales.shape, len(g_idx)
    if not inputs or inputs % BLOCK or outputs % BLOCK:
        raise ValueError(
            f"a matrix of {outputs} outputs and {inputs} inputs is not packed in this layout: both are multiples of 32"
        )
    for name, tensor, shape in (
        ("qweight", qweight, (inputs * bits // 32, outputs)),
        ("qzeros", qzeros, (groups, outputs * bits // 32)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} of {bits} bits for {outputs} outputs, {inputs} inputs and {groups} groups is {shape} int32,"
                f" not {tuple(tensor.shape)} {tensor.dtype}"
            )
    if scales.requires_grad:
        raise ValueError("the packed weight is frozen: its scales get no gradient here, so they must not ask for one")
    return PackedWeight(
        qweight.contiguous(),
        qzeros.contiguous(),
        scales.contiguous(),
        g_idx.contiguous(),
        bits,
        _in_order(g_idx, groups),
    )


def _in_order(g_idx: torch.Tensor, groups: int) -> int | None:
    """The group size where ``g_idx[k] = k // group_size``, else None."""
    known = g_idx.cpu()
    if int(known.min()) < 0 or int(known.max()) >= groups:
        raise ValueError(
            f"g_idx names groups {int(known.min())} .. {int(known.max())}; there are scales of {groups}, from 0 on"
        )
    size = int((known == 0).sum())
    if not size or -(-len(known) // size) != groups:
        return None
    return size if torch.equal(known, (torch.arange(len(known)) // size).to(known.dtype)) else None


def check_operand(x: torch.Tensor, width: int, of: str) -> None:
    """Refuse a matrix that does not fit a product over ``width`` ``of`` (inputs or outputs)."""
    if x.dim() == 0 or x.shape[-1] != width or not x.is_floating_point():
        raise ValueError(f"{tuple(x.shape)} {x.dtype} does not fit a packed weight of {width} {of}")
