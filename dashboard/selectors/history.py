"""Every recorded change: who, when, why; from the event rows that database triggers write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.apps import apps
from django.utils.translation import gettext_lazy as _
from pghistory.models import Events

from dashboard.glossary import Words
from dashboard.lifecycle import (
    ApprovalState,
    ArtifactState,
    CancelRequest,
    DeploymentState,
    JobState,
    Role,
    SweepState,
)
from dashboard.models import User

PAGE = 50
KINDS: dict[str, Words] = {
    "Deployment": _("Deployment"),
    "Approval": _("Approval"),
    "Artifact": _("Artifact"),
    "Checkpoint": _("Checkpoint"),
    "Escrow": _("Escrow"),
    "Evaluation": _("Evaluation"),
    "Job": _("Job"),
    "Policy": _("Policy"),
    "Study": _("Study"),
    "Sweep": _("Clean-up"),
    "User": _("User"),
}
WORDS: dict[str, Words] = {
    value: label
    for words in (SweepState, JobState, ArtifactState, ApprovalState, DeploymentState, Role, CancelRequest)
    for value, label in words.choices
}
HIDDEN = frozenset({"id", "pgh_id", "last_login"})


@dataclass(frozen=True)
class Change:
    """One recorded change. ``changed`` holds (field, before, after); for a new row only what it began with."""

    at: datetime
    kind: str
    label: Words
    key: str
    what: str
    who: str
    why: str
    is_new: bool
    changed: list[tuple[str, str, str]]


def history(
    *, kind: str = "", key: str = "", user: str = "", before: datetime | None = None, limit: int = PAGE
) -> list[Change]:
    """Newest first; ``before`` continues a page."""
    models = [f"dashboard.{name}" for name in KINDS if not kind or name == kind]
    events = Events.objects.filter(pgh_obj_model__in=models)
    if key:
        events = events.filter(pgh_obj_id=key)
    if before is not None:
        events = events.filter(pgh_created_at__lt=before)
    if user:
        found = User.objects.filter(username=user).values_list("pk", flat=True).first()
        events = events.filter(pgh_context__user=found or -1)
    rows = list(events.order_by("-pgh_created_at")[:limit])
    return _changes(rows)


def _changes(rows: Iterable[Any]) -> list[Change]:
    rows = list(rows)
    people = {str(key) for row in rows if (key := (row.pgh_context or {}).get("user"))}
    names = {str(one.pk): one.username for one in User.objects.filter(pk__in=[key for key in people if key.isdigit()])}
    return [_change(row, names) for row in rows]


def _change(row: Any, names: dict[str, str]) -> Change:
    kind = row.pgh_obj_model.rsplit(".", 1)[-1]
    data, context = row.pgh_data or {}, row.pgh_context or {}
    return Change(
        at=row.pgh_created_at,
        kind=kind,
        label=KINDS[kind],
        key=str(row.pgh_obj_id),
        what=_what(data),
        who=names.get(str(context.get("user")), ""),
        why=str(context.get("reason") or data.get("reason") or ""),
        is_new=row.pgh_label == "insert",
        changed=[
            (field, _short(_word(before)), _short(_word(after)))
            for field, (before, after) in (row.pgh_diff or {}).items()
            if field not in HIDDEN
        ],
    )


def _what(data: dict[str, Any]) -> str:
    """The most telling words of a row."""
    for field in ("title", "name", "username"):
        if data.get(field):
            return str(data[field])
    if "generation" in data:
        return f"→ {data['generation']} · {data.get('kind', '')}"
    return ""


def _word(value: object) -> object:
    """A stored word (``queued``, ``ops``) as people read it."""
    return WORDS.get(value, value) if isinstance(value, str) else value


def _short(value: object) -> str:
    text = "–" if value is None or value == "" else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def tracked_models() -> list[str]:
    """The names of all models that keep a history, to check that none is missing here."""
    return sorted(
        model.pgh_tracked_model.__name__
        for model in apps.get_app_config("dashboard").get_models()
        if hasattr(model, "pgh_tracked_model")
    )
