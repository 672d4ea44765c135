"""Why a job ended badly: a class of cause, and the one line of its message or log that shows it.

A pure function over what an attempt left behind; what usually helps is decided by the method, elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from signal import Signals

from django.db.models import TextChoices
from django.utils.translation import gettext_lazy as _

NEAR_LIMIT = 0.7
"""A SIGKILL counts as a full memory when the step was expected to take this share of what its worker has."""


class Cause(TextChoices):
    HOST_MEMORY = "host_memory", _("Out of memory")
    GPU_MEMORY = "gpu_memory", _("Out of GPU memory")
    DISK = "disk", _("The disk is full")
    NOT_FINITE = "not_finite", _("Values that are not finite")
    DIVERGED = "diverged", _("Distillation diverged")
    UNSUPPORTED = "unsupported", _("Unsupported architecture")
    BLOB = "blob", _("Damaged or missing data in the store")
    STALLED = "stalled", _("No progress")
    WORKER_LOST = "worker_lost", _("The worker was lost")
    DEVICE = "device", _("Device fault")
    KILLED = "killed", _("Killed from outside")
    BAD_INPUT = "bad_input", _("The input is wrong")
    CODE = "code", _("An error in the code")
    CANCELLED = "cancelled", _("Stopped by a person")


SENTENCES: Mapping[str, object] = {
    Cause.HOST_MEMORY: _("The step needed more memory than its worker has or may take."),
    Cause.GPU_MEMORY: _("The step needed more memory than the GPU has left."),
    Cause.DISK: _("There was no room left in the store; nothing that is done is lost."),
    Cause.NOT_FINITE: _("A weight or a result is NaN or infinite: the checkpoint is damaged, or was trained that way."),
    Cause.DIVERGED: _("The loss or a scale became infinite: the learning rate is too high for this model."),
    Cause.UNSUPPORTED: _("The model is of a family that the installed libraries or this method do not handle."),
    Cause.BLOB: _("A file of the store is gone or no longer matches its digest: restore it, or import it again."),
    Cause.STALLED: _("Nothing moved for too long, so the step was killed: a hung device or a stuck disk looks so."),
    Cause.WORKER_LOST: _("The worker stopped reporting: its machine, its network or the process itself went away."),
    Cause.DEVICE: _("The GPU or its driver reported a fault; the computing process was not used again."),
    Cause.KILLED: _("A signal ended the computing process; a system that runs out of memory does that, too."),
    Cause.BAD_INPUT: _("The job says no: what it was given cannot be used as it is."),
    Cause.CODE: _("The code broke on this input. The same step breaks again until one of the two changes."),
    Cause.CANCELLED: _("What was done is kept: a retry goes on from there."),
}

CODES: Mapping[str, Cause] = {
    "disk": Cause.DISK,
    "disk_full": Cause.DISK,
    "not_finite": Cause.NOT_FINITE,
    "diverged": Cause.DIVERGED,
    "unknown_architecture": Cause.UNSUPPORTED,
    "no_blocks": Cause.UNSUPPORTED,
    "no_linears": Cause.UNSUPPORTED,
    "unloadable_model": Cause.UNSUPPORTED,
    "missing_blob": Cause.BLOB,
    "damaged_blob": Cause.BLOB,
    "damaged_tensor": Cause.BLOB,
    "damaged_artifact": Cause.BLOB,
    "damaged_manifest": Cause.BLOB,
    "stalled": Cause.STALLED,
    "lost": Cause.WORKER_LOST,
    "bad_result": Cause.CODE,
}
"""Of what a job may say, the codes with a class of their own; all others are bad input."""

TEXTS: tuple[tuple[Cause, str], ...] = (
    (Cause.STALLED, r"\bno progress\b|\bstalled\b|nothing moved"),
    (
        Cause.GPU_MEMORY,
        r"(CUDA|HIP) out of memory|CUDA error: out of memory|torch\.(cuda\.)?OutOfMemoryError"
        r"|CU(BLAS|DNN)_STATUS_ALLOC_FAILED",
    ),
    (
        Cause.DEVICE,
        r"(CUDA|HIP|cuDNN) error|CUDA driver|CU(BLAS|DNN)_STATUS|device-side assert|uncorrectable ECC"
        r"|\bNVML\b|\bXid\b",
    ),
    (
        Cause.HOST_MEMORY,
        r"MemoryError|more memory than it may take|can'?t allocate memory|cannot allocate memory|std::bad_alloc"
        r"|unable to allocate|over its memory limit|oom[- ]kill|out of memory",
    ),
    (Cause.DISK, r"No space left on device|Disk quota exceeded|Errno 28\b|Errno 122\b"),
)
"""What an error's words give away, asked in this order: a GPU that is full also speaks of CUDA."""

