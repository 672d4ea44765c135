"""The log of a job: lines of the child that computes and of the parent that watches it, up to a limit."""

from __future__ import annotations

from datetime import datetime

from django.utils import timezone

from compression_worker.faults import failpoint
from dashboard.models import Job, LogLine
from dashboard.services.units import unit_of_work

LOG_LINES_PER_JOB = 20_000
LOG_LINE_CHARACTERS = 4_000


@unit_of_work
def log_append(*, job_id: int, step_id: int | None, lines: list[tuple[datetime, str, str]]) -> None:
    """Add (time, level, text) lines to a job's log, up to a limit that the last line names."""
    if not Job.objects.filter(pk=job_id).exists():
        return
    present = LogLine.objects.filter(job_id=job_id).count()
    room = LOG_LINES_PER_JOB - present
    if room <= 0:
        return
    kept = lines[:room]
    if len(kept) == room:
        at = kept[-1][0]
        kept = [*kept[:-1], (at, "warning", f"the log is full: only {LOG_LINES_PER_JOB} lines are kept")]
    failpoint("log.append")
    LogLine.objects.bulk_create(
        LogLine(job_id=job_id, step_id=step_id, at=at, level=level[:8], text=without_nul(text)[:LOG_LINE_CHARACTERS])
        for at, level, text in kept
    )


def log_line(*, job: Job, level: str, text: str) -> None:
    """One line of the parent's own."""
    log_append(job_id=job.pk, step_id=None, lines=[(timezone.now(), level, text)])


def without_nul(text: str) -> str:
    """Postgres stores no NUL."""
    return text.replace("\0", "")
