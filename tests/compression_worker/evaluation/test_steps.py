"""A whole evaluation of a tiny pair, step by step, through the runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compression_worker.artifact import Artifact, restore
from compression_worker.checkpoints import Checkpoint, attach_folder
from compression_worker.contracts import CompressionError, Json, StepOutput, StepSpec
from compression_worker.runner import Runner, run_plan
from compression_worker.samples import parse_samples
from compression_worker.store import Store
from tests.tiny import make_tiny_pair

TEXT = b"".join(b"Paragraph %d: the quick brown fox jumps over the lazy dog.\n\n" % n for n in range(60))
CHOICE = b"\n".join(
    json.dumps({"question": f"{n} dogs are", "choices": ["lazy", "quick", "small"], "answer": n % 3}).encode()
    for n in range(30)
)
CONFIG = {"window_tokens": 64, "max_windows": 12, "max_choices": 25, "max_new_tokens": 8, "bootstrap_resamples": 300}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, str]]:
    """A store with a tiny pair, an artifact of it and both kinds of sets, and their digests."""
    folder = tmp_path_factory.mktemp("evaluation")
    base, variant = make_tiny_pair(folder)
    store = Store(folder / "store")
    inputs = {
        "base": attach_folder(store, base),
        "variant": attach_folder(store, variant),
        "text": store.write_bytes(parse_samples(TEXT, "text").data),
        "choice": store.write_bytes(parse_samples(CHOICE, "choice").data),
    }
    pair = {"base": inputs["base"], "variant": inputs["variant"]}
    compression = StepSpec(kind="bitdelta.plan", params={"config": {"distill_steps": 0}}, inputs=pair)
    inputs["artifact"] = run_plan(store, compression, device="cpu").data["artifact"]
    return store, inputs


@pytest.fixture(scope="module")
def measured(world: tuple[Store, dict[str, str]]) -> tuple[StepOutput, list[Json]]:
    """The whole plan, run once: its last output and all events."""
    return evaluated(*world)


def evaluated(store: Store, inputs: dict[str, str], **config: Any) -> tuple[StepOutput, list[Json]]:
    events: list[Json] = []
    return run_plan(store, plan(inputs, **config), events.append, device="cpu"), events


def plan(inputs: dict[str, str], **config: Any) -> StepSpec:
    return StepSpec(kind="evaluation.plan", params={"config": CONFIG | config}, inputs=inputs)


def test_what_stands_alone_is_measured_without_a_base(world: tuple[Store, dict[str, str]]) -> None:
    store, inputs = world
    settings = {"num_bits": 4, "samples": 4, "length": 32}
    source = {"variant": inputs["base"], "calibration": inputs["text"]}
    quantization = StepSpec(kind="gptq.plan", params={"config": settings}, inputs=source)
    artifact = run_plan(store, quantization, device="cpu").data["artifact"]
    text = {"text": inputs["text"], "artifact": artifact}
    of_a_base = evaluated(store, text | {"variant": inputs["base"]})[0].data
    assert of_a_base["targets"] == ["variant", "compressed"]
    assert 0 < metric(of_a_base, "kl_divergence")["values"]["compressed"]["value"] < 0.1
    steps = {}
    for base in (inputs["base"], inputs["variant"]):
        given = plan(text | {"variant": inputs["variant"], "base": base})
        _, output, _ = Runner(store=store, device="cpu").compute(given, lambda event: None)
        assert output.data["targets"] == ["base", "variant", "compressed"]
        steps[base] = next(step for step in output.steps if step.name == "compressed")
    assert len({json.dumps(step.to_json(), sort_keys=True) for step in steps.values()}) == 1, "its key knows no base"


def metric(data: Json, name: str) -> Json:
    (found,) = [metric for metric in data["metrics"] if metric["name"] == name]
    return found


def test_base_variant_and_compressed_are_measured_in_one_table(measured: tuple[StepOutput, list[Json]]) -> None:
    data = measured[0].data
    assert data["targets"] == ["base", "variant", "compressed"]
    assert data["reference"] == "variant"
    assert [each["name"] for each in data["metrics"]] == [
        "perplexity",
        "kl_divergence",
        "top1_agreement",
        "choice_accuracy",
    ]
    for each in data["metrics"]:
        assert set(each["values"]) == {"base", "variant", "compressed"}
        assert set(each["differences"]) == {"base", "compressed"}
        for value in [*each["values"].values(), *each["differences"].values()]:
            assert value["low"] <= value["value"] <= value["high"]


def test_the_variant_beside_itself_does_not_diverge(measured: tuple[StepOutput, list[Json]]) -> None:
    data = measured[0].data
    assert metric(data, "kl_divergence")["values"]["variant"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert metric(data, "top1_agreement")["values"]["variant"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    divergence = {name: value["value"] for name, value in metric(data, "kl_divergence")["values"].items()}
    assert 0.001 < divergence["compressed"] < divergence["base"]


def test_a_compressed_model_is_measured_like_its_restored_folder(
    world: tuple[Store, dict[str, str]], measured: tuple[StepOutput, list[Json]], tmp_path: Path
) -> None:
    store, inputs = world
    base = Checkpoint.open(store, inputs["base"])
    restore(base, Artifact.open_store(store, inputs["artifact"]), tmp_path / "restored", lambda done, total, unit: None)
    restored = evaluated(store, {"variant": attach_folder(store, tmp_path / "restored"), "text": inputs["text"]})[
        0
    ].data
    expected = metric(restored, "perplexity")["values"]["variant"]["value"]
    # The folder is rounded to bf16, the compressed model is not.
    assert metric(measured[0].data, "perplexity")["values"]["compressed"]["value"] == pytest.approx(expected, rel=2e-3)


def test_flips_are_counted_and_shown(measured: tuple[StepOutput, list[Json]]) -> None:
    data = measured[0].data
    flips, accuracy = data["flips"], metric(data, "choice_accuracy")
    difference = accuracy["differences"]["compressed"]
    assert (flips["wrong_to_right"] - flips["right_to_wrong"]) / 25 == pytest.approx(difference["value"])
    assert 0 < difference["p_value"] <= 1
    for example in flips["examples"]:
        assert (example["variant"] == example["answer"]) != (example["compressed"] == example["answer"])
    assert len(flips["examples"]) == flips["wrong_to_right"] + flips["right_to_wrong"]


def test_answers_stand_side_by_side_with_their_differences(measured: tuple[StepOutput, list[Json]]) -> None:
    for generation in measured[0].data["generations"]:
        variant = "".join(text for tag, text in generation["word_diff"] if tag != "insert")
        compressed = "".join(text for tag, text in generation["word_diff"] if tag != "delete")
        assert generation["answers"]["variant"] == variant
        assert generation["answers"]["compressed"] == compressed


def test_differences_are_targets_minus_the_variant(measured: tuple[StepOutput, list[Json]]) -> None:
    perplexity = metric(measured[0].data, "perplexity")
    values = {name: value["value"] for name, value in perplexity["values"].items()}
    assert perplexity["differences"]["base"]["value"] == pytest.approx(values["base"] - values["variant"])
    assert 100 < values["variant"] < 1000  # random weights: near the vocabulary of 288


def test_samples_prompts_and_settings_are_told(world: tuple[Store, dict[str, str]]) -> None:
    data = evaluated(*world, prompts="The quick\nA dog")[0].data
    assert metric(data, "perplexity")["samples"] == 12
    assert metric(data, "choice_accuracy")["samples"] == 25
    assert [generation["prompt"] for generation in data["generations"]] == ["The quick", "A dog"]
    assert set(data["generations"][0]["answers"]) == {"base", "variant", "compressed"}
    assert data["config"]["prompts"] == "The quick\nA dog"


def test_the_same_evaluation_gives_the_same_bytes(
    world: tuple[Store, dict[str, str]], measured: tuple[StepOutput, list[Json]]
) -> None:
    assert evaluated(*world)[0].to_bytes() == measured[0].to_bytes()


def test_progress_and_steps_are_told(measured: tuple[StepOutput, list[Json]]) -> None:
    events = measured[1]
    assert [event["name"] for event in events if event["type"] == "step"] == [
        "base",
        "variant",
        "compressed",
        "summary",
    ]
    units = {event["unit"] for event in events if event["type"] == "progress"}
    assert units == {"windows", "choices", "prompts"}


def test_what_was_measured_does_not_depend_on_the_resampling(world: tuple[Store, dict[str, str]]) -> None:
    store, inputs = world

    def planned(**config: Any) -> list[tuple[str, Json]]:
        output = Runner(store=store, device="cpu").compute(plan(inputs, **config), lambda event: None)[1]
        return [(step.name, step.params) for step in output.steps if step.kind == "evaluation.target"]

    assert planned() == planned(seed=9, bootstrap_resamples=500)
    assert planned() != planned(max_windows=5)


def test_one_kind_of_set_is_enough(world: tuple[Store, dict[str, str]]) -> None:
    store, inputs = world
    only_choice = {name: inputs[name] for name in ("variant", "choice")}
    data = evaluated(store, only_choice)[0].data
    assert [each["name"] for each in data["metrics"]] == ["choice_accuracy"]
    assert data["targets"] == ["variant"]
    assert data["generations"][0]["prompt"] == "0 dogs are"
    assert data["flips"] == {}


@pytest.mark.parametrize(
    ("drop", "change", "code"),
    [
        (("text", "choice"), {}, "no_samples"),
        (("base",), {}, "missing_base"),
        ((), {"text": "choice"}, "wrong_set"),
        ((), {"choice": "text"}, "wrong_set"),
    ],
)
def test_a_plan_refuses_what_cannot_be_measured(
    world: tuple[Store, dict[str, str]], drop: tuple[str, ...], change: dict[str, str], code: str
) -> None:
    store, inputs = world
    changed = inputs | {name: inputs.get(value, value) for name, value in change.items()}
    with pytest.raises(CompressionError) as caught:
        evaluated(store, {name: digest for name, digest in changed.items() if name not in drop})
    assert caught.value.code == code


def test_a_base_of_another_vocabulary_is_left_out_and_said(world: tuple[Store, dict[str, str]], tmp_path: Path) -> None:
    store, inputs = world
    other = attach_folder(store, make_tiny_pair(tmp_path, vocab=320)[0])
    output, events = evaluated(store, {"variant": inputs["variant"], "text": inputs["text"], "base": other})
    assert output.data["targets"] == ["variant"]
    assert any("vocabulary has 320" in event["text"] for event in events if event["type"] == "log")
