"""What a training holds in memory, beside what other ways of training the same model hold: bars to one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _

from dashboard.formats import byte_words, ratio_words, whole
from dashboard.pictures.svg import Picture, drawing, rect, text, width_of

WIDTH, BAR, ROW = 720, 22, 34
GAP = 12


@dataclass(frozen=True)
class _Way:
    """A way of training: its name, the most bytes of tensors that it holds at once, and whether it is the job's own."""

    label: str
    size_bytes: int
    is_own: bool = False


def memory_picture(training: Mapping[str, Any]) -> Picture | None:
    """``training``: figures of an artifact with ``peak_bytes`` and what else is known; None where nothing compares."""
    ways = _ways(training)
    if len(ways) < 2 or not ways[0].is_own:
        return None
    largest = max(way.size_bytes for way in ways)
    left = max(width_of(way.label, 12) for way in ways) + GAP
    room = WIDTH - left - 170
    title = _finding(ways)
    shapes: list[object] = []
    for at, way in enumerate(ways):
        shapes += _bar(way, ways[0], at * ROW, left, room / largest)
    about = _(
        "Bars to one scale: the most memory of tensors that training holds at once, computed from shapes and settings."
    )
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, len(ways) * ROW, shapes, about=about),
        columns=(_("way of training"), _("bytes at once"), _("against this one")),
        rows=[_row(way, ways[0]) for way in ways],
        numeric=frozenset({1, 2}),
    )


def _ways(training: Mapping[str, Any]) -> list[_Way]:
    known = (
        ("peak_bytes", _("this training"), True),
        ("lora_fp16_bytes", _("LoRA on 16-bit weights"), False),
        ("lora_fp32_bytes", _("LoRA on 32-bit weights"), False),
        ("full_finetune_bytes", _("every weight trained"), False),
    )
    return [
        _Way(label, int(training[name]), is_own)
        for name, label, is_own in known
        if isinstance(training.get(name), int | float) and training[name] > 0
    ]


def _finding(ways: Sequence[_Way]) -> str:
    own, other = ways[0], ways[1]
    words = {"own": byte_words(own.size_bytes), "other": byte_words(other.size_bytes), "way": other.label}
    if own.size_bytes >= other.size_bytes:
        return _("Training holds %(own)s at once; %(way)s needs %(other)s") % words
    words["ratio"] = ratio_words(other.size_bytes / own.size_bytes)
    return _("Training holds %(own)s at once, %(ratio)s less than %(way)s, which needs %(other)s") % words


def _bar(way: _Way, own: _Way, y: float, left: float, scale: float) -> list[object]:
    width = max(way.size_bytes * scale, 1.5)
    words = byte_words(way.size_bytes)
    if not way.is_own:
        words += f" · {ratio_words(way.size_bytes / own.size_bytes)}"
    tone = "fill-accent" if way.is_own else "fill-muted"
    return [
        text(0, y + 15, way.label, class_="label"),
        rect(left, y, width, BAR, class_=tone, hover=f"{way.label} · {words}"),
        text(left + width + 6, y + 15, words, class_="tick"),
    ]


def _row(way: _Way, own: _Way) -> tuple[object, ...]:
    return way.label, whole(way.size_bytes), ratio_words(way.size_bytes / own.size_bytes)
