"""One group of matrices that read the same input, quantized together: their rows do not know each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression_worker.contracts import Json
from compression_worker.making.table import six_digits
from compression_worker.methods.gptq.config import GPTQConfig
from compression_worker.methods.gptq.grid import GridRounding, Grids, GridSettings, fitted
from compression_worker.quantization.rounding import factor, ldlq, proxy_loss


@dataclass(frozen=True)
class Quantized:
    """``codes (K, N)`` uint8 and ``grids`` of a stack of matrices; ``values (K, N)`` is what they stand for."""

    codes: torch.Tensor
    grids: Grids
    values: torch.Tensor
    damping: float


def quantize(weight: torch.Tensor, hessian: torch.Tensor, config: GPTQConfig, group_size: int) -> Quantized:
    """Round ``weight (K, N)`` under ``hessian (K, K)``, largest inputs first if the settings say so."""
    order = torch.arange(len(weight), device=weight.device)
    if config.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    found = factor(hessian[order][:, order], damping=config.damping)
    weight = weight.clone()
    weight[order[found.dead]] = 0
    settings = GridSettings(
        bits=config.num_bits,
        symmetric=config.symmetric,
        clip=config.clip,
        least_zero=int(config.checkpoint_format == "gptq"),
    )
    grids = fitted(weight, group_size, settings, hessian.diagonal())
    rounded = ldlq(weight[order], found, GridRounding(grids, order), passes=config.passes)
    codes, values = torch.empty_like(rounded.codes), torch.empty_like(rounded.values)
    codes[order], values[order] = rounded.codes, rounded.values
    return Quantized(codes, grids, values, found.damping if found.upper is not None else 0.0)


def report(weight: torch.Tensor, made: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, most: int) -> Json:
    """Figures of one matrix ``(K, N)``: losses relative to the weight, and the share of codes at either end."""
    off = float((weight - made).square().sum(dtype=torch.float64))
    clipped = float(((codes == 0) | (codes == most)).to(torch.float32).mean())
    return {
        "proxy_loss": six_digits(proxy_loss(weight, made, hessian)),
        "relative_error": six_digits((off / max(float(weight.square().sum(dtype=torch.float64)), 1e-30)) ** 0.5),
        "at_ends": six_digits(clipped),
    }