SIGNAL = re.compile(r"\bsignal (\d+)")
CRASHES = frozenset({Signals.SIGSEGV, Signals.SIGBUS, Signals.SIGILL, Signals.SIGFPE, Signals.SIGABRT, Signals.SIGTRAP})


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended: its state, what it said, and what the last attempt of its broken step left behind.

    ``causes`` counts the step's attempts by outcome. ``expected_share`` is the step's predicted memory over what its
    worker has; None where either is unknown.
    """

    state: str
    code: str = ""
    message: str = ""
    outcome: str = ""
    detail: str = ""
    signal: int = 0
    causes: Mapping[str, int] = field(default_factory=dict)
    expected_share: float | None = None


@dataclass(frozen=True)
class Failure:
    cause: Cause
    evidence: str
    signal: int

    @property
    def sentence(self) -> object:
        return SENTENCES[self.cause]

    @property
    def signal_name(self) -> str:
        return signal_name(self.signal)


def classify(ending: Ending) -> Failure:
    """The class of cause of a job that failed, died, is blocked or was cancelled."""
    text = "\n".join(part for part in (ending.message, ending.detail) if part)
    found = SIGNAL.search(text)
    signal = ending.signal or (int(found[1]) if found else 0)
    cause, evidence = _cause(ending, text, signal)
    return Failure(cause, evidence or _first_line(text), signal)


def _cause(ending: Ending, text: str, signal: int) -> tuple[Cause, str]:
    if ending.state == "cancelled":
        return Cause.CANCELLED, ""
    if ending.state == "blocked" and ending.code in ("", "disk"):
        return _by_text(text, only=Cause.DISK) or (Cause.DISK, "")
    if "stalled" in (ending.code, ending.outcome) or _struck_most(ending.causes) == "stalled":
        return _by_text(text, only=Cause.STALLED) or (Cause.STALLED, "")
    if ending.state == "failed":
        return CODES.get(ending.code, Cause.BAD_INPUT), ""
    outcome = ending.outcome or ending.code
    if outcome == "lost":
        return Cause.WORKER_LOST, ""
    if told := _by_text(text):
        return told
    if outcome == "killed" or signal:
        return _killed(ending, text, signal)
    return Cause.CODE, _last_line(ending.detail) if "Traceback" in ending.detail else ""


def _struck_most(causes: Mapping[str, int]) -> str:
    return max(causes, key=lambda name: causes[name], default="")


def _killed(ending: Ending, text: str, signal: int) -> tuple[Cause, str]:
    line = _line_of(text, SIGNAL.pattern)
    if signal in CRASHES:
        return Cause.CODE, line
    near = ending.expected_share is not None and ending.expected_share >= NEAR_LIMIT
    return (Cause.HOST_MEMORY if signal == Signals.SIGKILL and near else Cause.KILLED), line


def _by_text(text: str, only: Cause | None = None) -> tuple[Cause, str] | None:
    for cause, pattern in TEXTS:
        if only in (None, cause) and (line := _line_of(text, pattern)):
            return cause, line
    return None


def _line_of(text: str, pattern: str) -> str:
    """The last line that shows it: a traceback ends with what broke."""
    lines = [line.strip() for line in text.splitlines() if re.search(pattern, line, re.IGNORECASE)]
    return lines[-1][:300] if lines else ""


def _first_line(text: str) -> str:
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "")


def _last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")


def signal_name(signal: int) -> str:
    """``SIGKILL``; nothing for none, a number for one that has no name here."""
    try:
        return Signals(signal).name if signal else ""
    except ValueError:
        return str(signal)
