"""What the pre-flight promised of a job, beside what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _

from compression_worker.preflight import Estimate
from dashboard.formats import byte_words, duration_words
from dashboard.lifecycle import JobKind, StepState
from dashboard.models import Artifact, Job, Step

SPAN = "low", "middle", "high"


@dataclass(frozen=True)
class Promise:
    label: str
    predicted: str
    measured: str


def promises(job: Job, steps: Sequence[Step]) -> list[Promise]:
    """Bytes, memory and time; nothing for a job that was accepted without a pre-flight."""
    if not job.estimate:
        return []
    estimate = Estimate.from_json(job.estimate)
    rows = [_memory(estimate, steps), _time(job, steps)]
    return [_bytes(job, estimate), *rows] if job.kind == JobKind.COMPRESS else rows


def _bytes(job: Job, estimate: Estimate) -> Promise:
    made = Artifact.objects.filter(job=job).values_list("artifact_bytes", flat=True).first()
    words = byte_words(estimate.result_bytes)
    return Promise(_("Bytes"), words if estimate.exact else _("at most %(bytes)s") % {"bytes": words}, byte_words(made))


def _memory(estimate: Estimate, steps: Sequence[Step]) -> Promise:
    """The hungriest step. A GPU's memory where steps report it."""
    gpu = _largest(steps, "gpu_peak_memory_bytes")
    predicted = max((one.gpu_bytes if gpu else one.memory_bytes for one in estimate.steps), default=None)
    label = _("GPU memory at its peak") if gpu else _("Memory at its peak")
    return Promise(label, byte_words(predicted), byte_words(gpu or _largest(steps, "peak_memory_bytes")))


def _largest(steps: Sequence[Step], name: str) -> float | None:
    return max((one for one in (_measured(step).get(name) for step in steps) if one), default=None)


def _time(job: Job, steps: Sequence[Step]) -> Promise:
    """Seconds of computing, one step after another: what several workers share still counts in full."""
    span = (job.estimate or {}).get("seconds")
    low, middle, high = ([duration_words(span[name]) for name in SPAN]) if span else ("", "", "")
    predicted = _("%(middle)s (%(low)s to %(high)s)") % {"low": low, "middle": middle, "high": high}
    spent = sum(_measured(step).get("seconds") or 0.0 for step in steps if step.state == StepState.DONE)
    return Promise(
        _("Time of computing"), predicted if span else _("not measured here yet"), duration_words(spent or None)
    )


def _measured(step: Step) -> dict[str, float]:
    found = step.data.get("measured") if isinstance(step.data, dict) else None
    return found if isinstance(found, dict) else {}
