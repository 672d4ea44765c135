"""Sample sets (immutable versions) and evaluations of base, variant and artifact on them."""

from __future__ import annotations

import pghistory
from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from dashboard.models.registry import SHA256


class SampleKind(models.TextChoices):
    TEXT = "text", _("Text")  # UTF-8 text, or JSONL with a "text" field: perplexity and fidelity
    CHOICE = "choice", _("Multiple choice")  # JSONL with question, choices, answer


class SampleSet(models.Model):
    """Samples to measure on. A changed file is a new version; a version never changes."""

    name = models.SlugField(_("name"), max_length=100)
    version = models.PositiveIntegerField(default=1)
    kind = models.CharField(_("kind"), max_length=16, choices=SampleKind.choices)
    digest = models.CharField(max_length=64)  # of the normalised JSONL in the store
    samples = models.PositiveIntegerField()
    size_bytes = models.BigIntegerField()
    origin = models.CharField(max_length=200, blank=True, default="")
    preview = models.JSONField(default=list)  # the first few samples
    bundled = models.BooleanField(default=False)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, null=True)
    created_at = models.DateTimeField(auto_now_add=True)
    is_demo = models.BooleanField(default=False)

    class Meta:
        ordering = ["name", "-version"]
        constraints = [
            models.UniqueConstraint(fields=["name", "version"], name="sample_set_version_once"),
            models.CheckConstraint(condition=models.Q(digest__regex=SHA256), name="sample_set_digest_is_sha256"),
        ]

    def __str__(self) -> str:
        return f"{self.name} v{self.version}"


@pghistory.track(pghistory.InsertEvent(), model_name="EvaluationEvent", fields=["id", "digest", "artifact", "job"])
class Evaluation(models.Model):
    """One measurement, published by its job. ``results`` is the summary document; its digest binds approvals."""

    variant = models.ForeignKey("Checkpoint", models.RESTRICT, related_name="evaluations")
    artifact = models.ForeignKey("Artifact", models.RESTRICT, null=True, related_name="evaluations")
    text_set = models.ForeignKey(SampleSet, models.RESTRICT, null=True, related_name="+")
    choice_set = models.ForeignKey(SampleSet, models.RESTRICT, null=True, related_name="+")
    job = models.OneToOneField("Job", models.RESTRICT, related_name="evaluation")
    digest = models.CharField(max_length=64)  # of the summary step's output
    results = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)
    is_demo = models.BooleanField(default=False)

    class Meta:
        ordering = ["-created_at"]
        constraints = [
            models.CheckConstraint(condition=models.Q(digest__regex=SHA256), name="evaluation_digest_is_sha256"),
        ]
