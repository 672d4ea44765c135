"""The style sheet: text passes 4.5:1 on its ground in light and dark, and both darks are the same."""

from __future__ import annotations

import re

import pytest
from django.conf import settings

from dashboard.pictures.heatmap import LEVELS, STRONG

CSS = (settings.ROOT / "dashboard" / "static" / "dashboard" / "deltaworks.css").read_text()
LIGHT, DARK_BY_SYSTEM, DARK_BY_CHOICE = (
    dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6});", CSS[CSS.index(start) : CSS.index("}", CSS.index(start))]))
    for start in (":root {", ':root:not([data-theme="light"]) {', ':root[data-theme="dark"] {')
)
PAIRS = [
    *[(text, ground) for ground in ("paper", "sheet") for text in ("ink", "ink-2", "accent", "good", "caution", "bad")],
    *[(meaning, f"{meaning}-soft") for meaning in ("accent", "good", "caution", "bad")],
    ("ink", "neutral-soft"),
    ("ink-2", "neutral-soft"),
    ("on-accent", "accent"),
    ("paper", "bad"),
    *[("paper" if level >= STRONG else "ink", f"heat-{level}") for level in range(LEVELS)],
]


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), PAIRS)
def test_text_passes_four_and_a_half_to_one(theme: str, text: str, ground: str) -> None:
    colours = LIGHT if theme == "light" else LIGHT | DARK_BY_CHOICE
    assert contrast(colours[text], colours[ground]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_borders_of_fields_pass_three_to_one(theme: str) -> None:
    colours = LIGHT if theme == "light" else LIGHT | DARK_BY_CHOICE
    assert contrast(colours["rule-2"], colours["paper"]) >= 3


def test_dark_by_choice_is_dark_by_the_system() -> None:
    assert DARK_BY_CHOICE == DARK_BY_SYSTEM


def test_black_on_white_is_twenty_one_to_one() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_nothing_comes_from_elsewhere() -> None:
    assert "url(" not in CSS
    assert "@import" not in CSS
