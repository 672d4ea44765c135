"""Small, safe building blocks for pictures: escaped SVG elements, and a picture with its finding and its data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count

from django.utils.html import conditional_escape
from django.utils.safestring import SafeString, mark_safe

_ids = count(1)


@dataclass(frozen=True)
class Picture:
    """A drawing, the sentence it proves, and the same figures as a table."""

    title: str
    svg: SafeString
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    numeric: frozenset[int] = field(default_factory=frozenset)
    wide: bool = False
    note: str = ""
    """What the picture leaves out, where it leaves something out."""


def element(name: str, *children: object, **attributes: object) -> SafeString:
    """``<name attributes>children</name>``. ``class_`` means class; a trailing or inner underscore becomes a hyphen.

    Every child and every value is escaped unless it is safe already. A picture has thousands of these, so the string is
    put together directly.
    """
    pairs = "".join(f' {_attribute(key)}="{_value(value)}"' for key, value in attributes.items() if value is not None)
    inner = "".join(conditional_escape(str(child)) for child in children)
    return mark_safe(f"<{name}{pairs}>{inner}</{name}>")


@cache
def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-") if key != "viewBox" else key


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value) if isinstance(value, int) else conditional_escape(str(value))


def text(x: float, y: float, words: object, *, class_: str = "", anchor: str | None = None) -> SafeString:
    return element("text", words, x=x, y=y, class_=class_ or None, text_anchor=anchor)


def rect(x: float, y: float, width: float, height: float, *, class_: str, hover: str = "") -> SafeString:
    inside = [element("title", hover)] if hover else []
    return element("rect", *inside, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> SafeString:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def drawing(
    title: str, width: float, height: float, children: Iterable[object], *, about: str = "", has_links: bool = False
) -> SafeString:
    """An ``<svg>`` that a screen reader announces by its title; ``about`` says how to read it.

    One with links is a group, not an image: what is inside an image cannot be reached.
    """
    name = f"picture-{next(_ids)}"
    described = [element("desc", about, id=f"{name}-about")] if about else []
    return element(
        "svg",
        element("title", title, id=name),
        *described,
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="group" if has_links else "img",
        aria_labelledby=name,
        aria_describedby=f"{name}-about" if about else None,
        class_="drawing",
    )


def link(href: str, *children: object, label: str = "") -> SafeString:
    return element("a", *children, href=href, aria_label=label or None)


def width_of(words: object, size: float = 11) -> float:
    """About how wide ``words`` are in pixels; a Japanese character is as wide as it is high."""
    return sum(size if ord(letter) > 0x2E80 else 0.56 * size for letter in str(words))


def cut(words: str, room: float, size: float = 11) -> str:
    """``words``, or as much of them as fits into ``room`` pixels."""
    if width_of(words, size) <= room:
        return words
    while words and width_of(f"{words}…", size) > room:
        words = words[:-1]
    return f"{words}…"
