"""Releases: every environment, one environment with its servers and history, deploying, rolling back."""

from __future__ import annotations

from dataclasses import dataclass

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from dashboard.forms.releases import DeployForm, FullPrecisionForm, RollbackForm
from dashboard.lifecycle import DeploymentKind
from dashboard.models import Deployment, Environment
from dashboard.permissions import rule
from dashboard.pictures import Picture, generations_picture, ledger_picture
from dashboard.selectors import approvals, environments, escrows
from dashboard.services.releases import deployment_create, deployment_full_precision, rollback
from dashboard.views.answers import SignedInRequest, attempt, found, live


@rule("page.view")
@require_GET
def environment_list(request: HttpRequest) -> HttpResponse:
    statuses = environments.environment_statuses()
    version = tuple((one.environment.generation, one.tone, one.confirming, one.known) for one in statuses)
    context = {"statuses": statuses, "is_moving": any(status.is_moving for status in statuses)}
    return live(request, "releases/list.html", "environments", lambda: context, version)


@dataclass
class Forms:
    """The three forms of a release page; the one that was posted keeps what was typed."""

    deploy: DeployForm
    full: FullPrecisionForm
    rollback: RollbackForm

    @classmethod
    def fresh(cls, environment: Environment) -> Forms:
        seen = {"seen_generation": environment.generation}
        return cls(
            DeployForm(initial=seen, auto_id="deploy_%s"),
            FullPrecisionForm(initial=seen, auto_id="full_%s"),
            RollbackForm(initial=seen, auto_id="rollback_%s"),
        )


@rule("page.view")
@require_GET
def environment_detail(request: HttpRequest, name: str) -> HttpResponse:
    environment = found(lambda: environments.environment_get(name))
    return _release_page(request, environment, Forms.fresh(environment))


def _release_page(request: HttpRequest, environment: Environment, forms: Forms, status: int = 200) -> HttpResponse:
    present = environments.environment_status(environment)
    full = escrows.full_precision(present.deployment.variant) if present.deployment else None

    def context() -> dict[str, object]:
        history = environments.environment_history(environment)
        deployment = present.deployment
        return {
            "environment": environment,
            "status": present,
            "history": history,
            "strip": generations_picture(environments.generations(history), environment.name),
            "forms": forms,
            "deployable": environments.approvals_deployable(),
            "certificate": approvals.certificate_valid(deployment.variant) if deployment else None,
            "ledger": _ledger(deployment),
            "full": full,
            "is_full": deployment is not None and deployment.kind != DeploymentKind.COMPRESSED,
        }

    servers = [(one.report.server, one.report.generation, one.report.state, one.is_fresh) for one in present.servers]
    active = present.deployment
    version = (
        environment.generation,
        active and active.state,
        servers,
        [one.report.answers for one in present.servers],
        full and (full.escrow and full.escrow.pk, full.job and full.job.pk),
    )
    response = live(request, "releases/detail.html", "release", context, version)
    if status != 200:
        response.status_code = status
    return response


def _ledger(deployment: Deployment | None) -> Picture | None:
    """Where the bytes of what is served are; nothing at full precision."""
    artifact = deployment.artifact if deployment else None
    return ledger_picture(artifact.ledger, artifact.source_bytes) if artifact else None


@rule("deploy.deploy")
@require_POST
def deploy(request: SignedInRequest, name: str) -> HttpResponse:
    environment = found(lambda: environments.environment_get(name))
    form = DeployForm(request.POST, auto_id="deploy_%s")
    status = 422
    if form.is_valid():
        values = form.cleaned_data
        approval = values["approval"]
        made, status = attempt(
            form,
            lambda: deployment_create(
                actor=request.user,
                environment=environment,
                artifact=approval.artifact,
                approval=approval,
                reason=values["reason"],
                seen_generation=values["seen_generation"],
            ),
        )
        if made is not None:
            return _moved(request, name, made.generation)
    forms = Forms.fresh(environment)
    forms.deploy = form
    return _release_page(request, environment, forms, status)


@rule("deploy.deploy")
@require_POST
def deploy_full_precision(request: SignedInRequest, name: str) -> HttpResponse:
    environment = found(lambda: environments.environment_get(name))
    form = FullPrecisionForm(request.POST, auto_id="full_%s")
    status = 422
    if form.is_valid():
        values = form.cleaned_data
        made, status = attempt(
            form,
            lambda: deployment_full_precision(
                actor=request.user,
                environment=environment,
                variant=values["variant"],
                reason=values["reason"],
                seen_generation=values["seen_generation"],
            ),
        )
        if made is not None:
            return _moved(request, name, made.generation)
    forms = Forms.fresh(environment)
    forms.full = form
    return _release_page(request, environment, forms, status)


@rule("deploy.rollback")
@require_POST
def rollback_page(request: SignedInRequest, name: str) -> HttpResponse:
    environment = found(lambda: environments.environment_get(name))
    form = RollbackForm(request.POST, auto_id="rollback_%s")
    status = 422
    if form.is_valid():
        reason, seen = form.cleaned_data["reason"], form.cleaned_data["seen_generation"]
        made, status = attempt(
            form,
            lambda: rollback(actor=request.user, environment=environment, reason=reason, seen_generation=seen),
        )
        if made is not None:
            return _moved(request, name, made.generation)
    forms = Forms.fresh(environment)
    forms.rollback = form
    return _release_page(request, environment, forms, status)


def _moved(request: HttpRequest, name: str, generation: int) -> HttpResponse:
    words = _("%(name)s points at generation %(generation)s; below, watch the servers confirm it.")
    messages.success(request, words % {"name": name, "generation": generation})
    return redirect("environment-detail", name)
