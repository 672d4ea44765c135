"""Bits against perplexity: two log scales, one mark and one interval a way, full precision as a line beside them."""

from __future__ import annotations

import math
import re

import pytest

from dashboard.pictures import BitsPoint, bits_picture
from dashboard.pictures.bits import log_values
from tests.dashboard.pictures.shapes import NASTY, hover, number, shapes, size

AXIS = "bits per weight"
FULL = BitsPoint("full precision", "full precision", 16.0, 4.5, 4.3, 4.7)


def point(bits: float, value: float, family: str = "GPTQ", **fields: object) -> BitsPoint:
    given = {"low": value * 0.98, "high": value * 1.02, "href": f"/{family}/{bits}/"}
    return BitsPoint(f"{family}, {bits:g} bits", family, bits, value, **given | fields)  # type: ignore[arg-type]


POINTS = [point(2.3, 5000.0), point(4.2, 4.9), point(8.2, 4.55), point(2.0, 8.0, "QuIP#"), point(1.1, 4.8, NASTY)]


def place(path: str) -> tuple[float, float]:
    """Where a mark is drawn: the first coordinates of its outline."""
    found = re.match(r"M([\d.]+),([\d.]+)", path)
    assert found
    return float(found[1]), float(found[2])


def test_each_way_has_a_mark_that_leads_to_its_artifact_and_an_interval() -> None:
    picture = bits_picture(POINTS, FULL, AXIS)
    marks = shapes(picture, "path", "mark")
    assert len(marks) == len(POINTS) + 1 + len({one.family for one in POINTS}) + 1, "points, full, and the legend"
    assert {one.attrib["href"] for one in shapes(picture, "a")} == {one.href for one in POINTS}
    whiskers = shapes(picture, "line", "whisker")
    assert len(whiskers) == 3 * len(POINTS)
    said = [hover(one) for one in marks if hover(one)]
    assert any("GPTQ, 2.3 bits · 2.300 bits a weight · perplexity 5,000 (4,900 … 5,100)" in one for one in said)


def test_both_scales_are_logarithmic_and_better_is_up() -> None:
    ways = [point(2, 10.0), point(4, 100.0), point(8, 1000.0)]
    picture = bits_picture(ways, None, AXIS)
    first, second, third = (place(one.attrib["d"]) for one in shapes(picture, "path", "mark")[:3])
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)
    assert second[1] - first[1] == pytest.approx(third[1] - second[1], abs=0.2)
    assert first[1] < second[1] < third[1], "less perplexity stands higher"


def test_full_precision_is_a_line_at_its_own_perplexity() -> None:
    picture = bits_picture(POINTS, FULL, AXIS)
    (line,) = shapes(picture, "line", "reference")
    own = next(one for one in shapes(picture, "path", "family-0") if hover(one))
    assert number(line, "y1") == number(line, "y2") == pytest.approx(place(own.attrib["d"])[1], abs=0.2)
    assert shapes(bits_picture(POINTS, None, AXIS), "line", "reference") == []


def test_the_points_of_a_method_are_joined_from_few_bits_to_many_and_named_once() -> None:
    picture = bits_picture(list(reversed(POINTS)), FULL, AXIS)
    (join,) = shapes(picture, "path", "join")
    xs = [float(x) for x in re.findall(r"([\d.]+),[\d.]+", join.attrib["d"])]
    assert len(xs) == 3
    assert xs == sorted(xs)
    named = [one.text for one in shapes(picture, "text", "label")]
    assert sorted(map(str, named)) == sorted(["GPTQ", "QuIP#", NASTY, "full precision"])


def test_the_title_says_what_is_best_at_the_fewest_bits() -> None:
    near = [point(2.0, 9.0, "A"), point(2.4, 6.0, "B"), point(4.0, 5.0, "A")]
    picture = bits_picture(near, FULL, AXIS)
    assert picture is not None
    assert picture.title == ("B, 2.4 bits is best at the fewest bits: 2.40 a weight, perplexity 6.00 instead of 4.50")
    alone = bits_picture(near, None, AXIS)
    assert alone is not None
    assert "instead" not in alone.title


def test_the_table_has_every_figure_full_precision_among_them() -> None:
    picture = bits_picture(POINTS, FULL, AXIS, note="what is left out")
    assert picture is not None
    assert len(picture.rows) == len(POINTS) + 1
    assert [row[2] for row in picture.rows] == ["1.100", "2.000", "2.300", "4.200", "8.200", "16.00"]
    assert picture.rows[2][3:] == ("5,000", "4,900", "5,100")
    assert picture.note == "what is left out"


def test_what_cannot_be_drawn_is_left_out_and_one_point_is_no_picture() -> None:
    broken = [point(4, math.inf), point(4, math.nan), point(0, 5.0), point(4, -1.0)]
    assert bits_picture([*broken, point(4, 5.0)], FULL, AXIS) is None
    picture = bits_picture([*broken, point(4, 5.0), point(3, 6.0)], FULL, AXIS)
    assert picture is not None
    assert len(picture.rows) == 3


def test_an_interval_that_is_not_known_is_no_bar_and_says_so() -> None:
    picture = bits_picture([point(2, 9.0, low=None, high=None), point(4, 5.0, low=-1.0, high=math.inf)], None, AXIS)
    whiskers = shapes(picture, "line", "whisker")
    assert all(number(one, "y1") == number(one, "y2") for one in whiskers)
    assert picture is not None
    assert picture.rows[0][4:] == ("–", "–")


def test_marks_and_ticks_stay_inside_however_far_apart_the_values_are() -> None:
    for ways in (POINTS, [point(2, 4.51), point(3, 4.52)], [point(2, 1e30), point(3, 4.0)], [point(4, 5.0)] * 2):
        picture = bits_picture(ways, FULL, AXIS)
        width, height = size(picture)
        for one in shapes(picture, "path", "mark"):
            x, y = place(one.attrib["d"])
            assert 0 <= x <= width
            assert 0 <= y <= height
        ticks = [one for one in shapes(picture, "text", "tick") if number(one, "x") < 64]
        assert 2 <= len(ticks) <= 9


@pytest.mark.parametrize(("low", "high"), [(0.65, 0.66), (0.6, 0.9), (0.0, 2.0), (0.5, 30.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    values = log_values(low, high)
    assert all(low <= math.log10(value) <= high for value in values)
    assert 2 <= len(values) <= 8
    assert values == sorted(values)
