"""The ledger: sizes of published models from their shapes alone, and what the two ratios mean."""

from __future__ import annotations

import pytest

from compression_worker import ledger
from compression_worker.contracts import Json
from compression_worker.methods.bitdelta.layout import predict

LLAMA: Json = {"model_type": "llama", "tie_word_embeddings": False}
QWEN: Json = {"model_type": "qwen2"}
SHAPES: dict[str, Json] = {
    "Llama-2-7B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000},
    "Llama-2-13B": LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"num_key_value_heads": 40, "vocab_size": 32000},
    "Llama-2-70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "vocab_size": 32000},
    "Mistral-7B": {"model_type": "mistral", "tie_word_embeddings": False}
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 32000},
    "Llama-3.1-8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "Qwen2.5-7B": QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "Qwen2.5-0.5B": QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}
# Decimal GB at 16 bits, decimal GB of a 1-bit delta beside 16-bit embeddings, head and norms, and the factor between.
PUBLISHED = [
    ("Llama-2-7B", 13.48, 1.334, 10.10),
    ("Llama-2-13B", 26.03, 2.242, 11.61),
    ("Llama-2-70B", 137.95, 9.608, 14.36),
    ("Mistral-7B", 14.48, 1.397, 10.37),
    ("Llama-3.1-8B", 16.06, 2.974, 5.40),
    ("Qwen2.5-7B", 15.23, 2.996, 5.08),
    ("Qwen2.5-0.5B", 0.988, 0.317, 3.12),
]


@pytest.mark.parametrize(("name", "source_gb", "delta_gb", "factor"), PUBLISHED)
def test_the_sizes_of_known_models_follow_from_their_shapes(
    name: str, source_gb: float, delta_gb: float, factor: float
) -> None:
    parts = {part["name"]: part["bytes"] for part in predict(SHAPES[name])}
    kept = sum(parts.get(part, 0) for part in ("embeddings", "head", "norms"))
    assert (parts["codes"] + kept) / 1e9 == pytest.approx(delta_gb, abs=0.0006)
    assert (16 * parts["codes"] + kept) / 1e9 == pytest.approx(source_gb, rel=0.0005)
    assert (16 * parts["codes"] + kept) / (parts["codes"] + kept) == pytest.approx(factor, abs=0.006)
    # Scales, headers, biases and manifest are what the published count leaves out: well under a thousandth.
    assert ledger.total(predict(SHAPES[name])) < 1.002 * (parts["codes"] + kept)


def test_llama_2_7b_to_the_byte() -> None:
    parts = {part["name"]: part["bytes"] for part in predict(SHAPES["Llama-2-7B"])}
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert parts["codes"] == linears // 8
    assert parts["scales"] == 4 * 7 * 32
    assert parts["embeddings"] == parts["head"] == 2 * 32000 * 4096
    assert parts["norms"] == 2 * 4096 * (2 * 32 + 1)


def test_the_nominal_ratio_counts_the_compressed_matrices_alone() -> None:
    parts = [{"name": "codes", "bytes": 90}, {"name": "scales", "bytes": 10}, {"name": "embeddings", "bytes": 900}]
    assert ledger.nominal_ratio(1600, parts) == 16.0
    assert ledger.true_ratio(2500, ledger.total(parts)) == 2.5
    assert ledger.bits_per_weight(1000, 2000) == 4.0


def test_parts_keep_their_order_and_empty_ones_are_left_out() -> None:
    assert ledger.listed({"norms": 3, "codes": 5, "head": 0}) == [
        {"name": "codes", "bytes": 5},
        {"name": "norms", "bytes": 3},
    ]


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="sundries"):
        ledger.listed({"sundries": 1})
