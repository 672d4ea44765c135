"""Full precision kept as its difference from the base, and whether a variant's own weights were given up for it.

What must never break is repeated here as triggers: weights are given up only while no environment stands on them, what
environments stand on has its own weights, and an escrow that is the only way back to full precision stays.
"""

from __future__ import annotations

import pghistory
import pgtrigger
from django.conf import settings
from django.db import models

from dashboard.models.registry import SHA256, Checkpoint

STANDS_ON = """
    EXISTS (SELECT 1 FROM dashboard_environment e
            JOIN dashboard_deployment d ON d.id = e.active_id
            LEFT JOIN dashboard_deployment r ON r.id = d.replaces_id
            WHERE {variant} IN (d.variant_id, r.variant_id))
"""
"""Whether an environment answers from a variant, or did so before: those two are its way back."""


@pghistory.track(model_name="EscrowEvent", fields=["id", "variant", "digest", "released_at"])
class Escrow(models.Model):
    """A variant's checkpoint, bit for bit, against its base. ``released_at``: its own weights are no longer kept."""

    variant = models.OneToOneField(Checkpoint, models.RESTRICT, related_name="escrow")
    base = models.ForeignKey(Checkpoint, models.RESTRICT, related_name="escrows_on_base")
    job = models.OneToOneField("Job", models.RESTRICT, related_name="escrow")
    digest = models.CharField(max_length=64)  # of manifest.json
    source_bytes = models.BigIntegerField()  # the variant's weight files
    escrow_bytes = models.BigIntegerField()  # every file of the escrow, the manifest included
    ledger = models.JSONField()  # [{"name", "bytes"}] adding up to escrow_bytes
    released_at = models.DateTimeField(null=True)
    released_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=models.Q(digest__regex=SHA256), name="escrow_digest_is_sha256"),
            models.CheckConstraint(condition=~models.Q(base=models.F("variant")), name="escrow_has_another_base"),
        ]
        triggers = [
            pgtrigger.ReadOnly(name="what_is_kept_never_changes", fields=["variant", "base", "digest"]),
            pgtrigger.Trigger(
                name="weights_in_use_stay",
                operation=pgtrigger.Insert | pgtrigger.Update,
                when=pgtrigger.Before,
                condition=pgtrigger.Q(new__released_at__isnull=False),
                func=f"""
                    IF {STANDS_ON.format(variant="NEW.variant_id")} THEN
                        RAISE EXCEPTION 'weights that an environment stands on are not given up';
                    END IF;
                    RETURN NEW;
                """,
            ),
            pgtrigger.Trigger(
                name="the_only_way_back_stays",
                operation=pgtrigger.Delete,
                when=pgtrigger.After,
                timing=pgtrigger.Deferred,
                func=f"""
                    IF EXISTS (SELECT 1 FROM dashboard_checkpoint WHERE id = OLD.variant_id) AND
                       (OLD.released_at IS NOT NULL OR {STANDS_ON.format(variant="OLD.variant_id")}) THEN
                        RAISE EXCEPTION 'an escrow stays while its variant needs it for full precision';
                    END IF;
                    RETURN NULL;
                """,
            ),
        ]

    def __str__(self) -> str:
        return f"escrow of {self.variant}"

    @property
    def is_released(self) -> bool:
        """Whether the variant's own weights were given up: full precision is then reached through this alone."""
        return self.released_at is not None

    @property
    def ratio(self) -> float:
        """Bytes of a second copy of the weights over every byte of the escrow."""
        return self.source_bytes / self.escrow_bytes
