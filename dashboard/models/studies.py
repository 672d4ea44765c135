"""Studies: one checkpoint compressed in several ways, each result measured alike, so that they can be compared."""

from __future__ import annotations

import pghistory
from django.conf import settings
from django.db import models

from dashboard.models.evaluations import SampleSet
from dashboard.models.registry import Checkpoint


@pghistory.track(
    pghistory.InsertEvent(),
    pghistory.UpdateEvent(condition=pghistory.AnyChange("stopped_at")),
    model_name="StudyEvent",
    fields=["id", "title", "variant", "stopped_at"],
)
class Study(models.Model):
    """What a form asked for: which checkpoint, on which text, measured on which sets with which settings.

    ``stopped_at``: a person stopped it, and nothing of it goes on by itself any more.
    """

    title = models.CharField(max_length=200)
    variant = models.ForeignKey(Checkpoint, models.RESTRICT, related_name="studies")
    calibration = models.ForeignKey(SampleSet, models.RESTRICT, null=True, related_name="+")
    text_set = models.ForeignKey(SampleSet, models.RESTRICT, null=True, related_name="+")
    choice_set = models.ForeignKey(SampleSet, models.RESTRICT, null=True, related_name="+")
    config = models.JSONField()  # of each evaluation, defaults written out
    queue = models.CharField(max_length=32)
    priority = models.SmallIntegerField(default=0)
    stopped_at = models.DateTimeField(null=True)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    is_demo = models.BooleanField(default=False)

    class Meta:
        ordering = ["-id"]
        verbose_name_plural = "studies"
        constraints = [
            models.CheckConstraint(
                condition=models.Q(text_set__isnull=False) | models.Q(choice_set__isnull=False),
                name="study_measures_something",
            ),
        ]

    def __str__(self) -> str:
        return f"#{self.pk} {self.title}"


class Trial(models.Model):
    """One way of compressing in a study: a method, at so many bits where it has a choice of them.

    The row is the promise that an evaluation follows: whoever looks and finds the compression succeeded and no
    evaluation asks for it. A retry takes the place of the job that it repeats.
    """

    study = models.ForeignKey(Study, models.CASCADE, related_name="trials")
    index = models.PositiveIntegerField()
    method = models.CharField(max_length=32)
    bits = models.PositiveSmallIntegerField(null=True)
    compression = models.OneToOneField("Job", models.RESTRICT, related_name="trial")
    evaluation = models.OneToOneField("Job", models.RESTRICT, null=True, related_name="measured_trial")
    problem = models.TextField(blank=True, default="")  # why the evaluation could not be asked for

    class Meta:
        ordering = ["study_id", "index"]
        constraints = [
            models.UniqueConstraint(fields=["study", "index"], name="trial_once_per_index"),
            models.UniqueConstraint(fields=["study", "method", "bits"], name="trial_once", nulls_distinct=False),
        ]
        indexes = [
            models.Index(
                fields=["study", "index"],
                name="trial_unmeasured",
                condition=models.Q(evaluation__isnull=True, problem=""),
            ),
        ]
