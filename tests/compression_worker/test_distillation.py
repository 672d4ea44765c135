"""Scale distillation: exact gradients, padding that does not count, order of data, and scales that are found."""

from __future__ import annotations

import copy
import math
from itertools import repeat
from typing import Any

import pytest
import torch

from compression_worker.architecture import Architecture, describe, parsed
from compression_worker.contracts import CompressionError
from compression_worker.distillation import Adam, Batch, Windows, distill, logit_loss, padded, scheduled
from compression_worker.methods.bitdelta.coding import Coding
from compression_worker.methods.bitdelta.matrices import Matrix, SignedLinear
from compression_worker.methods.bitdelta.student import Student
from tests.families import MIXTURES
from tests.families import make_model as make_family_model
from tests.tiny import tiny_config


def make_student(*, true_scale: float = 0.02) -> tuple[Student, list[str]]:
    model, names, pairs = make_model(true_scale=true_scale)
    return student_of(model, names, pairs, describe(tiny_config())), names


def student_of(
    model: Any, names: list[str], pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], architecture: Architecture
) -> Student:
    matrices = {name: Matrix(pairs[name][0], pairs[name][1][None], Coding()) for name in names}
    return Student(model, matrices, [1] * len(names), {}, architecture)


def make_model(
    *, true_scale: float = 0.02, dtype: torch.dtype = torch.float32
) -> tuple[Any, list[str], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A tiny random Llama that is exactly the base plus ``true_scale * S`` in each block linear; base and signs."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config()
    model = AutoModelForCausalLM.from_config(parsed(config)).to(dtype)
    names = [linear.name for linear in describe(config).linears()]
    pairs = {}
    for name in names:
        full = model.get_parameter(name).data
        signs = torch.where(torch.rand(full.shape) < 0.5, -1, 1).to(torch.int8)
        pairs[name] = full - true_scale * signs.to(dtype), signs
    return model, names, pairs


def make_mixture(family: str) -> tuple[Any, list[str], dict[str, tuple[torch.Tensor, torch.Tensor]], Architecture]:
    """A mixture of experts; base and signs of each linear, of each expert too, and what config.json says."""
    model = make_family_model(family)
    architecture = describe(model.config.to_dict())
    weights = {name: model.get_parameter(architecture.memory.get(name, name)) for name in unstacked(architecture)}
    for stack, slices in architecture.stacks.items():
        flat = model.get_parameter(stack).flatten(0, 1)
        weights |= {one.name: flat[one.first : one.first + one.rows] for one in slices}
    names = [linear.name for linear in architecture.linears()]
    signs = {name: torch.where(torch.rand(weights[name].shape) < 0.5, -1, 1).to(torch.int8) for name in names}
    pairs = {name: (weights[name].data - 0.02 * signs[name], signs[name]) for name in names}
    return model, names, pairs, architecture


def unstacked(architecture: Architecture) -> list[str]:
    return [linear.name for linear in architecture.linears() if linear.name not in architecture.stacked()]


def dense_weights(
    architecture: Architecture, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], scales: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``base + scale * sign`` under the names in memory, stacks put together row by row."""
    merged = {name: base + scales[name] * signs for name, (base, signs) in pairs.items()}
    weights = {architecture.memory.get(name, name): merged[name] for name in unstacked(architecture)}
    for stack, slices in architecture.stacks.items():
        ordered = sorted(slices, key=lambda one: one.first)
        experts = 4
        flat = torch.cat([merged[one.name] for one in ordered])
        weights[stack] = flat.view(experts, -1, flat.shape[1])
    return weights


@pytest.mark.parametrize("family", MIXTURES)
def test_each_expert_has_a_scale_whose_gradient_agrees_with_a_dense_model(family: str) -> None:
    torch.manual_seed(4)
    dense, names, pairs, architecture = make_mixture(family)
    student = student_of(copy.deepcopy(dense), names, pairs, architecture)
    scales = torch.full((len(names),), 0.03, requires_grad=True)
    batch = padded([[*range(5, 60)], [1, 2, 3]])
    weights = dense_weights(architecture, pairs, dict(zip(names, scales.unbind(), strict=True)))
    logits = torch.func.functional_call(dense, weights, (batch.tokens,), {"use_cache": False}).logits
    teacher = dense(batch.tokens, use_cache=False).logits.detach()
    torch.testing.assert_close(student.teacher_logits(batch.tokens), teacher)
    loss = (logits - teacher)[batch.real].square().mean()
    (expected,) = torch.autograd.grad(loss, scales)
    (gradient,) = torch.autograd.grad(student.loss(scales, batch), scales)
    experts = torch.tensor([name in architecture.stacked() for name in names])
    assert bool((expected[experts].abs() > 1e-6).all())
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_gradients_agree_with_a_dense_double_precision_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, outputs, inputs in ((5, 7, 33), (1, 1, 1), (8, 16, 64)):
        x = torch.randn((2, rows, inputs), generator=generator, dtype=torch.float64, requires_grad=True)
        base = torch.randn((outputs, inputs), generator=generator, dtype=torch.float64)
        signs = torch.where(torch.rand((outputs, inputs), generator=generator) < 0.5, -1, 1).to(torch.int8)
        scale = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn((2, rows, outputs), generator=generator, dtype=torch.float64)
        dense = x @ (base + scale * signs.double()).T
        expected = torch.autograd.grad(dense, (x, scale), upstream)
        y = SignedLinear.apply(x, base, signs, scale)
        torch.testing.assert_close(y, dense, rtol=1e-12, atol=1e-12)
        for got, wanted in zip(torch.autograd.grad(y, (x, scale), upstream), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((3, 5), generator=generator, dtype=torch.float64, requires_grad=True)
    base = torch.randn((4, 5), generator=generator, dtype=torch.float64)
    signs = torch.where(torch.rand((4, 5), generator=generator) < 0.5, -1, 1).to(torch.int8)
    scale = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, scale: SignedLinear.apply(x, base, signs, scale), (x, scale))


def test_the_gradient_of_every_scale_of_a_model_agrees_with_a_dense_model_in_double() -> None:
    dense, names, pairs = make_model(dtype=torch.float64)
    student = student_of(copy.deepcopy(dense), names, pairs, describe(tiny_config()))
    scales = torch.full((len(names),), 0.03, dtype=torch.float64, requires_grad=True)
    batch = padded([[5, 6, 7, 8, 9], [1, 2, 3]])
    weights = {name: pairs[name][0] + scale * pairs[name][1] for name, scale in zip(names, scales, strict=True)}
    logits = torch.func.functional_call(dense, weights, (batch.tokens,), {"use_cache": False}).logits
    loss = (logits - student.teacher_logits(batch.tokens))[batch.real].square().mean()
    (expected,) = torch.autograd.grad(loss, scales)
    (gradient,) = torch.autograd.grad(student.loss(scales, batch), scales)
    assert bool((expected.abs() > 1e-9).all())
    # Llama's norms compute in single precision whatever the model's dtype.
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_the_student_equals_the_teacher_at_the_true_scales() -> None:
    student, names = make_student()
    tokens = padded([[5, 6, 7, 8]]).tokens
    answer = student.student_logits(tokens, torch.full((len(names),), 0.02))
    torch.testing.assert_close(answer, student.teacher_logits(tokens), rtol=1e-4, atol=1e-5)


def test_training_finds_the_true_scales_from_wrong_ones() -> None:
    student, names = make_student(true_scale=0.02)
    adam = Adam.start(torch.full((len(names),), 0.012))
    generator = torch.Generator().manual_seed(3)
    batches = iter([padded(torch.randint(0, 288, (4, 32), generator=generator).tolist()) for _ in range(60)])
    rates = [scheduled(0.002, "cosine", step, 60) for step in range(60)]
    losses = distill(adam, batches, student.loss, first=0, learning_rates=rates, watch=lambda done: None)
    assert losses[-1] < losses[0] / 20
    assert float((adam.values - 0.02).abs().mean()) < 0.003


def test_appended_padding_changes_neither_loss_nor_gradient() -> None:
    student, names = make_student()
    scales = torch.full((len(names),), 0.03, requires_grad=True)
    plain = padded([[5, 6, 7, 8, 9, 10]])
    wide = Batch(
        torch.cat([plain.tokens, torch.randint(0, 288, (1, 9))], dim=1),
        torch.cat([plain.real, torch.zeros((1, 9), dtype=torch.bool)], dim=1),
    )
    losses = [student.loss(scales, batch) for batch in (plain, wide)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, scales)[0] for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_mean_over_real_positions_and_the_vocabulary() -> None:
    student, teacher = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    teacher[0, 2] = 100.0
    real = torch.tensor([[True, True, False]])
    assert float(logit_loss(student, teacher, real)) == 1.0


def test_adam_agrees_with_torchs_own() -> None:
    values = torch.tensor([0.01, -0.2, 0.3])
    ours, theirs = Adam.start(values), values.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([theirs], lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    for number in range(1, 20):
        gradient = torch.tensor([math.sin(number), 0.1 * number, -1.0])
        optimizer.param_groups[0]["lr"] = rate = scheduled(0.01, "cosine", number - 1, 20)
        theirs.grad = gradient.clone()
        optimizer.step()
        ours.step(gradient, number=number, learning_rate=rate)
    torch.testing.assert_close(ours.values, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_the_schedules() -> None:
    assert scheduled(0.1, "cosine", 0, 10) == pytest.approx(0.1)
    assert scheduled(0.1, "cosine", 5, 10) == pytest.approx(0.05)
    assert scheduled(0.1, "constant", 9, 10) == 0.1


def windows(texts: list[str], seed: int = 0, length: int = 4, needed: int = 1) -> Windows:
    return Windows(texts, lambda text: [ord(letter) for letter in text], length=length, needed=needed, seed=seed)


def test_long_texts_are_cut_and_every_window_comes_once_a_turn() -> None:
    found = windows(["abcdefghij", "klm"], needed=10)
    assert len(found) == 4
    turn = [bytes(found.batch(step, 1).tokens[0].tolist()).decode() for step in range(4)]
    assert sorted(turn) == ["abcd", "efgh", "ij", "klm"]
    next_turn = [bytes(found.batch(step, 1).tokens[0].tolist()).decode() for step in range(4, 8)]
    assert sorted(next_turn) == sorted(turn)


def test_the_seed_alone_decides_the_order() -> None:
    texts = [chr(97 + n) * 4 for n in range(20)]
    orders = [windows(texts, seed, needed=20).batch(0, 20).tokens.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_short_rows_are_padded_and_masked() -> None:
    batch = padded([[7, 8, 9], [5]])
    assert batch.tokens.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.real.tolist() == [[True] * 3, [True, False, False]]


def test_text_without_two_tokens_in_a_row_is_refused() -> None:
    with pytest.raises(CompressionError, match="give more text"):
        windows(["a", ""])


def test_a_loss_that_is_not_finite_is_refused_with_the_step() -> None:
    adam = Adam.start(torch.ones(2))
    with pytest.raises(CompressionError, match="step 6 is not finite"):
        distill(
            adam,
            repeat(padded([[1, 2]])),
            lambda values, batch: values.sum() * math.inf,
            first=5,
            learning_rates=[0.1],
            watch=lambda done: None,
        )
