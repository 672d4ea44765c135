"""Policy, approvals, environments and their deployments, what servers report, and rehearsed rollbacks.

The few rules that must never break are repeated here as constraints and triggers, so that no code path, shell or
script gets around them: nobody approves what they asked for, a compressed deployment needs a live approval for
exactly its digests, and an environment's generation only grows by one.
"""

from __future__ import annotations

import pghistory
import pgtrigger
from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from dashboard.lifecycle import ApprovalState, DeploymentKind, DeploymentState
from dashboard.models.registry import SHA256


@pghistory.track(model_name="PolicyEvent", fields=["id", "version", "digest", "active"])
class Policy(models.Model):
    """The checks an artifact has to pass. A version never changes; exactly one is active."""

    version = models.PositiveIntegerField(unique=True)
    rules = models.JSONField()  # [{"check", "limit", "severity": "block" | "warn"}]
    digest = models.CharField(max_length=64)
    active = models.BooleanField(default=False)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, null=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-version"]
        constraints = [
            models.UniqueConstraint(fields=["active"], condition=models.Q(active=True), name="policy_one_active"),
        ]


@pghistory.track(
    model_name="ApprovalEvent", fields=["id", "artifact", "evaluation", "state", "requested_by", "decided_by", "reason"]
)
class Approval(models.Model):
    """A request and its decision, bound to what was looked at: artifact, evaluation, base and policy, by digest."""

    artifact = models.ForeignKey("Artifact", models.RESTRICT, related_name="approvals")
    evaluation = models.ForeignKey("Evaluation", models.RESTRICT, related_name="approvals")
    policy = models.ForeignKey(Policy, models.RESTRICT)
    artifact_digest = models.CharField(max_length=64)
    evaluation_digest = models.CharField(max_length=64)
    base_fingerprint = models.CharField(max_length=64)
    policy_digest = models.CharField(max_length=64)
    state = models.CharField(max_length=16, choices=ApprovalState.choices, default=ApprovalState.PENDING)
    requested_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, related_name="+")
    submitted_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, related_name="+")  # queued the job
    requested_at = models.DateTimeField(auto_now_add=True)
    note = models.TextField(_("note"), blank=True, default="")
    decided_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, null=True, related_name="+")
    decided_at = models.DateTimeField(null=True)
    reason = models.TextField(_("reason"), blank=True, default="")
    expires_at = models.DateTimeField()  # of the request while pending, of the approval once approved
    is_demo = models.BooleanField(default=False)

    class Meta:
        ordering = ["-requested_at"]
        constraints = [
            models.CheckConstraint(
                condition=~models.Q(decided_by=models.F("requested_by"))
                & ~models.Q(decided_by=models.F("submitted_by"))
                | models.Q(decided_by__isnull=True),
                name="approval_not_by_its_submitter",
            ),
            models.CheckConstraint(
                condition=models.Q(state=ApprovalState.PENDING, decided_by__isnull=True)
                | models.Q(state=ApprovalState.EXPIRED, decided_by__isnull=True)
                | models.Q(
                    state__in=[ApprovalState.APPROVED, ApprovalState.REJECTED, ApprovalState.REVOKED],
                    decided_by__isnull=False,
                    decided_at__isnull=False,
                ),
                name="approval_decided_by_somebody",
            ),
            models.UniqueConstraint(
                fields=["artifact"], condition=models.Q(state=ApprovalState.PENDING), name="approval_one_pending"
            ),
        ]
        triggers = [
            pgtrigger.Trigger(
                name="bound_digests_never_change",
                operation=pgtrigger.Update,
                when=pgtrigger.Before,
                condition=pgtrigger.AnyChange(
                    "artifact",
                    "evaluation",
                    "policy",
                    "artifact_digest",
                    "evaluation_digest",
                    "base_fingerprint",
                    "policy_digest",
                    "requested_by",
                    "submitted_by",
                ),
                func="RAISE EXCEPTION 'an approval stays bound to what was looked at';",
            ),
        ]


