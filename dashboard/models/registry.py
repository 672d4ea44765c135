"""Checkpoints (bases and their fine-tuned variants) and the artifacts made from them, each named by digest."""

from __future__ import annotations

import pghistory
from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from dashboard.lifecycle import ArtifactState

SHA256 = r"^[0-9a-f]{64}$"


@pghistory.track(model_name="CheckpointEvent", fields=["id", "name", "digest", "fingerprint"])
class Checkpoint(models.Model):
    """Full-precision weights, as imported: a base model when it has no ``base``, a variant of that base otherwise."""

    name = models.SlugField(_("name"), max_length=100, unique=True)
    base = models.ForeignKey("self", models.RESTRICT, null=True, blank=True, related_name="variants")
    digest = models.CharField(max_length=64)  # of the checkpoint manifest in the store
    fingerprint = models.CharField(max_length=64)  # of tensors, config and tokenizer
    manifest = models.JSONField()  # the manifest itself without its tensor digests: files, dtypes, architecture …
    size_bytes = models.BigIntegerField()
    parameters = models.BigIntegerField()
    dtype = models.CharField(max_length=32)
    architecture = models.CharField(max_length=100)
    licence = models.CharField(max_length=100, blank=True, default="")
    differences = models.JSONField(
        default=list
    )  # against the base: one entry a tensor that differs in shape or presence
    job = models.ForeignKey("Job", models.SET_NULL, null=True, related_name="checkpoints")
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, null=True)
    created_at = models.DateTimeField(auto_now_add=True)
    is_demo = models.BooleanField(default=False)

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(condition=models.Q(digest__regex=SHA256), name="checkpoint_digest_is_sha256"),
            models.CheckConstraint(condition=~models.Q(base=models.F("id")), name="checkpoint_is_not_its_own_base"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_base(self) -> bool:
        return self.base_id is None


@pghistory.track(model_name="ArtifactEvent", fields=["id", "name", "digest", "state", "job"])
class Artifact(models.Model):
    """What a compression job published: immutable bytes named by the digest of their manifest.

    ``base`` is what the difference was taken from. An artifact that stands alone names the checkpoint that it was made
    from twice: a base model or a variant.
    """

    name = models.CharField(_("name"), max_length=200)
    variant = models.ForeignKey(Checkpoint, models.RESTRICT, related_name="artifacts")  # what was compressed
    base = models.ForeignKey(Checkpoint, models.RESTRICT, related_name="artifacts_on_base")
    job = models.OneToOneField("Job", models.RESTRICT, related_name="artifact")
    digest = models.CharField(max_length=64)  # of manifest.json
    method = models.CharField(max_length=32)
    config = models.JSONField()
    source_bytes = models.BigIntegerField()  # the checkpoint's weight files
    artifact_bytes = models.BigIntegerField()  # every file of the artifact, the manifest included
    nominal_ratio = models.FloatField()  # as the method's paper counts
    bits_per_weight = models.FloatField()
    ledger = models.JSONField()  # [{"name", "bytes"}] adding up to artifact_bytes
    figures = models.JSONField(default=dict)  # per matrix: scale, relative error; distillation curve
    state = models.CharField(max_length=16, choices=ArtifactState.choices, default=ArtifactState.PUBLISHED)
    created_at = models.DateTimeField(auto_now_add=True)
    is_demo = models.BooleanField(default=False)

    class Meta:
        ordering = ["-created_at"]
        constraints = [
            models.CheckConstraint(condition=models.Q(digest__regex=SHA256), name="artifact_digest_is_sha256"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def stands_alone(self) -> bool:
        """Whether it holds the whole model, and not its difference from a base."""
        return self.base_id == self.variant_id

    @property
    def true_ratio(self) -> float:
        """Bytes of the checkpoint as imported over every byte of the artifact."""
        return self.source_bytes / self.artifact_bytes
