"""``evaluate`` on folders: checkpoints and artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression_worker.artifact import write_folder
from compression_worker.checkpoints import attach_folder
from compression_worker.contracts import CompressionError, Json, Metric, StepSpec
from compression_worker.evaluation.command import evaluate, table
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.runner import run_plan
from compression_worker.store import Store
from tests.peft_adapters import make_adapter
from tests.tiny import make_tiny_pair

CONFIG = EvaluationConfig(window_tokens=64, max_windows=8, bootstrap_resamples=300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pair, an artifact folder of it, and files to measure on."""
    folder = tmp_path_factory.mktemp("command")
    base, variant = make_tiny_pair(folder)
    store = Store(folder / "store")
    pair = {"base": attach_folder(store, base), "variant": attach_folder(store, variant)}
    compression = StepSpec(kind="bitdelta.plan", params={"config": {"distill_steps": 0}}, inputs=pair)
    write_folder(folder / "artifact", store, run_plan(store, compression, device="cpu").blobs)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    (folder / "choice.jsonl").write_text('{"question": "A dog is", "choices": ["lazy", "quick"], "answer": "A"}\n' * 4)
    (folder / "bad.txt").write_bytes(b"\xff\xfebad")
    names = ("base", "variant", "artifact", "text.txt", "choice.jsonl", "bad.txt")
    return {name.partition(".")[0]: folder / name for name in names}


def measured(folders: dict[str, Path], target: str, **others: str) -> dict[str, Metric]:
    paths = {name: folders[other] for name, other in others.items()}
    metrics = evaluate(folders[target], data=folders["text"], config=CONFIG, device="cpu", **paths)
    return {metric.name: metric for metric in metrics}


def test_a_checkpoint_alone_has_a_perplexity(folders: dict[str, Path]) -> None:
    metrics = measured(folders, "variant")
    assert set(metrics) == {"perplexity"}
    assert metrics["perplexity"].low < metrics["perplexity"].value < metrics["perplexity"].high
    assert metrics["perplexity"].samples == 8


def test_an_artifact_is_measured_against_its_variant(folders: dict[str, Path]) -> None:
    metrics = measured(folders, "artifact", base="base", reference="variant")
    assert list(metrics) == ["perplexity", "kl_divergence", "top1_agreement"]
    assert metrics["kl_divergence"].value > 0
    assert 0.2 < metrics["top1_agreement"].value < 1
    assert set(metrics["perplexity"].to_json()) == {
        "name",
        "value",
        "low",
        "high",
        "unit",
        "higher_is_better",
        "samples",
    }


def test_an_adapter_is_measured_with_its_base(folders: dict[str, Path]) -> None:
    folder = folders["base"].with_name("adapter")
    make_adapter(folders["base"], folder, target_modules=["q_proj", "v_proj"])
    paths = folders | {"adapter": folder}
    metrics = measured(paths, "adapter", base="base", reference="base")
    assert metrics["kl_divergence"].value > 0
    assert measured(paths, "base", base="base", reference="adapter")["top1_agreement"].value < 1
    with pytest.raises(CompressionError, match="name the base that it was trained on"):
        measured(paths, "adapter")


def test_a_checkpoint_against_itself_is_equal(folders: dict[str, Path]) -> None:
    metrics = measured(folders, "variant", reference="variant")
    assert metrics["kl_divergence"].value == 0.0
    assert metrics["top1_agreement"].value == 1.0
    assert metrics["perplexity"] == measured(folders, "variant")["perplexity"]


def test_questions_give_an_accuracy_and_progress(folders: dict[str, Path]) -> None:
    events: list[Json] = []
    metrics = evaluate(folders["variant"], choice=folders["choice"], config=CONFIG, on_event=events.append)
    assert [metric.name for metric in metrics] == ["choice_accuracy"]
    assert metrics[0].value in (0.0, 1.0)  # one question, four times
    assert {"type": "progress", "done": 4, "total": 4, "unit": "choices"} in events


def test_the_table_has_a_line_for_each_metric() -> None:
    metric = Metric(name="perplexity", value=8.5, low=8.25, high=9.0, unit="", higher_is_better=False, samples=1200)
    lines = table([metric]).splitlines()
    assert lines[1].split() == ["perplexity", "8.5000", "8.2500", "…", "9.0000", "1,200"]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("target", "files", "code"),
    [
        ("artifact", {"data": "text"}, "missing_base"),
        ("artifact", {"data": "text", "base": "variant"}, "base_mismatch"),
        ("variant", {}, "no_samples"),
        ("variant", {"data": "bad"}, "not_utf8"),
        ("variant", {"choice": "text"}, "not_json"),
        ("variant", {"data": "base"}, "unreadable_file"),
    ],
)
def test_it_refuses_what_it_cannot_measure(
    folders: dict[str, Path], target: str, files: dict[str, str], code: str
) -> None:
    with pytest.raises(CompressionError) as caught:
        evaluate(folders[target], config=CONFIG, **{name: folders[file] for name, file in files.items()})
    assert caught.value.code == code