class Environment(models.Model):
    """Where clients ask (``staging``, ``production``). Its pointer moves only by compare-and-swap on ``generation``.

    ``epoch`` is raised after the database was set back to an older state: servers order by epoch and generation, and
    refuse to go back in that order.
    """

    name = models.SlugField(_("name"), max_length=40, unique=True)
    alias = models.CharField(max_length=100, unique=True)  # the model name clients use; never changes on rollback
    epoch = models.PositiveBigIntegerField(default=1, db_default=1)
    generation = models.PositiveBigIntegerField(default=0)
    active = models.OneToOneField("Deployment", models.RESTRICT, null=True, blank=True, related_name="active_in")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["name"]
        triggers = [
            pgtrigger.Trigger(
                name="generation_grows_by_one",
                operation=pgtrigger.Update,
                when=pgtrigger.Before,
                condition=pgtrigger.AnyChange("generation", "active"),
                func="""
                    IF NEW.generation <> OLD.generation + 1 OR NEW.active_id IS NOT DISTINCT FROM OLD.active_id THEN
                        RAISE EXCEPTION 'the generation of an environment grows by one with each deployment';
                    END IF;
                    IF NOT EXISTS (SELECT 1 FROM dashboard_deployment d WHERE d.id = NEW.active_id
                                   AND d.environment_id = NEW.id AND d.generation = NEW.generation) THEN
                        RAISE EXCEPTION 'an environment can only point at a deployment of its own generation';
                    END IF;
                    RETURN NEW;
                """,
            ),
            pgtrigger.Trigger(
                name="epoch_only_grows",
                operation=pgtrigger.Update,
                when=pgtrigger.Before,
                condition=pgtrigger.Q(new__epoch__lt=pgtrigger.F("old__epoch")),
                func="RAISE EXCEPTION 'the epoch of an environment only grows';",
            ),
        ]

    def __str__(self) -> str:
        return self.name


