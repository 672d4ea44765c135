"""Some entries of a matrix as tensors for a file, and back: where they are, and what they are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import zstandard

GROUP = 256
"""Survivors that share one 4-bit grid: 32 bits of grid for 1,024 bits of codes."""
LEVELS = 15
COLUMNS = 1 << 16
ZSTD_LEVEL = 3
POSITIONS = ("bitmap", "packed_bitmap", "columns", "row_counts")
"""What says where; papers that speak of nominal ratios leave these out."""

Tensors = dict[str, torch.Tensor]


def squeeze(raw: bytes) -> torch.Tensor:
    """``raw`` after zstandard, as a tensor of bytes."""
    return torch.frombuffer(bytearray(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(raw)), dtype=torch.uint8)


def unsqueeze(tensor: torch.Tensor) -> bytes:
    return zstandard.ZstdDecompressor().decompress(tensor.numpy().tobytes())


def pack_positions(mask: torch.Tensor) -> Tensors:
    """A bool matrix as a bitmap, a bitmap after zstandard, or 16-bit columns with row counts: the smallest of them."""
    bitmap = np.packbits(mask.numpy(), axis=None)
    forms: list[Tensors] = [{"bitmap": torch.from_numpy(bitmap)}, {"packed_bitmap": squeeze(bitmap.tobytes())}]
    if mask.shape[1] <= COLUMNS:
        columns = mask.nonzero()[:, 1].numpy().astype(np.uint16).view(np.int16)
        counts = mask.sum(dim=1).to(torch.int32)
        forms.append({"columns": torch.from_numpy(columns), "row_counts": counts})
    return min(forms, key=lambda form: sum(tensor.numel() * tensor.element_size() for tensor in form.values()))


def unpack_positions(stored: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The bool matrix that :func:`pack_positions` was given."""
    if "columns" in stored:
        mask = torch.zeros(shape, dtype=torch.bool)
        rows = torch.arange(shape[0]).repeat_interleave(stored["row_counts"].long())
        columns = torch.from_numpy(stored["columns"].numpy().view(np.uint16).astype(np.int64))
        mask[rows, columns] = True
        return mask
    raw = unsqueeze(stored["packed_bitmap"]) if "packed_bitmap" in stored else stored["bitmap"].numpy().tobytes()
    flat = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=shape[0] * shape[1])
    return torch.from_numpy(flat.view(np.bool_)).view(shape)


def pack_values(values: torch.Tensor, bits: int) -> Tensors:
    """Survivors in scan order: 16 bits each, or 4 bits on a grid from least to greatest of each :data:`GROUP`."""
    if bits == 16:
        return {"values": values.half()}
    groups = grouped(values)
    low = groups.amin(dim=1).half()
    step = ((groups.amax(dim=1) - low.float()) / LEVELS).half()
    divisor = step.float().where(step > 0, 1.0)
    codes = ((groups - low.float()[:, None]) / divisor[:, None]).round().clamp(0, LEVELS).to(torch.uint8)
    codes = codes.view(-1)[: values.numel() + values.numel() % 2]
    return {"codes": codes[0::2] | codes[1::2] << 4, "grid": torch.stack([low, step], dim=1)}


def unpack_values(stored: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """``count`` survivors in fp32."""
    if "values" in stored:
        return stored["values"].float()
    pairs = stored["codes"]
    codes = torch.stack([pairs & LEVELS, pairs >> 4], dim=1).view(-1)[:count].float()
    low, step = stored["grid"].float().repeat_interleave(GROUP, dim=0)[:count].unbind(dim=1)
    return low + step * codes


def grouped(values: torch.Tensor) -> torch.Tensor:
    """``[groups, GROUP]``; the last group is filled up with its own last value, which widens no grid."""
    missing = -values.numel() % GROUP
    filler = values[-1:].expand(missing) if missing else values[:0]
    return torch.cat([values, filler]).view(-1, GROUP)
