"""The store as the database knows it: what may be freed, what was, what is damaged, how far the scrubber has come."""

from __future__ import annotations

import pghistory
from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from dashboard.lifecycle import DamageKind, SweepKind, SweepState
from dashboard.models.registry import SHA256


@pghistory.track(
    pghistory.UpdateEvent(condition=pghistory.AnyChange("state")),
    model_name="SweepEvent",
    fields=["id", "state", "reason", "asked_by", "blobs", "bytes", "freed_blobs", "freed_bytes"],
)
class Sweep(models.Model):
    """A look through the store, and the clean-up that a person asked for on its evidence.

    Only what the preview listed is ever freed, and of that only what is still not needed when its turn comes.
    """

    state = models.CharField(max_length=16, choices=SweepState.choices, default=SweepState.LOOKING)
    reason = models.TextField(_("reason"), blank=True, default="")
    asked_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    looked_at = models.DateTimeField(null=True)
    requested_at = models.DateTimeField(null=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    older_than = models.DateTimeField(null=True)  # only what was last written before
    store_blobs = models.BigIntegerField(default=0)
    store_bytes = models.BigIntegerField(default=0)
    totals = models.JSONField(default=dict)  # kind -> {"blobs", "bytes"}
    blobs = models.BigIntegerField(default=0)
    bytes = models.BigIntegerField(default=0)
    temporary_files = models.BigIntegerField(default=0)
    temporary_bytes = models.BigIntegerField(default=0)
    unreadable = models.JSONField(default=list)  # documents without which nobody knows what is needed
    condemned = models.JSONField(default=dict)  # key of a finished step -> its output, which nobody may reuse any more
    condemned_in = models.BigIntegerField(null=True)  # the transaction that said so
    freed_blobs = models.BigIntegerField(default=0)
    freed_bytes = models.BigIntegerField(default=0)
    kept_blobs = models.BigIntegerField(default=0)  # needed again since the preview

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.CheckConstraint(condition=models.Q(state__in=SweepState.values), name="sweep_state_known"),
            models.CheckConstraint(
                condition=~models.Q(reason="") | models.Q(state__in=[SweepState.LOOKING, SweepState.PREVIEWED]),
                name="sweep_has_a_reason",
            ),
            *(
                models.UniqueConstraint(fields=["state"], condition=models.Q(state=state), name=f"sweep_one_{state}")
                for state in ("looking", "previewed", "requested", "running")
            ),
        ]

    @property
    def expected_bytes(self) -> int:
        """Of the listed blobs and of temporary files together."""
        return self.bytes + self.temporary_bytes


class SweepBlob(models.Model):
    """One blob of a preview, and what became of it."""

    class State(models.TextChoices):
        PLANNED = "planned", _("Planned")
        REMOVING = "removing", _("Being removed")  # written down before, so that a kill in between loses no count
        FREED = "freed", _("Freed")
        KEPT = "kept", _("Kept")  # it is needed again
        GONE = "gone", _("Gone before")

    sweep = models.ForeignKey(Sweep, models.CASCADE, related_name="listed")
    digest = models.CharField(max_length=64)
    kind = models.CharField(max_length=16, choices=SweepKind.choices)
    size = models.BigIntegerField()
    state = models.CharField(max_length=16, choices=State.choices, default=State.PLANNED)

    class Meta:
        ordering = ["sweep_id", "-size", "digest"]
        indexes = [models.Index(fields=["sweep", "state"], name="sweep_blob_todo")]
        constraints = [
            models.UniqueConstraint(fields=["sweep", "digest"], name="sweep_blob_once"),
            models.CheckConstraint(condition=models.Q(digest__regex=SHA256), name="sweep_blob_is_sha256"),
        ]


class Damage(models.Model):
    """A blob that did not match its digest, or was not there, and whether it is whole again."""

    digest = models.CharField(max_length=64)
    kind = models.CharField(max_length=16, choices=DamageKind.choices)
    detail = models.TextField()
    concerns = models.JSONField(default=list)  # [{"kind": "artifact", "pk": 3, "name": "…"}]
    found_at = models.DateTimeField()
    seen_at = models.DateTimeField()
    mended_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-found_at"]
        constraints = [
            models.UniqueConstraint(
                fields=["digest"], condition=models.Q(mended_at__isnull=True), name="damage_open_once"
            ),
        ]


class Scrub(models.Model):
    """How far the hashing of the whole store has come, and whose turn it is to tend the store. There is one row."""

    cursor = models.CharField(max_length=64, blank=True, default="")  # the last digest that was hashed
    started_at = models.DateTimeField(null=True)  # of the cycle under way
    blobs = models.BigIntegerField(default=0)
    bytes = models.BigIntegerField(default=0)
    is_over = models.BooleanField(default=True)  # this cycle has seen all; the next begins when its time comes
    last_started_at = models.DateTimeField(null=True)
    last_finished_at = models.DateTimeField(null=True)
    last_blobs = models.BigIntegerField(default=0)
    last_bytes = models.BigIntegerField(default=0)
    turn_until = models.DateTimeField(null=True)
    trouble = models.TextField(blank=True, default="")  # why the last turn did not get through
    trouble_at = models.DateTimeField(null=True)
