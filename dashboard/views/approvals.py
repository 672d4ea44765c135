"""Approvals: the list, the request, the memo that an approver decides on, and the policy behind it."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from dashboard.forms.releases import DecisionForm, PolicyForm, ReasonForm, RequestForm
from dashboard.lifecycle import ApprovalState, Refused
from dashboard.models import Approval, Policy
from dashboard.permissions import allows, rule
from dashboard.selectors import memo, registry
from dashboard.selectors.approvals import policy_active
from dashboard.services.approvals import approval_decide, approval_request, approval_revoke, policy_create
from dashboard.services.releases import rehearsal_create
from dashboard.verdicts import evaluate_policy
from dashboard.views.answers import SignedInRequest, attempt, found, live


@rule("page.view")
@require_GET
def approval_list(request: HttpRequest) -> HttpResponse:
    state = request.GET.get("state", "")
    approvals = memo.approval_list(state if state in ApprovalState.values else "")
    rows = [
        (one, evaluate_policy(one.policy.rules, one.evaluation.results, one.artifact.true_ratio)) for one in approvals
    ]
    return render(request, "approvals/list.html", {"rows": rows, "state": state, "states": ApprovalState.choices})


@rule("approval.request")
@require_http_methods(["GET", "POST"])
def approval_new(request: SignedInRequest, pk: int) -> HttpResponse:
    artifact = found(lambda: registry.artifact_get(pk))
    latest = artifact.evaluations.order_by("-created_at").first()
    form = RequestForm(request.POST or None, artifact=artifact, initial={"evaluation": latest})
    status = 200
    if request.method == "POST":
        status = 422
        if form.is_valid():
            evaluation, note = form.cleaned_data["evaluation"], form.cleaned_data["note"]
            approval, status = attempt(
                form,
                lambda: approval_request(actor=request.user, artifact=artifact, evaluation=evaluation, note=note),
            )
            if approval is not None:
                messages.success(request, _("Asked for approval; a manager decides."))
                return redirect("approval-detail", approval.pk)
    policy = policy_active()
    checks = evaluate_policy(policy.rules if policy else [], latest.results if latest else None, artifact.true_ratio)
    context = {"artifact": artifact, "form": form, "checks": checks, "latest": latest}
    return render(request, "approvals/new.html", context, status=status)


@rule("page.view")
@require_GET
def approval_detail(request: SignedInRequest, pk: int) -> HttpResponse:
    return _memo_page(request, found(lambda: memo.approval_get(pk)), DecisionForm())


def _memo_page(request: SignedInRequest, approval: Approval, form: DecisionForm, status: int = 200) -> HttpResponse:
    facts = memo.memo(approval)
    context = {
        "approval": approval,
        "memo": facts,
        "form": form,
        "revoke_form": ReasonForm(auto_id="revoke_%s"),
        "hindrance": memo.decision_hindrance(request.user, approval),
        "may_revoke": approval.state == ApprovalState.APPROVED and allows(request.user.role, "approval.decide"),
        "flips": (approval.evaluation.results.get("flips") or {}),
        "deployments": approval.deployments.select_related("environment", "created_by"),
    }

    def page() -> dict[str, object]:
        return context

    version = (approval.state, facts.certificate and facts.certificate.pk, facts.rehearsal and facts.rehearsal.state)
    response = live(request, "approvals/detail.html", "wayback", page, version)
    response.status_code = status if response.status_code == 200 else response.status_code
    return response


@rule("approval.decide")
@require_POST
def approval_decide_page(request: SignedInRequest, pk: int) -> HttpResponse:
    approval = found(lambda: memo.approval_get(pk))
    form = DecisionForm(request.POST)
    status = 422
    if form.is_valid():
        approve, reason = form.cleaned_data["decision"] == "approve", form.cleaned_data["reason"]
        decided, status = attempt(
            form, lambda: approval_decide(actor=request.user, approval=approval, approve=approve, reason=reason)
        )
        if decided is not None:
            words = _("Approved: ops may deploy it now.") if approve else _("Rejected; the reason is kept with it.")
            messages.success(request, words)
            return redirect("approval-detail", pk)
    return _memo_page(request, found(lambda: memo.approval_get(pk)), form, status)


@rule("approval.decide")
@require_POST
def approval_revoke_page(request: SignedInRequest, pk: int) -> HttpResponse:
    approval = found(lambda: memo.approval_get(pk))
    form = ReasonForm(request.POST)
    if not form.is_valid():
        messages.error(request, _("Say why: the reason is kept in the history."))
        return redirect("approval-detail", pk)
    try:
        approval_revoke(actor=request.user, approval=approval, reason=form.cleaned_data["reason"])
    except Refused as error:
        messages.error(request, str(error))
    else:
        messages.success(request, _("The approval is taken back. What is deployed stays until somebody rolls back."))
    return redirect("approval-detail", pk)


@rule("rehearsal.create")
@require_POST
def rehearsal_create_page(request: SignedInRequest, name: str) -> HttpResponse:
    checkpoint = found(lambda: registry.checkpoint_get(name))
    try:
        job = rehearsal_create(actor=request.user, variant=checkpoint)
    except Refused as error:
        messages.error(request, str(error))
        return redirect("checkpoint-detail", name)
    return redirect("job-detail", job.pk)


@rule("page.view")
@require_GET
def policy(request: HttpRequest) -> HttpResponse:
    return _policy_page(request, PolicyForm(policy=policy_active()))


def _policy_page(request: HttpRequest, form: PolicyForm, status: int = 200) -> HttpResponse:
    active = policy_active()
    context = {
        "form": form,
        "active": active,
        "checks": evaluate_policy(active.rules if active else [], None, 0),
        "versions": Policy.objects.select_related("created_by")[:20],
    }
    return render(request, "approvals/policy.html", context, status=status)


@rule("policy.change")
@require_POST
def policy_change(request: SignedInRequest) -> HttpResponse:
    form = PolicyForm(request.POST, policy=policy_active())
    status = 422
    if form.is_valid():
        made, status = attempt(form, lambda: policy_create(actor=request.user, rules=form.rules))
        if made is not None:
            messages.success(request, _("Policy %(version)s is in force.") % {"version": made.version})
            return redirect("policy")
    return _policy_page(request, form, status)
