"""Windows to learn from and to measure by, and what a full-precision model answers there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_worker.checkpoints import attach_folder, load_folder
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput, StepSpec
from compression_worker.quantization.teacher import (
    HELD_OUT,
    TRAINED,
    logits_planned,
    read_logits,
    read_windows,
    text_planned,
)
from compression_worker.runner import Runner, resolve_inputs
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from tests.tiny import make_tiny_pair

TEXTS = b"".join(json.dumps({"text": f"{n**5 + n:x}, {n**7:x} and {n**9:x} jump."}).encode() + b"\n" for n in range(60))


class Lesson:
    """A tiny model, a text, and the steps that make windows and answers of them."""

    def __init__(self, folder: Path, texts: bytes = TEXTS) -> None:
        self.folder, self.other = make_tiny_pair(folder)
        self.store = Store(folder / "store", durable=False)
        self.source = {
            "variant": attach_folder(self.store, self.folder),
            "calibration": self.store.write_bytes(parse_samples(texts, TEXT).data),
        }
        self.logs: list[str] = []

    def text(self, windows: int = 8, held_out: int = 3, length: int = 16, seed: int = 5) -> tuple[str, StepOutput]:
        return self.step(text_planned(self.source, windows=windows, length=length, held_out=held_out, seed=seed))

    def answers(self, text: str, part: str, run: range, count: int) -> tuple[str, StepOutput]:
        return self.step(logits_planned(self.source["variant"], text, part, run, count, 1.0))

    def step(self, step: PlannedStep) -> tuple[str, StepOutput]:
        spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, []), seed=step.seed)
        events: list[Json] = []
        digest, output, _ = Runner(store=self.store, device="cpu").compute(spec, events.append)
        self.logs += [event["text"] for event in events if event["type"] == "log"]
        return digest, output

    def context(self, **inputs: str) -> StepContext:
        nothing: Any = lambda *given: None  # noqa: E731
        spec = StepSpec(kind="int21.train", inputs=inputs)
        return StepContext(store=self.store, spec=spec, progress=nothing, log=nothing, measure=nothing)


@pytest.fixture(scope="module", name="lesson")
def fixture_lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    return Lesson(tmp_path_factory.mktemp("lesson"))


def test_held_out_windows_are_none_of_those_that_are_trained_on(lesson: Lesson) -> None:
    digest, output = lesson.text()
    context = lesson.context(text=digest)
    held, trained = read_windows(context, HELD_OUT), read_windows(context, TRAINED)
    assert held.shape == (3, 16)
    assert trained.shape == (8, 16)
    assert not {tuple(row) for row in held.tolist()} & {tuple(row) for row in trained.tolist()}
    assert output.data == {"windows": 8, "distinct": 8, "held_out": 3, "length": 16}
    assert torch.equal(read_windows(context, TRAINED, slice(2, 5)), trained[2:5])


def test_a_short_text_comes_round_again_in_another_order(lesson: Lesson) -> None:
    digest, output = lesson.text(windows=300, length=32)
    trained = read_windows(lesson.context(text=digest), TRAINED)
    distinct = output.data["distinct"]
    assert len(trained) == 300
    assert distinct < 150
    rounds = [sorted(map(tuple, part.tolist())) for part in trained.split(distinct) if len(part) == distinct]
    assert all(one == rounds[0] for one in rounds)
    assert not torch.equal(trained[:distinct], trained[distinct : 2 * distinct])


def test_a_text_of_one_window_is_refused(tmp_path: Path) -> None:
    lesson = Lesson(tmp_path, b'{"text": "the fox jumps over the lazy dog and back"}')
    with pytest.raises(CompressionError, match="one to measure by") as refused:
        lesson.text(length=16)
    assert refused.value.code == "too_few_tokens"


def test_answers_are_those_of_the_model_window_by_window(lesson: Lesson) -> None:
    text, _ = lesson.text()
    digest, output = lesson.answers(text, TRAINED, range(2, 5), 20)
    assert output.data == {"windows": 3, "logits": 20}
    context = lesson.context(text=text, teacher=digest)
    kept = read_logits(context, "teacher")
    model = load_folder(lesson.folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(read_windows(context, TRAINED, slice(2, 5)), use_cache=False).logits[:, :-1]
    expected = logits.log_softmax(-1)
    log_probs = expected.topk(20, dim=-1).values
    torch.testing.assert_close(kept.log_probs, log_probs)
    torch.testing.assert_close(expected.gather(-1, kept.tokens.long()), log_probs)
    torch.testing.assert_close(kept.rest.exp(), 1 - log_probs.exp().sum(-1), rtol=1e-4, atol=1e-5)


def test_answers_belong_to_one_model_and_one_text(lesson: Lesson) -> None:
    text, _ = lesson.text()
    other, _ = lesson.text(seed=6)
    keys = {
        StepSpec(kind=step.kind, params=step.params, inputs=step.inputs).key
        for step in (
            logits_planned(model, said, TRAINED, range(2), 8, 1.0)
            for model in (lesson.source["variant"], attach_folder(lesson.store, lesson.other))
            for said in (text, other)
        )
    }
    assert len(keys) == 4
