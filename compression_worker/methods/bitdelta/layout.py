"""How BitDelta lies on disk: which file holds which tensor, in which order, and what that weighs, from shapes alone.

Codes of block ``i`` are in ``codes-<i>.safetensors``, one int32 tensor ``(ceil(K/32), N)`` per linear (see
``kernels.packing``); all scales are one fp32 vector in ``scales.safetensors``, and a linear knows its place in it. All
other tensors of the variant are in ``raw.safetensors`` as they are; what is byte-equal to the base's is in no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from compression_worker import ledger
from compression_worker.architecture import Linear, describe
from compression_worker.artifact import make_manifest
from compression_worker.contracts import Json
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.tensors import ITEM_SIZES, Spec, header_bytes
from kernels.packing import words_for

SCALES_FILE = "scales.safetensors"
RAW_FILE = "raw.safetensors"
SCALES = "scales"
LAYOUT: Json = {"name": "signs-along-k", "version": 1, "word_bits": 32, "lowest_bit_first": True, "sign_of_zero": 1}


def codes_file(block: int) -> str:
    return f"codes-{block:05d}.safetensors"


def codes_specs(linears: Iterable[Linear]) -> dict[str, Spec]:
    """The header of one block's codes."""
    return {linear.name: Spec("I32", (words_for(linear.inputs), linear.outputs)) for linear in linears}


def scales_specs(count: int) -> dict[str, Spec]:
    return {SCALES: Spec("F32", (count,))}


def sign_entry(linear: Linear, dtype: str, index: int, sha256: str) -> Json:
    """The manifest's line of a linear; ``index`` is its place among the scales."""
    entry = {
        "kind": "sign",
        "file": codes_file(linear.block),
        "dtype": dtype,
        "shape": list(linear.shape),
        "scale": index,
        "sha256": sha256,
    }
    return entry | {"transposed": True} if linear.transposed else entry


def raw_entry(spec: Spec, part: str, sha256: str) -> Json:
    """The manifest's line of a tensor stored as it is."""
    return {
        "kind": "raw",
        "file": RAW_FILE,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "part": part,
        "sha256": sha256,
    }


def base_entry(spec: Spec, sha256: str) -> Json:
    """The manifest's line of a tensor that is byte-equal to the base's."""
    return {"kind": "base", "dtype": spec.dtype, "shape": list(spec.shape), "sha256": sha256}


def matrix_figures(name: str, scale0: float, scale: float, sum_abs: float, sum_squares: float, elements: int) -> Json:
    """The scale before and after distillation, and ``|D - scale * S| / |D|`` (0 to 1) with the final one."""
    error = max(0.0, sum_squares - 2 * scale * sum_abs + scale * scale * elements)
    relative = math.sqrt(error / sum_squares) if sum_squares else 0.0
    return {
        "name": name,
        "scale0": six_digits(scale0),
        "scale": six_digits(scale),
        "relative_error": six_digits(relative),
    }


def six_digits(value: float) -> float:
    """Figures are for people: six significant digits, so that they do not fill the manifest."""
    return float(f"{value:.6g}")


def book(tensors: Mapping[str, Json], files: Mapping[str, Json], side_files: Iterable[str], source: Json) -> Json:
    """The manifest's ledger: bytes by part, adding up to all ``files``. ``source``: weight bytes and parameters."""
    sizes = dict.fromkeys(ledger.PARTS, 0)
    linear_bytes = 0
    for tensor in tensors.values():
        elements = math.prod(tensor["shape"])
        if tensor["kind"] == "sign":
            outputs, inputs = reversed(tensor["shape"]) if tensor.get("transposed") else tensor["shape"]
            sizes["codes"] += 4 * words_for(inputs) * outputs
            sizes["scales"] += 4
            linear_bytes += elements * ITEM_SIZES[tensor["dtype"]]
        elif tensor["kind"] == "raw":
            sizes[tensor["part"]] += elements * ITEM_SIZES[tensor["dtype"]]
    sizes["side files"] = sum(files[name]["size"] for name in side_files)
    sizes["headers"] = sum(entry["size"] for entry in files.values()) - sum(sizes.values())
    parts = ledger.listed(sizes)
    return {"parts": parts, "nominal_ratio": six_digits(ledger.nominal_ratio(linear_bytes, parts)), **source}


def predict(
    config: Json,
    settings: BitDeltaConfig | None = None,
    *,
    dtype: str = "BF16",
    side_files: Mapping[str, int] | None = None,
) -> list[Json]:
    """The ledger that compressing a variant with this config.json will give, manifest included, from shapes alone.

    ``side_files`` are the sizes of the files beside the weights. No tensor is assumed to equal the base's.
    """
    architecture = describe(config)
    tensors: dict[str, Json] = {}
    files: dict[str, Json] = {name: _file(size) for name, size in (side_files or {}).items()}
    for index, linear in enumerate(architecture.linears()):
        tensors[linear.name] = sign_entry(linear, dtype, index, _DIGEST)
    for block, linears in enumerate(architecture.blocks):
        if linears:
            files[codes_file(block)] = _file(_size(codes_specs(linears)))
    raw = {name: Spec(dtype, shape) for name, shape in architecture.shapes.items() if name not in tensors}
    count = len(tensors)
    tensors |= {name: raw_entry(spec, architecture.parts[name], _DIGEST) for name, spec in raw.items()}
    files |= {SCALES_FILE: _file(_size(scales_specs(count))), RAW_FILE: _file(_size(raw))}
    source = {"source_bytes": _size({name: Spec(dtype, s) for name, s in architecture.shapes.items()}), "parameters": 1}
    written = book(tensors, files, side_files or {}, source)
    return ledger.with_manifest(
        written["parts"], _manifest_bytes(tensors, files, written, settings or BitDeltaConfig())
    )


_DIGEST = "0" * 64
_TYPICAL = 0.00123456


def _file(size: int) -> Json:
    return {"sha256": _DIGEST, "size": size}


def _size(specs: Mapping[str, Spec]) -> int:
    return len(header_bytes(specs)) + sum(spec.size for spec in specs.values())


def _manifest_bytes(
    tensors: Mapping[str, Json], files: Mapping[str, Json], written: Json, settings: BitDeltaConfig
) -> int:
    """A manifest as long as the real one, but for a few digits."""
    linears = [name for name, tensor in tensors.items() if tensor["kind"] == "sign"]
    figures = {
        "matrices": [
            {"name": name, "scale0": _TYPICAL, "scale": _TYPICAL, "relative_error": 0.612345} for name in linears
        ],
        "distillation": {"losses": [_TYPICAL] * settings.distill_steps, "windows": 1000},
    }
    side = {"fingerprint": _DIGEST, "checkpoint": _DIGEST}
    raw = make_manifest(
        method="bitdelta",
        config=asdict(settings),
        seed=0,
        base=side,
        variant=side,
        files=files,
        tensors=tensors,
        aliases=[],
        layout=LAYOUT,
        book=written,
        figures=figures,
        side_files=[name for name in files if not name.endswith(".safetensors")],
        code_version="1",
        libraries={"torch": "2.13.0", "safetensors": "0.8.0"},
    )
    return len(raw)
