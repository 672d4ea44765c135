"""What environments serve now, what each server confirms, and what could be deployed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from django.conf import settings
from django.db.models import BooleanField, Case, Exists, F, OuterRef, Q, QuerySet, Value, When
from django.utils import timezone
from django.utils.translation import gettext as _

from dashboard.lifecycle import ApprovalState, ArtifactState, DeploymentKind, DeploymentState
from dashboard.models import Approval, Deployment, Environment, RollbackCertificate, ServerReport
from dashboard.pictures import Generation


@dataclass(frozen=True)
class Server:
    """A server's last report, judged: is it fresh, and does it answer from the generation we point at?"""

    report: ServerReport
    is_fresh: bool
    confirms: bool


@dataclass(frozen=True)
class Status:
    """An environment as the top bar and the release page tell it."""

    environment: Environment
    deployment: Deployment | None
    servers: list[Server] = field(default_factory=list)

    @property
    def what(self) -> str:
        return deployment_words(self.deployment) if self.deployment else _("nothing yet")

    @property
    def confirming(self) -> int:
        return sum(server.confirms for server in self.servers)

    @property
    def known(self) -> int:
        return sum(server.is_fresh for server in self.servers)

    @property
    def tone(self) -> str:
        if self.deployment is None:
            return "neutral"
        if self.deployment.state == DeploymentState.REFUSED:
            return "bad"
        return "good" if self.known and self.confirming == self.known else "caution"

    @property
    def is_moving(self) -> bool:
        """Whether something is still to happen, so that a page should look again."""
        return self.deployment is not None and (
            self.deployment.state in (DeploymentState.REQUESTED, DeploymentState.LOADING)
            or self.confirming < self.known
        )


def deployment_words(deployment: Deployment) -> str:
    """``support-ja @ bitdelta`` or ``support-ja @ full precision``."""
    if deployment.artifact is not None:
        return f"{deployment.variant.name} @ {deployment.artifact.method}"
    return f"{deployment.variant.name} @ {_('full precision')}"


def _with_active(environments: QuerySet[Environment]) -> QuerySet[Environment]:
    return environments.select_related("active__variant", "active__artifact", "active__created_by", "active__base")


def environment_statuses() -> list[Status]:
    """Every environment with its active deployment and servers, in two queries."""
    return _statuses(list(_with_active(Environment.objects.all())))


def environment_status(environment: Environment) -> Status:
    return _statuses([environment])[0]


def production_status() -> Status | None:
    """The environment that the top bar speaks of: ``production``, or the only one there is."""
    environments = list(_with_active(Environment.objects.all())[:20])
    chosen = [one for one in environments if one.name == "production"] or environments[:1]
    return _statuses(chosen)[0] if chosen else None


def _statuses(environments: list[Environment]) -> list[Status]:
    reports: dict[str, list[ServerReport]] = defaultdict(list)
    names = [environment.name for environment in environments]
    for report in ServerReport.objects.filter(environment__in=names).order_by("server"):
        reports[report.environment].append(report)
    fresh_since = timezone.now() - timedelta(seconds=settings.SERVER_STALE_SECONDS)
    return [
        Status(one, one.active, [_server(report, one, fresh_since) for report in reports[one.name]])
        for one in environments
    ]


def _server(report: ServerReport, environment: Environment, fresh_since: datetime) -> Server:
    is_fresh = report.reported_at >= fresh_since
    confirms = is_fresh and report.state == "serving" and report.generation == environment.generation
    return Server(report, is_fresh, confirms)


def environment_get(name: str) -> Environment:
    return _with_active(Environment.objects.all()).get(name=name)


def environment_history(environment: Environment, limit: int = 50) -> list[Deployment]:
    """Newest first."""
    deployments = environment.deployments.select_related(
        "variant", "artifact", "created_by", "approval", "replaces__variant", "replaces__artifact"
    )
    return list(deployments.order_by("-generation")[:limit])


def generations(history: Iterable[Deployment], limit: int = 12) -> list[Generation]:
    """The latest deployments, oldest first, for the strip."""
    newest = list(history)[:limit]
    return [
        Generation(
            number=one.generation,
            what=deployment_words(one),
            kind=DeploymentKind(one.kind),
            state=DeploymentState(one.state),
            start=one.created_at,
            end=one.ended_at,
            who=str(one.created_by or ""),
            reason=one.reason,
        )
        for one in reversed(newest)
    ]


def approvals_deployable() -> QuerySet[Approval]:
    """Approvals that are live; the service and the database look again when one is used."""
    approved = Approval.objects.annotate(holds=approval_holds()).filter(state=ApprovalState.APPROVED, holds=True)
    related = approved.select_related("artifact__variant", "artifact__base", "evaluation", "policy", "decided_by")
    return related.order_by("-decided_at")


def approval_holds() -> Case:
    """Exactly the reasons that ``selectors.approvals.approval_problems`` names, as one condition."""
    rolled_back = Deployment.objects.filter(
        kind=DeploymentKind.ROLLBACK,
        replaces__artifact=OuterRef("artifact"),
        created_at__gte=OuterRef("requested_at"),
    )
    unchanged = Q(
        artifact__digest=F("artifact_digest"),
        artifact__state=ArtifactState.PUBLISHED,
        artifact__base__fingerprint=F("base_fingerprint"),
        evaluation__digest=F("evaluation_digest"),
        policy__active=True,
        policy__digest=F("policy_digest"),
        expires_at__gt=timezone.now(),
    )
    return Case(
        When(Exists(rolled_back), then=Value(False)),
        When(unchanged, then=Value(True)),
        default=Value(False),
        output_field=BooleanField(),
    )


def certificate_latest(variant_id: int) -> RollbackCertificate | None:
    return RollbackCertificate.objects.filter(variant_id=variant_id).order_by("-created_at").first()


def rollbacks_recent(limit: int = 5) -> list[Deployment]:
    return list(
        Deployment.objects.filter(kind=DeploymentKind.ROLLBACK)
        .select_related("environment", "variant", "artifact", "created_by", "replaces__variant", "replaces__artifact")
        .order_by("-created_at")[:limit]
    )
