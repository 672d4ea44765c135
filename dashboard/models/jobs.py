"""Jobs as lists of steps. The rows are the truth: a lease says who computes, the fence (``attempt``) who may write."""

from __future__ import annotations

import pghistory
from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from dashboard.lifecycle import (
    ACTIVE_JOB_STATES,
    OPEN_STEP_STATES,
    TERMINAL_JOB_STATES,
    AttemptOutcome,
    BlockedReason,
    CancelRequest,
    JobKind,
    JobState,
    StepState,
)


class Priority(models.IntegerChoices):
    """The three classes of the form. Any number between them is allowed: higher is claimed first."""

    URGENT = 10, _("urgent")
    NORMAL = 0, _("normal")
    IDLE = -10, _("when idle")


@pghistory.track(
    pghistory.InsertEvent(),
    pghistory.UpdateEvent(condition=pghistory.AnyChange("state", "cancel_requested", "priority")),
    model_name="JobEvent",
    fields=["id", "kind", "title", "state", "cancel_requested", "priority", "error"],
)
class Job(models.Model):
    """One thing a person asked for. ``spec`` is what the form said; the steps are what that came to."""

    kind = models.CharField(max_length=16, choices=JobKind.choices)
    title = models.CharField(max_length=200)
    spec = models.JSONField()
    method = models.CharField(max_length=32, blank=True, default="")
    variant = models.ForeignKey("Checkpoint", models.SET_NULL, null=True, related_name="jobs")
    state = models.CharField(max_length=16, choices=JobState.choices, default=JobState.QUEUED)
    blocked_reason = models.CharField(max_length=16, choices=BlockedReason.choices, blank=True, default="")
    cancel_requested = models.CharField(max_length=8, choices=CancelRequest.choices, blank=True, default="")
    priority = models.SmallIntegerField(_("priority"), default=0)  # higher is claimed first
    queue = models.CharField(max_length=32, default="cpu")  # of the steps that need the device; the others go to cpu
    estimate = models.JSONField(null=True)  # what the pre-flight promised when the job was accepted
    cloned_from = models.ForeignKey("self", models.SET_NULL, null=True, related_name="clones")
    error_code = models.CharField(max_length=64, blank=True, default="")
    error = models.TextField(blank=True, default="")
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, related_name="jobs")
    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    is_demo = models.BooleanField(default=False)

    class Meta:
        ordering = ["-id"]
        indexes = [
            models.Index(
                fields=["-priority", "id"], name="job_active", condition=models.Q(state__in=sorted(ACTIVE_JOB_STATES))
            ),
            models.Index(
                fields=["-id"], name="job_unfinished", condition=models.Q(state__in=sorted(ACTIVE_JOB_STATES))
            ),
            models.Index(fields=["state", "-id"], name="job_by_state"),
            models.Index(fields=["kind", "-id"], name="job_by_kind"),
            models.Index(fields=["created_by", "-id"], name="job_by_person"),
        ]
        constraints = [
            models.CheckConstraint(condition=models.Q(state__in=JobState.values), name="job_state_known"),
            models.CheckConstraint(
                condition=models.Q(finished_at__isnull=False, state__in=sorted(TERMINAL_JOB_STATES))
                | (models.Q(finished_at__isnull=True) & ~models.Q(state__in=sorted(TERMINAL_JOB_STATES))),
                name="job_finished_when_terminal",
            ),
        ]

    def __str__(self) -> str:
        return f"#{self.pk} {self.title}"

    @property
    def is_terminal(self) -> bool:
        return JobState(self.state) in TERMINAL_JOB_STATES

    @property
    def priority_words(self) -> str:
        """The class, with the number where it is between two of them."""
        nearest = max((one for one in Priority if one <= self.priority), default=Priority.IDLE)
        label = str(nearest.label)
        return label if nearest == self.priority else f"{label} ({self.priority:+d})"


