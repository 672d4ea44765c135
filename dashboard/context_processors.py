"""What every page carries: what production serves now, what the person may do, how many approvals wait."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.utils import timezone
from django.utils.functional import SimpleLazyObject

from dashboard.lifecycle import ApprovalState
from dashboard.models import Approval
from dashboard.permissions import RULES, allows
from dashboard.selectors.environments import production_status


def shell(request: HttpRequest) -> dict[str, Any]:
    """Lazy: a page that shows no top bar (a partial, an error) asks the database nothing."""
    user = getattr(request, "user", None)
    signed_in = bool(user and user.is_authenticated)
    role = getattr(user, "role", "") if signed_in else ""
    return {
        "can": {action.replace(".", "_"): allows(role, action) for action in RULES},
        "theme": getattr(user, "theme", "auto") if signed_in else "auto",
        "production": SimpleLazyObject(production_status) if signed_in else None,
        "waiting_approvals": SimpleLazyObject(_waiting) if signed_in else 0,
    }


def _waiting() -> int:
    return Approval.objects.filter(state=ApprovalState.PENDING, expires_at__gt=timezone.now()).count()
