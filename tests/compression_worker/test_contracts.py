"""The shapes that cross a process: equal things have equal bytes and keys, and come back as they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression_worker import catalog
from compression_worker.contracts import (
    CompressionError,
    Metric,
    PlannedStep,
    StepOutput,
    StepSpec,
    canonical_json,
    sha256,
)

json_objects = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


def test_canonical_json_is_sorted_plain_and_refuses_what_json_lacks() -> None:
    assert canonical_json({"b": [1, "é"], "a": {}}) == '{"a":{},"b":[1,"é"]}'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": float("inf")})


@given(json_objects, json_objects, st.integers())
def test_a_step_comes_back_from_json_with_its_key(
    params: dict[str, object], data: dict[str, object], seed: int
) -> None:
    spec = StepSpec(kind="bitdelta.layer", params=params, inputs={"base": "0" * 64}, seed=seed)
    assert StepSpec.from_json(spec.to_json()).key == spec.key
    output = StepOutput(blobs={"a": "b"}, data=data, steps=(PlannedStep(name="x", kind="y", params=params),))
    assert StepOutput.from_bytes(output.to_bytes()) == output


def test_each_part_of_a_step_decides_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"kind": "a", "params": {"x": 1}, "inputs": {"i": "d"}, "seed": 0}
    changes = [{"kind": "b"}, {"params": {"x": 2}}, {"inputs": {"i": "e"}}, {"inputs": {"j": "d"}}, {"seed": 1}]
    keys = [StepSpec(**(spec | change)).key for change in ({}, *changes)]  # type: ignore[arg-type]
    monkeypatch.setattr("compression_worker.contracts.CODE_VERSION", "next")
    keys.append(StepSpec(**spec).key)  # type: ignore[arg-type]
    assert len(set(keys)) == 7


def test_a_digest_is_the_sha256_everyone_knows() -> None:
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_refusal_carries_code_and_message() -> None:
    error = CompressionError("shape_mismatch", "the base is of another shape")
    assert (error.code, str(error)) == ("shape_mismatch", "the base is of another shape")


def test_a_metric_is_printed_with_its_interval() -> None:
    metric = Metric(name="perplexity", value=2.0, low=1.5, high=2.5, unit="", higher_is_better=False, samples=8)
    assert metric.to_json()["low"] == 1.5


@pytest.mark.parametrize("kind", catalog.STEPS)
def test_every_step_of_the_catalogue_has_its_function(kind: str) -> None:
    assert callable(catalog.step_function(kind))


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(CompressionError, match="bitdelta"):
        catalog.method("magic")
