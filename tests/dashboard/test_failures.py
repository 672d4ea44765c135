"""Classes of failure, each from the shape that a real attempt leaves behind."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dashboard.failures import CODES, SENTENCES, Cause, Ending, classify

TRACEBACK = """Traceback (most recent call last):
  File "/srv/compression_worker/runner.py", line 86, in compute
    output = function(context)
"""
KILLED = "step 'steps 1 to 25' was killed by signal 9 (SIGKILL) 3 times; the last time: the computing process was ended by signal 9 (Killed)"
RECORDED: dict[str, tuple[Ending, Cause, str]] = {
    "python's own MemoryError": (
        Ending(
            state="dead",
            code="errored",
            outcome="errored",
            message="step 'layer 3' broke 3 times; the last time: the step needs more memory than it may take",
            detail=TRACEBACK + "MemoryError",
        ),
        Cause.HOST_MEMORY,
        "MemoryError",
    ),
    "torch's allocator under an address-space limit": (
        Ending(
            state="dead",
            code="errored",
            outcome="errored",
            detail=TRACEBACK
            + "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 25769803776 bytes. Error code 12 (Cannot allocate memory)",
        ),
        Cause.HOST_MEMORY,
        "DefaultCPUAllocator: can't allocate memory",
    ),
    "a C++ library": (
        Ending(state="dead", code="errored", outcome="errored", detail="terminate called: std::bad_alloc"),
        Cause.HOST_MEMORY,
        "std::bad_alloc",
    ),
    "SIGKILL near the limit": (
        Ending(state="dead", code="killed", outcome="killed", message=KILLED, expected_share=0.92),
        Cause.HOST_MEMORY,
        "signal 9",
    ),
    "SIGKILL far from the limit": (
        Ending(state="dead", code="killed", outcome="killed", message=KILLED, expected_share=0.1),
        Cause.KILLED,
        "signal 9",
    ),
    "SIGKILL where nothing is known of the memory": (
        Ending(state="dead", code="killed", outcome="killed", message=KILLED),
        Cause.KILLED,
        "signal 9",
    ),
    "SIGTERM": (
        Ending(state="dead", code="killed", outcome="killed", message="ended by signal 15 (Terminated)"),
        Cause.KILLED,
        "signal 15",
    ),
    "a crash in native code": (
        Ending(state="dead", code="killed", outcome="killed", message="ended by signal 11 (Segmentation fault)"),
        Cause.CODE,
        "signal 11",
    ),
    "CUDA out of memory": (
        Ending(
            state="dead",
            code="errored",
            outcome="errored",
            detail=TRACEBACK
            + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
            "capacity of 79.11 GiB of which 1.19 GiB is free.",
        ),
        Cause.GPU_MEMORY,
        "CUDA out of memory",
    ),
    "cuBLAS cannot allocate": (
        Ending(
            state="dead",
            code="errored",
            outcome="errored",
            detail=TRACEBACK
            + "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        Cause.GPU_MEMORY,
        "CUBLAS_STATUS_ALLOC_FAILED",
    ),
    "a launch failure": (
        Ending(
            state="dead",
            code="errored",
            outcome="errored",
            detail=TRACEBACK + "torch.AcceleratorError: CUDA error: unspecified launch failure\nCompile with X",
        ),
        Cause.DEVICE,
        "unspecified launch failure",
    ),
    "memory of the GPU that rots": (
        Ending(
            state="dead",
            code="errored",
            outcome="errored",
            message="RuntimeError: CUDA error: uncorrectable ECC error encountered",
        ),
        Cause.DEVICE,
        "uncorrectable ECC",
    ),
    "no room, waiting": (
        Ending(
            state="blocked",
            code="disk",
            outcome="blocked",
            detail="[Errno 28] No space left on device: '/srv/store/tmp/x'",
        ),
        Cause.DISK,
        "No space left on device",
    ),
    "no room on an import": (
        Ending(state="failed", code="disk_full", outcome="failed", message="the disk of the store is full"),
        Cause.DISK,
        "the disk of the store is full",
    ),
    "no room, as an error of the code": (
        Ending(
            state="dead",
            code="errored",
            outcome="errored",
            detail=TRACEBACK + "OSError: [Errno 28] No space left on device",
        ),
        Cause.DISK,
        "Errno 28",
    ),
    "a wrong shape": (
        Ending(
            state="failed",
            code="shape_mismatch",
            outcome="failed",
            message="'layers.3.q_proj' is [8, 8] in the base, [9, 8] in the variant: choose the base",
        ),
        Cause.BAD_INPUT,
        "layers.3.q_proj",
    ),
    "a set without text": (
        Ending(state="failed", code="no_text", outcome="failed", message="the calibration set has no texts"),
        Cause.BAD_INPUT,
        "no texts",
    ),
    "weights with NaN": (
        Ending(state="failed", code="not_finite", outcome="failed", message="the delta of 'q' is not finite"),
        Cause.NOT_FINITE,
        "not finite",
    ),
    "a training that ran away": (
        Ending(
            state="failed",
            code="diverged",
            outcome="failed",
            message="the loss of distillation step 12 is not finite: lower learning_rate",
        ),
        Cause.DIVERGED,
        "distillation step 12",
    ),
    "a model type that transformers does not know": (
        Ending(state="failed", code="unknown_architecture", outcome="failed", message="knows no model type 'zz'"),
        Cause.UNSUPPORTED,
        "'zz'",
    ),
    "a blob that rotted": (
        Ending(state="failed", code="damaged_blob", outcome="failed", message="blob ab does not match its digest"),
        Cause.BLOB,
        "does not match its digest",
    ),
    "a blob that is gone": (
        Ending(state="failed", code="missing_blob", outcome="failed", message="the store has no blob ab"),
        Cause.BLOB,
        "no blob",
    ),
    "nothing moved": (
        Ending(
            state="dead",
            code="stalled",
            outcome="killed",
            message="step 'layer 1' made no progress for 15 min and was killed",
            causes={"stalled": 3},
        ),
        Cause.STALLED,
        "no progress",
    ),
    "a lost worker": (
        Ending(
            state="dead",
            code="lost",
            outcome="lost",
            message="step 'layer 1' was lost with its worker 3 times; the last time: the lease of worker-1 ran out",
            detail="the lease of worker-1 ran out",
            causes={"lost": 3},
        ),
        Cause.WORKER_LOST,
        "the lease of worker-1 ran out",
    ),
    "a bug": (
        Ending(
            state="dead", code="errored", outcome="errored", message="ValueError: x", detail=TRACEBACK + "ValueError: x"
        ),
        Cause.CODE,
        "ValueError: x",
    ),
    "a person": (Ending(state="cancelled"), Cause.CANCELLED, ""),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_ending_has_its_class_and_its_evidence(name: str) -> None:
    ending, cause, evidence = RECORDED[name]
    found = classify(ending)
    assert found.cause == cause
    assert evidence in found.evidence
    assert "\n" not in found.evidence


def test_each_class_has_a_sentence_and_is_among_the_recorded() -> None:
    assert set(SENTENCES) == set(Cause)
    assert {cause for _ending, cause, _evidence in RECORDED.values()} == set(Cause)


def test_the_signal_is_named() -> None:
    assert classify(RECORDED["SIGKILL near the limit"][0]).signal_name == "SIGKILL"
    assert classify(RECORDED["a bug"][0]).signal_name == ""
    assert classify(Ending(state="dead", outcome="killed", signal=6)).signal_name == "SIGABRT"


def test_every_code_with_a_class_of_its_own_is_one_that_the_worker_says() -> None:
    """A renamed code would fall back to bad input without a word."""
    root = Path(__file__).resolve().parents[2] / "compression_worker"
    said = {
        node.args[0].value
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
    }
    of_the_dashboard = {"disk", "stalled", "lost", "bad_result"}
    assert CODES.keys() - of_the_dashboard <= said
