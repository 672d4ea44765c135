"""The first page, which differs by role, and the search over everything."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET

from dashboard.lifecycle import Role
from dashboard.models import Checkpoint
from dashboard.permissions import rule
from dashboard.selectors import environments, jobs, memo, registry
from dashboard.selectors import waiting as reasons
from dashboard.views.answers import live

SECTIONS: dict[str, tuple[str, ...]] = {
    Role.ENGINEER: ("running", "trouble", "approvals", "environments"),
    Role.MANAGER: ("approvals", "saved", "environments", "running"),
    Role.OPS: ("environments", "rollbacks", "approvals", "running", "trouble"),
    Role.ADMIN: ("running", "trouble", "environments", "approvals"),
    Role.VIEWER: ("environments", "running", "approvals"),
}


@rule("page.view")
@require_GET
def overview(request: HttpRequest) -> HttpResponse:
    sections = SECTIONS.get(getattr(request.user, "role", ""), SECTIONS[Role.VIEWER])
    active = jobs.jobs_active()
    trouble = jobs.jobs_in_trouble() if "trouble" in sections else []
    waiting = list(memo.approvals_waiting())
    statuses = environments.environment_statuses()

    def context() -> dict[str, object]:
        before, after = registry.saved_bytes()
        return {
            "sections": sections,
            "active": active,
            "waits": reasons.waits(active),
            "trouble": trouble,
            "waiting": waiting,
            "statuses": statuses,
            "rollbacks": environments.rollbacks_recent() if "rollbacks" in sections else [],
            "before": before,
            "after": after,
            "is_empty": not Checkpoint.objects.exists(),
            "is_moving": bool(active) or any(status.is_moving for status in statuses),
        }

    version = (
        jobs.jobs_version(active),
        reasons.reasons_clock(active),
        jobs.jobs_version(trouble),
        [approval.pk for approval in waiting],
        [(one.environment.generation, one.tone, one.confirming, one.known) for one in statuses],
    )
    return live(request, "overview.html", "now", context, version)


@rule("page.view")
@require_GET
def search(request: HttpRequest) -> HttpResponse:
    query = request.GET.get("q", "").strip()[:200]
    found = registry.search_everything(query)
    hits = [hit for part in found.values() for hit in part]
    if len(found["jobs"]) == len(hits) == 1:
        return redirect("job-detail", found["jobs"][0].pk)
    return render(request, "search.html", {"query": query, "found": found, "is_empty": not hits})