class Step(models.Model):
    """A pure unit of work. ``attempt`` is the fence: one per claim, never reset, in the WHERE of every later write."""

    job = models.ForeignKey(Job, models.CASCADE, related_name="steps")
    index = models.PositiveIntegerField()
    name = models.CharField(max_length=100)
    group = models.CharField(max_length=32, blank=True, default="")
    kind = models.CharField(max_length=64)
    params = models.JSONField(default=dict)
    inputs = models.JSONField(default=dict)  # name -> digest, or "@N" for the output of this job's step N
    seed = models.BigIntegerField(default=0)
    queue = models.CharField(max_length=32, default="cpu")
    state = models.CharField(max_length=16, choices=StepState.choices, default=StepState.WAITING)
    attempt = models.PositiveIntegerField(default=0)
    causes = models.JSONField(default=dict)  # how often each cause struck: {"killed": 1}
    owner = models.CharField(max_length=100, blank=True, default="")
    lease_until = models.DateTimeField(null=True)
    not_before = models.DateTimeField(null=True)  # back-off after an attempt that broke
    key = models.CharField(max_length=64, blank=True, default="")
    output = models.CharField(max_length=64, blank=True, default="")
    reused = models.BooleanField(default=False)  # the output was there already, from a step with the same key
    data = models.JSONField(default=dict)  # figures for the page
    progress_done = models.BigIntegerField(default=0)
    progress_total = models.BigIntegerField(default=0)
    progress_unit = models.CharField(max_length=16, blank=True, default="")
    progress_at = models.DateTimeField(null=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["job_id", "index"]
        constraints = [
            models.UniqueConstraint(fields=["job", "index"], name="step_once_per_index"),
            models.CheckConstraint(condition=models.Q(state__in=StepState.values), name="step_state_known"),
        ]
        indexes = [
            # What a claim looks at: a finished job has no such step, however many jobs there are.
            models.Index(
                fields=["job", "queue", "index"],
                name="step_open",
                condition=models.Q(state__in=sorted(OPEN_STEP_STATES)),
            ),
            models.Index(fields=["queue", "job", "index"], name="step_waiting", condition=models.Q(state="waiting")),
            models.Index(fields=["lease_until"], name="step_leased", condition=models.Q(state="running")),
            models.Index(fields=["key"], name="step_done_by_key", condition=models.Q(state="done")),
            models.Index(fields=["kind", "-id"], name="step_measured", condition=models.Q(state="done", reused=False)),
        ]


class Attempt(models.Model):
    """One claim of a step, kept for the timeline: who, when, how it ended."""

    step = models.ForeignKey(Step, models.CASCADE, related_name="attempts")
    number = models.PositiveIntegerField()
    worker = models.CharField(max_length=100)
    outcome = models.CharField(max_length=16, choices=AttemptOutcome.choices, default=AttemptOutcome.RUNNING)
    detail = models.TextField(blank=True, default="")
    started_at = models.DateTimeField()
    finished_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["step_id", "number"]
        constraints = [models.UniqueConstraint(fields=["step", "number"], name="attempt_once_per_number")]


class LogLine(models.Model):
    """A line of a job's log, from the child that computes or from the parent that watches it."""

    job = models.ForeignKey(Job, models.CASCADE, related_name="log_lines")
    step = models.ForeignKey(Step, models.CASCADE, null=True)
    at = models.DateTimeField()
    level = models.CharField(max_length=8, default="info")
    text = models.TextField()

    class Meta:
        ordering = ["id"]


class Worker(models.Model):
    """A Celery worker process as it last reported itself."""

    name = models.CharField(max_length=100, unique=True)
    queues = models.CharField(max_length=200)
    device = models.CharField(max_length=100, default="cpu")
    pid = models.IntegerField()
    started_at = models.DateTimeField()
    seen_at = models.DateTimeField()
    memory_bytes = models.BigIntegerField(null=True)  # of the machine; null here and below is unknown
    memory_limit_bytes = models.BigIntegerField(null=True)  # of a computing child
    gpu_name = models.CharField(max_length=100, blank=True, default="", db_default="")
    gpu_memory_bytes = models.BigIntegerField(null=True)
    code_version = models.CharField(max_length=32, blank=True, default="", db_default="")
    trouble = models.TextField(blank=True, default="", db_default="")  # why it takes no work: its disk, its device

    class Meta:
        ordering = ["name"]