@pghistory.track(
    model_name="DeploymentEvent",
    fields=["id", "environment", "generation", "kind", "artifact", "variant", "approval", "state", "reason"],
)
class Deployment(models.Model):
    """One generation of an environment: what it serves, why, by whom. ``artifact`` is null at full precision."""

    environment = models.ForeignKey(Environment, models.RESTRICT, related_name="deployments")
    generation = models.PositiveBigIntegerField()
    kind = models.CharField(max_length=16, choices=DeploymentKind.choices)
    variant = models.ForeignKey("Checkpoint", models.RESTRICT, related_name="deployments")  # and the way back
    base = models.ForeignKey("Checkpoint", models.RESTRICT, null=True, related_name="+")
    artifact = models.ForeignKey("Artifact", models.RESTRICT, null=True, related_name="deployments")
    approval = models.ForeignKey(Approval, models.RESTRICT, null=True, related_name="deployments")
    replaces = models.ForeignKey("self", models.RESTRICT, null=True, related_name="+")
    digest = models.CharField(max_length=64)  # what answers: the artifact's, or the variant's checkpoint digest
    state = models.CharField(max_length=16, choices=DeploymentState.choices, default=DeploymentState.REQUESTED)
    reason = models.TextField(_("reason"))
    detail = models.TextField(blank=True, default="")  # what a server said when it refused
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    live_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)
    is_demo = models.BooleanField(default=False)

    class Meta:
        ordering = ["environment_id", "-generation"]
        constraints = [
            models.UniqueConstraint(fields=["environment", "generation"], name="deployment_generation_once"),
            models.CheckConstraint(condition=models.Q(digest__regex=SHA256), name="deployment_digest_is_sha256"),
            models.CheckConstraint(
                condition=models.Q(
                    kind=DeploymentKind.COMPRESSED, artifact__isnull=False, approval__isnull=False, base__isnull=False
                )
                | (~models.Q(kind=DeploymentKind.COMPRESSED) & models.Q(artifact__isnull=True)),
                name="deployment_compressed_needs_approval",
            ),
            models.CheckConstraint(condition=~models.Q(reason=""), name="deployment_has_a_reason"),
        ]
        triggers = [
            pgtrigger.Trigger(
                name="compressed_needs_live_approval",
                operation=pgtrigger.Insert,
                when=pgtrigger.Before,
                condition=pgtrigger.Q(new__kind=DeploymentKind.COMPRESSED),
                func="""
                    IF NOT EXISTS (
                        SELECT 1
                        FROM dashboard_approval a
                        JOIN dashboard_artifact t ON t.id = a.artifact_id
                        JOIN dashboard_evaluation e ON e.id = a.evaluation_id
                        JOIN dashboard_checkpoint b ON b.id = t.base_id
                        JOIN dashboard_policy p ON p.id = a.policy_id
                        WHERE a.id = NEW.approval_id AND a.artifact_id = NEW.artifact_id
                          AND a.state = 'approved' AND a.expires_at > clock_timestamp()
                          AND a.decided_by_id <> a.requested_by_id AND a.decided_by_id <> a.submitted_by_id
                          AND t.state = 'published' AND t.digest = a.artifact_digest AND t.digest = NEW.digest
                          AND t.base_id = NEW.base_id AND t.variant_id = NEW.variant_id
                          AND e.digest = a.evaluation_digest AND e.artifact_id = a.artifact_id
                          AND b.fingerprint = a.base_fingerprint
                          AND p.active AND p.digest = a.policy_digest
                    ) THEN
                        RAISE EXCEPTION 'a compressed deployment needs a live approval of exactly its digests';
                    END IF;
                    RETURN NEW;
                """,
            ),
            pgtrigger.Trigger(
                name="full_precision_is_at_hand",
                operation=pgtrigger.Insert,
                when=pgtrigger.Before,
                func="""
                    PERFORM 1 FROM dashboard_escrow WHERE variant_id = NEW.variant_id FOR SHARE;
                    IF EXISTS (SELECT 1 FROM dashboard_escrow
                               WHERE variant_id = NEW.variant_id AND released_at IS NOT NULL) THEN
                        RAISE EXCEPTION 'a variant whose weights were given up is restored before it is deployed';
                    END IF;
                    RETURN NEW;
                """,
            ),
            pgtrigger.ReadOnly(
                name="what_was_deployed_never_changes",
                fields=["environment", "generation", "kind", "variant", "base", "artifact", "approval", "digest"],
            ),
        ]

    def __str__(self) -> str:
        return f"{self.environment} · {self.generation}"


class ServerReport(models.Model):
    """What one serving process last said of an environment. Written by the server's own role, read by pages."""

    server = models.CharField(max_length=100)
    environment = models.CharField(max_length=40)
    address = models.CharField(max_length=200, blank=True, default="")
    epoch = models.BigIntegerField(default=1, db_default=1)  # of ``wanted``; 1 from a server that knows no epochs
    wanted = models.BigIntegerField(default=0)  # the newest generation it was told of: loading, refused or answering
    generation = models.BigIntegerField(default=0)  # the generation it answers from
    digest = models.CharField(max_length=64, blank=True, default="")
    state = models.CharField(max_length=16, default="starting")  # see compression_worker.serving.switch
    message = models.TextField(blank=True, default="")
    answers = models.BigIntegerField(default=0)
    resident_bytes = models.BigIntegerField(default=0)
    started_at = models.DateTimeField()
    reported_at = models.DateTimeField()

    class Meta:
        ordering = ["environment", "server"]
        constraints = [models.UniqueConstraint(fields=["server", "environment"], name="server_report_once")]


class RollbackCertificate(models.Model):
    """A rollback that was really performed: full precision restored, every file re-hashed, a prompt answered, timed."""

    variant = models.ForeignKey("Checkpoint", models.RESTRICT, related_name="certificates")
    job = models.OneToOneField("Job", models.RESTRICT, related_name="certificate")
    digest = models.CharField(max_length=64)
    seconds = models.FloatField()
    details = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()

    class Meta:
        ordering = ["-created_at"]
