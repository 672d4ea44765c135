"""LoRA extraction as PEFT stores it: uniform rank, ``adapter_model.safetensors`` beside ``adapter_config.json``.

The block linears become ``B @ A`` by truncated singular value decomposition; embeddings, head and norms are whole
modules (``modules_to_save``), as PEFT keeps what an adapter cannot express. A rank of every matrix is a coarse step, so
the first matrices get one rank more where bytes are left (``rank_pattern``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from compression_worker.architecture import Linear
from tests.benchmarks.delta_peers.pair import Pair
from tests.benchmarks.delta_peers.peers import Peer, Stored, Tensors

PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Adapter(Peer):
    """The dial counts ranks over all matrices: ``rank * matrices + matrices with one more``."""

    whole_dial = True
    weights_file = "adapter_model.safetensors"
    label: str = "LoRA extraction (PEFT)"

    def dials(self, pair: Pair) -> tuple[float, float]:
        linears = self._linears(pair)
        return 1, len(linears) * min(min(linear.shape) for linear in linears)

    def dial_words(self, pair: Pair, dial: float) -> str:
        return f"mean rank {dial / len(self._linears(pair)):.3g}"

    def encode(self, pair: Pair, dial: float) -> Tensors:
        stored: Tensors = {}
        for linear, rank in self._ranks(pair, int(dial)):
            factors = pair.factors(linear.name)
            left, right = factors.left[:, :rank], factors.right[:rank]
            up, down = (right.T, left.T) if linear.transposed else (left, right)
            key = module_key(linear.name)
            stored[f"{key}.lora_A.weight"] = down.bfloat16().contiguous()
            stored[f"{key}.lora_B.weight"] = up.bfloat16().contiguous()
        return stored

    def delta(self, pair: Pair, stored: Stored, name: str) -> torch.Tensor:
        (linear,) = (one for one in self._linears(pair) if one.name == name)
        key = module_key(name)
        if f"{key}.lora_A.weight" not in stored:
            return torch.zeros(linear.shape)
        product = stored[f"{key}.lora_B.weight"].float() @ stored[f"{key}.lora_A.weight"].float()
        return product.T if linear.transposed else product

    def kept_key(self, name: str) -> str:
        return PREFIX + name

    def extra_files(self, pair: Pair, dial: float) -> dict[str, bytes]:
        ranks = [(module(linear.name), rank) for linear, rank in self._ranks(pair, int(dial))]
        least = min(rank for _, rank in ranks)
        more = {name: rank for name, rank in ranks if rank > least}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "",
            "r": least,
            "lora_alpha": least,
            "rank_pattern": more,
            "alpha_pattern": more,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(linear.transposed for linear in self._linears(pair)),
            "inference_mode": True,
            "target_modules": [name for name, _ in ranks],
            "modules_to_save": sorted({module(name) for name in pair.kept(self.scope)}),
        }
        return {"adapter_config.json": json.dumps(config, separators=(",", ":")).encode()}

    def _linears(self, pair: Pair) -> list[Linear]:
        coded = set(pair.compressed(self.scope))
        return [linear for linear in pair.architecture.linears() if linear.name in coded]

    def _ranks(self, pair: Pair, total: int) -> list[tuple[Linear, int]]:
        linears = self._linears(pair)
        rank, more = divmod(total, len(linears))
        ranks = [(linear, rank + (index < more)) for index, linear in enumerate(linears)]
        return [(linear, rank) for linear, rank in ranks if rank]


def module(name: str) -> str:
    return name.rpartition(".")[0]


def module_key(name: str) -> str:
    return PREFIX + module(name)
