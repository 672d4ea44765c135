"""The shapes of marks: families are told apart by shape as well as by colour."""

from __future__ import annotations

import math

SHAPES = ("circle", "triangle", "square", "diamond", "cross", "down", "hexagon", "star")
"""The first is the reference's own."""


def place_of(family: int) -> int:
    """Shape and colour of the family of that number; the reference's own is never among them."""
    return family % (len(SHAPES) - 1) + 1


def outline(shape: str, x: float, y: float, r: float = 5.5) -> str:
    """A path around ``x``, ``y``."""
    match shape:
        case "circle":
            return f"M{x - r:.1f},{y:.1f} a{r},{r} 0 1,0 {2 * r},0 a{r},{r} 0 1,0 {-2 * r},0 Z"
        case "triangle":
            return f"M{x:.1f},{y - r:.1f} l{r},{2 * r} h{-2 * r} Z"
        case "down":
            return f"M{x:.1f},{y + r:.1f} l{r},{-2 * r} h{-2 * r} Z"
        case "square":
            return f"M{x - r:.1f},{y - r:.1f} h{2 * r} v{2 * r} h{-2 * r} Z"
        case "diamond":
            return f"M{x:.1f},{y - r - 1:.1f} l{r + 1},{r + 1} l{-r - 1},{r + 1} l{-r - 1},{-r - 1} Z"
        case "cross":
            a = r - 2
            return f"M{x - r:.1f},{y - 2:.1f} h{a} v{-a} h4 v{a} h{a} v4 h{-a} v{a} h-4 v{-a} h{-a} Z"
        case "hexagon":
            return _round(x, y, [r + 0.5] * 6)
        case _:
            return _round(x, y, [r + 1.5, r / 2.2] * 5)


def _round(x: float, y: float, radii: list[float]) -> str:
    """Corners at ``radii``, evenly around, the first above."""
    turns = [2 * math.pi * at / len(radii) for at in range(len(radii))]
    corners = [(x + r * math.sin(turn), y - r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)]
    return "M" + " L".join(f"{a:.1f},{b:.1f}" for a, b in corners) + " Z"
