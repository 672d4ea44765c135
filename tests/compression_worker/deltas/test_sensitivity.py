"""The foretold divergence of a small error is close to the measured one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compression_worker.architecture import describe, parsed
from compression_worker.contracts import CompressionError
from compression_worker.deltas.sensitivity import sense
from compression_worker.distillation import padded
from tests.tiny import tiny_config


def tiny_model(**changes: Any) -> tuple[Any, list[str]]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config() | changes
    model = AutoModelForCausalLM.from_config(parsed(config)).float().eval()
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.ndim > 1 else 1
    return model, [linear.name for linear in describe(config).linears()]


def divergence(model: Any, before: torch.Tensor, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        after = model(tokens).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_errors_cost_about_what_is_foretold(tied: bool) -> None:
    model, names = tiny_model(tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(3)
    vocabulary = model.config.vocab_size
    rows = [torch.randint(0, vocabulary, (32,), generator=generator).tolist() for _ in range(64)]
    batches = [padded(rows[at : at + 8]) for at in range(0, 64, 8)]
    sensed = sense(model, names, iter(batches), lambda done: None)
    moments = sensed.moments
    tokens = torch.tensor(rows)
    with torch.no_grad():
        before = model(tokens).logits.log_softmax(-1)
    embedding = "model.embed_tokens.weight"
    for name in (names[0], names[3], names[-1], embedding):
        weight = model.get_parameter(name)
        found = []
        foretold = 0.0
        for _ in range(6):
            error = 0.02 * float(weight.std()) * torch.randn(weight.shape, generator=generator)
            weight.data += error
            found.append(divergence(model, before, tokens))
            weight.data -= error
            if name in sensed.samples:
                foretold += sensed.samples[name].cost(error) / 6
                continue
            keys = [key for key in (name, f"{name}#head") if key in moments]
            assert len(keys) == (2 if tied else 1)
            foretold += sum(float(moments[key].outputs @ error.square() @ moments[key].inputs) / 12 for key in keys)
        mean = sum(found) / len(found)
        assert 0.4 * mean < foretold < 2.5 * mean, (name, foretold, mean)


def test_padding_is_not_seen() -> None:
    model, names = tiny_model()
    padding = sense(model, names, iter([padded([[5, 6, 7, 8], [9, 9, 1]])]), lambda done: None)
    both = sense(model, names, iter([padded([[5, 6, 7, 8]]), padded([[9, 9, 1]])]), lambda done: None)
    assert padding.tokens == both.tokens == 7
    for name in names:
        assert padding.samples[name].x.shape == both.samples[name].x.shape
        torch.testing.assert_close(padding.samples[name].x, both.samples[name].x, rtol=0.02, atol=0.02)
    assert padding.moments.keys() == both.moments.keys()
    for name in ("model.embed_tokens.weight#head", "lm_head.weight"):
        if name in both.moments:
            torch.testing.assert_close(padding.moments[name].inputs, both.moments[name].inputs, rtol=1e-4, atol=1e-6)


def test_a_weight_that_is_no_module_of_its_own_is_refused() -> None:
    model, names = tiny_model()
    with pytest.raises(CompressionError, match="cannot be seen"):
        sense(model, [*names, "model.layers.0.experts.weight"], iter([]), lambda done: None)
