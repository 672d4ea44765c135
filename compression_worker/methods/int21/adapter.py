"""The adapters of an artifact as files: as PEFT writes and reads them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig

from compression_worker.adapters import CONFIG_FILE, lora_names
from compression_worker.contracts import StepContext
from compression_worker.methods.int21.layout import PACKED_BASE
from compression_worker.tensors import Spec, TensorFile, raw_bytes, write_file


def config_file(paths: Collection[str], others: Collection[str], *, rank: int, alpha: int, transposed: bool) -> bytes:
    """``adapter_config.json`` as the library writes it, with names in order.

    ``others`` are the model's other modules: where one of them ends like a linear that carries an adapter, linears are
    named in full. ``transposed``: a stock model keeps its weights as ``(K, N)``, as GPT-2 does.
    """
    ends = {path.rpartition(".")[2] for path in paths}
    clash = any(other.rpartition(".")[2] in ends for other in others)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(paths if clash else ends),
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        said = json.loads((Path(folder) / CONFIG_FILE).read_text())
    said["target_modules"] = sorted(said["target_modules"])
    return json.dumps(said, indent=2, sort_keys=True).encode()


def stored(context: StepContext, state: str, paths: Collection[str], dtype: str, packed_base: str) -> str:
    """The factors in the blob ``state`` as ``adapter_model.safetensors``; its digest in the store."""
    kinds = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    names = sorted(name for path in paths for name in lora_names(path))
    with TensorFile(context.store.verified_path(state)) as file:
        made = {name: file.tensor(name).to(getattr(torch, dtype)) for name in names}
    data = {name: (Spec(kinds[dtype], tuple(one.shape)), [raw_bytes(one)]) for name, one in made.items()}
    with context.store.writer() as blob:
        write_file(blob, data, {"format": "pt", PACKED_BASE: packed_base})
    return blob.digest
