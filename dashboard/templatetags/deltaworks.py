"""Tags and filters: figures with their exact value on hover, badges, digests, glossary terms, pictures."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from django import template
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe
from django.utils.timezone import localtime
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from dashboard import formats
from dashboard.glossary import METRICS, TERMS, group_label
from dashboard.lifecycle import (
    ApprovalState,
    ArtifactState,
    AttemptOutcome,
    DeploymentState,
    JobState,
    StepState,
)
from dashboard.pictures import Picture
from dashboard.selectors.environments import deployment_words
from dashboard.selectors.registry import method_label

register = template.Library()

TONES: dict[str, str] = {
    **dict.fromkeys((JobState.SUCCEEDED, ArtifactState.PUBLISHED, DeploymentState.LIVE), "good"),
    **dict.fromkeys((ApprovalState.APPROVED, StepState.DONE, "serving"), "good"),
    **dict.fromkeys((JobState.FAILED, JobState.DEAD, ArtifactState.CORRUPT, AttemptOutcome.ERRORED), "bad"),
    **dict.fromkeys((DeploymentState.REFUSED, ApprovalState.REJECTED, ApprovalState.REVOKED, "rewound"), "bad"),
    **dict.fromkeys((ApprovalState.PENDING, JobState.BLOCKED, AttemptOutcome.KILLED), "caution"),
    **dict.fromkeys((AttemptOutcome.LOST, DeploymentState.ROLLED_BACK, "fallback"), "caution"),
    **dict.fromkeys((JobState.RUNNING, JobState.VERIFYING, DeploymentState.LOADING), "active"),
    DeploymentState.REQUESTED: "active",
}
NONE = "–"
SIGNS = {"good": "✓", "bad": "✗", "caution": "!", "active": "●", "neutral": ""}


@register.simple_tag
def badge(state: str, label: object = "", tone: str = "") -> SafeString:
    """A state as a word with a sign and a colour; never colour alone."""
    chosen = tone or TONES.get(str(state), "neutral")
    sign = SIGNS.get(chosen, "")
    mark = format_html('<span aria-hidden="true">{}</span> ', sign) if sign else ""
    return format_html('<span class="badge {}">{}{}</span>', chosen, mark, label or state)


@register.filter
def tone(state: str) -> str:
    return TONES.get(str(state), "neutral")


@register.filter(name="bytes")
def bytes_(value: int | None) -> SafeString:
    """``17.8 MB`` with the exact count on hover."""
    if value is None:
        return mark_safe(NONE)
    return format_html('<span title="{} B">{}</span>', formats.whole(value), formats.byte_words(value))


@register.filter
def whole(value: float | None) -> str:
    return "–" if value is None else formats.whole(value)


@register.filter
def ratio(value: float | None) -> SafeString | str:
    return "–" if value is None else format_html('<span title="{}">{}</span>', repr(value), formats.ratio_words(value))


@register.filter
def significant(value: float | None, digits: int = 3) -> str:
    return formats.significant(value, digits)


@register.filter
def percent(value: float | None, places: int = 1) -> str:
    return formats.percent_words(value, places)


@register.filter
def duration(value: float | timedelta | None) -> str:
    return formats.duration_words(value)


@register.filter
def count_words(value: int | None) -> SafeString | str:
    """Parameters: ``135 M`` with the exact count on hover."""
    if value is None:
        return "–"
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return format_html(
                '<span title="{}">{} {}</span>', formats.whole(value), formats.significant(value / limit), unit
            )
    return formats.whole(value)


@register.filter
def digest(value: str, length: int = 12) -> SafeString:
    """The beginning of a digest, the whole of it on hover."""
    return format_html('<span class="digest" title="{}">{}</span>', value, value[:length]) if value else mark_safe(NONE)


@register.filter
def when(value: datetime | None) -> SafeString:
    """How long ago, with the exact moment on hover."""
    if value is None:
        return mark_safe(NONE)
    local = localtime(value)
    return format_html('<time datetime="{}" title="{}">{}</time>', value.isoformat(), moment(value), ago(local))


@register.filter
def moment(value: datetime | None) -> str:
    if value is None:
        return "–"
    return f"{localtime(value):%Y-%m-%d %H:%M:%S}"


@register.filter
def clock(value: datetime | None) -> str:
    return "" if value is None else f"{localtime(value):%H:%M:%S}"


def ago(value: datetime) -> str:
    """``3 min ago``, ``in 6 d``."""
    seconds = (timezone.now() - value).total_seconds()
    words = _span(abs(seconds))
    return (_("%(span)s ago") if seconds >= 0 else _("in %(span)s")) % {"span": words}


def _span(seconds: float) -> str:
    if seconds < 90:
        return _("%(n)s s") % {"n": round(seconds)}
    if seconds < 5400:
        return _("%(n)s min") % {"n": round(seconds / 60)}
    if seconds < 172_800:
        return _("%(n)s h") % {"n": round(seconds / 3600)}
    return _("%(n)s d") % {"n": round(seconds / 86_400)}


@register.filter
def method(name: str) -> str:
    """The label of a compression method."""
    return method_label(name)


@register.filter
def deployed(deployment: Any) -> str:
    """What a deployment serves, in words."""
    return deployment_words(deployment) if deployment else "–"


@register.simple_tag
def term(key: str, label: object = "") -> SafeString:
    """A word of the glossary with its meaning on hover."""
    entry = TERMS.get(key) or METRICS[key]
    return format_html('<span class="tip" title="{}">{}</span>', entry.meaning, label or entry.label)


@register.simple_tag
def picture(drawing: Picture | None, name: str) -> SafeString | str:
    """A picture with its finding as caption and its data one key away. ``name`` keeps the details open over a poll."""
    return render_to_string("_picture.html", {"picture": drawing, "name": name}) if drawing else ""


@register.simple_tag
def word_diff(pieces: list[list[str]], side: str) -> SafeString:
    """One side of a word difference: ``before`` with what was deleted, ``after`` with what was inserted."""
    drop = "insert" if side == "before" else "delete"
    shown = [(kind, words) for kind, words in pieces if kind != drop]
    return format_html_join("", "{}", ((_marked(kind, words),) for kind, words in shown))


def _marked(kind: str, words: str) -> SafeString | str:
    if kind == "delete":
        return format_html("<del>{}</del>", words)
    return format_html("<ins>{}</ins>", words) if kind == "insert" else words


@register.simple_tag(takes_context=True)
def query(context: dict[str, Any], **changes: object) -> str:
    """The present query string with some values changed (None or '' removes one)."""
    values = context["request"].GET.copy()
    for name, value in changes.items():
        values.pop(name, None)
        if value not in (None, ""):
            values[name] = str(value)
    return f"?{values.urlencode()}"


@register.filter
def at(values: Any, key: Any) -> Any:
    """``values[key]`` or None."""
    try:
        return values[key]
    except (KeyError, IndexError, TypeError):
        return None


TARGETS = {"base": gettext_lazy("base"), "variant": gettext_lazy("variant"), "compressed": gettext_lazy("compressed")}
SERVER_STATES = {
    "starting": gettext_lazy("starting"),
    "loading": gettext_lazy("loading"),
    "serving": gettext_lazy("serving another generation"),
    "refused": gettext_lazy("refused"),
    "rewound": gettext_lazy("the database went back: not followed"),
    "fallback": gettext_lazy("serving a fallback"),
}


@register.simple_tag
def target_name(target: str, measured: Any = None) -> object:
    """``base``, ``variant``, ``compressed`` in the reader's language; ``measured`` is the checkpoint in the middle.

    A base model that was measured is nobody's variant.
    """
    if target == "variant" and getattr(measured, "is_base", False):
        return _("uncompressed")
    return TARGETS.get(target, target)


@register.simple_tag
def group_name(group: str) -> object:
    """What the steps of a job are counted in."""
    return group_label(group)


@register.simple_tag
def step_name(kind: str) -> str:
    """A kind of step (``bitdelta.distill``) as people read it."""
    return group_label(kind.partition(".")[2])


@register.simple_tag
def server_state(state: str) -> SafeString:
    return badge(state, SERVER_STATES.get(state, state))


@register.simple_tag
def trans_data(words: str) -> str:
    """Words that come from a table of the worker (a method's summary, a setting's help), translated where known."""
    return _(words) if words else ""


@register.filter
def took(job: Any) -> timedelta | None:
    """How long a job has run."""
    return ((job.finished_at or timezone.now()) - job.started_at) if job.started_at else None


@register.filter
def until_live(deployment: Any) -> timedelta | None:
    """From the request to the first server that confirmed."""
    return deployment.live_at - deployment.created_at if deployment.live_at else None
