"""Who may do what: one table of actions and roles, and the decorator with which every route names its action.

Deny by default: a view without ``@rule`` answers nobody, and a test fails on any route that has none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponseBase
from django.utils.translation import gettext as _

from dashboard.lifecycle import Role

EVERYBODY = frozenset(Role)

RULES: dict[str, frozenset[Role]] = {
    "page.view": EVERYBODY,
    "account.preferences": EVERYBODY,
    "checkpoint.import": frozenset({Role.ENGINEER, Role.ADMIN}),
    "job.create": frozenset({Role.ENGINEER, Role.ADMIN}),
    "job.cancel": frozenset({Role.ENGINEER, Role.OPS, Role.ADMIN}),
    "set.upload": frozenset({Role.ENGINEER, Role.ADMIN}),
    "approval.request": frozenset({Role.ENGINEER}),
    "rehearsal.create": frozenset({Role.ENGINEER, Role.OPS, Role.ADMIN}),
    "escrow.create": frozenset({Role.ENGINEER, Role.OPS, Role.ADMIN}),
    "escrow.release": frozenset({Role.ENGINEER, Role.OPS, Role.ADMIN}),
    "escrow.restore": frozenset({Role.ENGINEER, Role.OPS, Role.ADMIN}),
    "approval.decide": frozenset({Role.MANAGER}),
    "deploy.deploy": frozenset({Role.OPS}),
    "deploy.rollback": frozenset({Role.OPS, Role.ADMIN}),
    "artifact.retire": frozenset({Role.ENGINEER, Role.ADMIN}),
    "storage.sweep": frozenset({Role.ADMIN}),
    "policy.change": frozenset({Role.ADMIN}),
    "environment.create": frozenset({Role.ADMIN}),
    "users.manage": frozenset({Role.ADMIN}),
    "demo.remove": frozenset({Role.ADMIN}),
}

PUBLIC = "public"
"""The rule of the few routes that answer without a sign-in: sign-in itself, language, health."""

View = Callable[..., HttpResponseBase]


def allows(role: str, action: str) -> bool:
    """Whether ``role`` may do ``action``. An unknown action is allowed to nobody."""
    return role in RULES.get(action, frozenset())


def rule(action: str) -> Callable[[View], View]:
    """Name the action of a view and refuse (403) whoever may not do it. ``login_required`` comes from middleware."""

    def decorate(view: View) -> View:
        @wraps(view)
        def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            if action != PUBLIC and not allows(getattr(request.user, "role", ""), action):
                raise PermissionDenied(_("Your role does not include this action."))
            return view(request, *args, **kwargs)

        guarded.rule = action  # type: ignore[attr-defined]
        if action == PUBLIC:
            guarded.login_required = False  # type: ignore[attr-defined]
        return guarded

    return decorate
