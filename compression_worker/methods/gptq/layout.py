"""How GPTQ lies on disk: the checkpoint format of AutoGPTQ and GPTQModel, which transformers and vLLM load.

``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of each linear of block ``i`` are in ``codes-<i>.safetensors``
(:mod:`kernels.dequant_matmul.layout`). Format ``gptq_v2`` stores zeros as they are, ``gptq`` less one. A matrix whose
sides are no multiples of 32 is padded with zeros; it then is a layout of ours, which other runtimes do not read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch

from compression_worker.architecture import Linear
from compression_worker.contracts import CompressionError, Json
from compression_worker.making.table import codes_file, sides_of
from compression_worker.methods.gptq.config import GROUP_SIZES, PER_ROW, GPTQConfig
from compression_worker.tensors import ITEM_SIZES, Spec, raw_bytes
from kernels.dequant_matmul.layout import pack_gptq, pack_zeros

LAYOUT: Json = {"name": "gptq", "version": 1, "lowest_bit_first": True, "padded_to": 32}
PIECES = ("g_idx", "qweight", "qzeros", "scales")
SIDE = 32


def group_size_of(config: GPTQConfig, linears: Iterable[Linear]) -> int:
    """The group size as it is stored: -1 for whole rows. Refuses one that does not divide every matrix."""
    widths = sorted({linear.inputs for linear in linears})
    if config.group_size == PER_ROW:
        return PER_ROW
    if config.group_size is None:
        return next((size for size in GROUP_SIZES if all(width % size == 0 for width in widths)), PER_ROW)
    if odd := [width for width in widths if width % config.group_size]:
        common = math.gcd(*widths)
        fits = [size for size in (256, 128, 64, 32, 16, 8) if common % size == 0]
        raise CompressionError(
            "bad_setting",
            f"group_size is {config.group_size}, which does not divide the {odd[0]} inputs of a matrix: "
            + (f"{', '.join(map(str, fits))} do" if fits else "only whole rows (-1) do"),
        )
    return config.group_size


def specs(outputs: int, inputs: int, bits: int, groups: int) -> dict[str, Spec]:
    """The header of one linear's pieces."""
    outputs, inputs = padded(outputs), padded(inputs)
    return {
        "g_idx": Spec("I32", (inputs,)),
        "qweight": Spec("I32", (inputs * bits // 32, outputs)),
        "qzeros": Spec("I32", (groups, outputs * bits // 32)),
        "scales": Spec("F16", (groups, outputs)),
    }


def pieces(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, size: int, less: int) -> Json:
    """The tensors of one linear. ``codes (K, N)``, ``scales`` and ``zeros (G, N)``; ``less`` is taken off each zero."""
    inputs, outputs = codes.shape
    wide = torch.zeros((padded(inputs), padded(outputs)), dtype=torch.uint8)
    wide[:inputs, :outputs] = codes
    extra = (0, padded(outputs) - outputs)
    zeros = torch.nn.functional.pad(zeros.to(torch.int32) - less, extra)
    group = torch.arange(padded(inputs), dtype=torch.int32).clamp_(max=inputs - 1) // size
    return {
        "g_idx": group,
        "qweight": pack_gptq(wide, bits),
        "qzeros": pack_zeros(zeros, bits),
        "scales": torch.nn.functional.pad(scales.to(torch.float16), extra),
    }


def stored(name: str, made: Mapping[str, torch.Tensor]) -> dict[str, tuple[Spec, list[memoryview]]]:
    """For a safetensors file: ``model.layers.0.mlp.up_proj.qweight`` and so on."""
    kinds = {torch.int32: "I32", torch.float16: "F16"}
    found = {}
    for piece in PIECES:
        tensor = made[piece].contiguous()
        found[f"{stem(name)}.{piece}"] = (Spec(kinds[tensor.dtype], tuple(tensor.shape)), [raw_bytes(tensor)])
    return found


def digest(made: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over a linear's pieces, in the order in which they are stored."""
    hasher = hashlib.sha256()
    for piece in PIECES:
        hasher.update(raw_bytes(made[piece].contiguous()))
    return hasher.hexdigest()


def grid_entry(linear: Linear, dtype: str, line: Json) -> Json:
    """The manifest's line of a linear."""
    entry = {
        "kind": "grid",
        "file": codes_file(linear.block),
        "dtype": dtype,
        "shape": list(linear.shape),
        "bits": line["bits"],
        "groups": line["groups"],
        "sha256": line["sha256"],
    }
    return entry | {"transposed": True} if linear.transposed else entry


def weigh(entry: Json) -> tuple[Mapping[str, int], int]:
    """Bytes by part of a line of kind ``grid``, and the weights it stands for."""
    outputs, inputs = sides_of(entry)
    sizes = {name: spec.size for name, spec in specs(outputs, inputs, entry["bits"], entry["groups"]).items()}
    return {"codes": sizes["qweight"], "scales": sum(sizes.values()) - sizes["qweight"]}, outputs * inputs


def quantization_config(config: GPTQConfig, group_size: int) -> Json:
    """What transformers and vLLM read in config.json."""
    return {
        "quant_method": "gptq",
        "bits": config.num_bits,
        "group_size": group_size,
        "sym": config.symmetric,
        # Groups lie in order, whatever the order of rounding was: no runtime has to gather.
        "desc_act": False,
        "static_groups": config.act_order,
        "true_sequential": config.true_sequential,
        "damp_percent": config.damping,
        "checkpoint_format": config.checkpoint_format,
        "lm_head": False,
    }


def stem(name: str) -> str:
    return name.removesuffix(".weight")


def padded(side: int) -> int:
    return -(-side // SIDE) * SIDE


def whole_bytes(entry: Json) -> int:
    """Bytes of a matrix before it was quantized."""
    outputs, inputs = sides_of(entry)
    return outputs * inputs * ITEM_SIZES[entry["dtype"]]
