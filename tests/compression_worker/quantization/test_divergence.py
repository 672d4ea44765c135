"""The loss over the likeliest tokens and one class for all others: against whole distributions, and its own gradient."""

from __future__ import annotations

import pytest
import torch

from compression_worker.quantization.divergence import divergence
from compression_worker.quantization.teacher import TopLogits

BATCH, LENGTH, VOCABULARY = 2, 7, 11


def made(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a student and of a teacher, both ``(B, T, V)`` in fp64, and the windows they read."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn((2, BATCH, LENGTH, VOCABULARY), generator=generator, dtype=torch.float64) * 3
    return student, teacher, torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)


def whole_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL of whole distributions, averaged over all places but the last of each window."""
    log_p = (teacher[:, :-1] / temperature).log_softmax(-1)
    log_q = (student[:, :-1] / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_the_whole_vocabulary_it_is_the_whole_divergence(temperature: float) -> None:
    student, teacher, windows = made()
    kept = TopLogits.of(teacher[:, :-1], VOCABULARY, temperature)
    assert bool((kept.rest == -torch.inf).all())
    found = divergence(student, kept, windows, temperature=temperature)
    torch.testing.assert_close(found.kl, whole_kl(student, teacher, temperature))
    torch.testing.assert_close(found.loss, temperature**2 * whole_kl(student, teacher, temperature))


def test_fewer_tokens_give_a_lower_bound_that_grows_with_them() -> None:
    student, teacher, windows = made()
    found = [float(divergence(student, TopLogits.of(teacher[:, :-1], k), windows).kl) for k in range(1, VOCABULARY)]
    assert found == sorted(found)
    assert 0 < found[0] < found[-1] <= float(whole_kl(student, teacher)) + 1e-12


def test_a_student_that_answers_like_its_teacher_has_nothing_to_learn() -> None:
    _, teacher, windows = made()
    same = teacher.clone().requires_grad_()
    found = divergence(same, TopLogits.of(teacher[:, :-1], 4), windows)
    found.loss.backward()
    assert float(found.kl) == pytest.approx(0, abs=1e-12)
    assert same.grad is not None
    assert float(same.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("count", [1, 4, VOCABULARY])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (0.7, 0.6)])
def test_its_gradient_is_that_of_the_loss_it_says(count: int, temperature: float, ce_weight: float) -> None:
    student, teacher, windows = made()
    kept = TopLogits.of(teacher[:, :-1], count, temperature)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return divergence(logits, kept, windows, temperature=temperature, ce_weight=ce_weight).loss

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_without_a_teacher_it_is_cross_entropy() -> None:
    student, _, windows = made()
    student.requires_grad_()
    found = divergence(student, None, windows)
    expected = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.ce, expected.detach())
    (ours,) = torch.autograd.grad(found.loss, student)
    (theirs,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs)
    assert float(found.kl) == 0


def test_many_places_are_averaged_as_one() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn((2, 1, 300, 5), generator=generator, dtype=torch.float64)
    windows = torch.randint(5, (1, 300), generator=generator)
    found = divergence(student, TopLogits.of(teacher[:, :-1], 5), windows)
    torch.testing.assert_close(found.kl, whole_kl(student, teacher))


def test_tokens_that_a_student_thinks_impossible_leave_loss_and_gradient_finite() -> None:
    teacher = torch.zeros((1, 3, 4))
    student = torch.tensor([0.0, 0.0, -400.0, -400.0]).expand(1, 3, 4).clone().requires_grad_()
    found = divergence(student, TopLogits.of(teacher[:, :-1], 1), torch.zeros((1, 3), dtype=torch.int64))
    found.loss.backward()
    assert bool(found.loss.isfinite())
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
