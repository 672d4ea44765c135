"""Quality against bytes: marks that lead to their artifacts, whiskers, the frontier, full precision as the reference."""

from __future__ import annotations

import math
import re

import pytest

from dashboard.pictures import Point, Quality, pareto_picture
from dashboard.pictures.marks import SHAPES, outline, place_of
from dashboard.pictures.pareto import dominated, round_values
from tests.dashboard.pictures.shapes import NASTY, hover, number, shapes, size

PERPLEXITY = Quality("Perplexity", higher_is_better=False)
ACCURACY = Quality("Choice accuracy", higher_is_better=True, is_share=True)


def points() -> list[Point]:
    return [
        Point("full", "full", 5_000_000, 4.5, 4.3, 4.7),
        Point(NASTY, "bitdelta", 400_000, 4.6, 4.4, 4.8, href="/a/1/"),
        Point("poor", "deltadq", 900_000, 5.5, 5.2, 5.8, href="/a/2/"),
    ]


def middles(picture: object) -> dict[str, tuple[float, float]]:
    """Where the marks are: the beginning of a circle's or square's path is to the left of its middle, at its height."""
    found = {}
    for one in shapes(picture, "path", "mark"):  # type: ignore[arg-type]
        if hover(one):
            x, y = re.match(r"M([\d.]+),([\d.]+)", one.attrib["d"]).groups()  # type: ignore[union-attr]
            found[hover(one).split(" ")[0]] = (float(x), float(y))
    return found


def test_a_point_is_dominated_when_another_is_smaller_and_better() -> None:
    full, good, poor = points()
    assert dominated(poor, points(), higher_is_better=False)
    assert not dominated(good, points(), higher_is_better=False)
    assert not dominated(full, points(), higher_is_better=False)


def test_it_greys_what_is_dominated_and_draws_whiskers() -> None:
    picture = pareto_picture(points(), PERPLEXITY)
    assert len([one for one in shapes(picture, "path", "mark") if hover(one)]) == 3
    assert len([one for one in shapes(picture, "path", "muted") if hover(one)]) == 1
    assert len(shapes(picture, "line", "whisker")) == 9
    assert picture is not None
    assert [row[7] for row in picture.rows] == ["on the frontier", "dominated", "on the frontier"]


def test_each_mark_leads_to_its_artifact_and_says_what_it_is() -> None:
    picture = pareto_picture(points(), PERPLEXITY)
    links = {one.attrib["href"]: one.attrib["aria-label"] for one in shapes(picture, "a")}
    assert set(links) == {"/a/1/", "/a/2/"}
    assert links["/a/2/"] == "poor · deltadq · 900 kB · 5.56× · Perplexity 5.50 (5.20 … 5.80)"
    assert picture is not None
    assert 'href="/a/1/"' in str(picture.rows[0][0])
    assert "<script>" not in str(picture.rows[0][0])


def test_whiskers_reach_from_the_low_to_the_high_end() -> None:
    picture = pareto_picture(points(), PERPLEXITY)
    bars = [one for one in shapes(picture, "line", "whisker") if one.attrib["x1"] == one.attrib["x2"]]
    heights = sorted(abs(number(one, "y2") - number(one, "y1")) for one in bars)
    assert heights[2] / heights[0] == pytest.approx(0.6 / 0.4, rel=1e-2)


def test_the_frontier_is_stairs_from_the_smallest_to_the_best() -> None:
    picture = pareto_picture(points(), PERPLEXITY)
    (path,) = shapes(picture, "path", "frontier")
    found = re.fullmatch(r"M([\d.]+),([\d.]+) H([\d.]+) V([\d.]+)", path.attrib["d"])
    assert found is not None
    x1, y1, x2, y2 = (float(one) for one in found.groups())
    assert x1 < x2
    assert y2 < y1  # better is up


def test_full_precision_is_a_line_and_a_mark_of_its_own() -> None:
    picture = pareto_picture(points(), PERPLEXITY)
    (line,) = shapes(picture, "line", "reference")
    assert number(line, "y1") == pytest.approx(middles(picture)["full"][1], abs=0.1)
    assert "full precision" in [one.text for one in shapes(picture, "text", "note")]
    without = pareto_picture(points()[1:], PERPLEXITY)
    assert shapes(without, "line", "reference") == []
    assert without is not None
    assert {row[3] for row in without.rows} == {"–"}


@pytest.mark.parametrize("quality", [PERPLEXITY, Quality("Score", higher_is_better=True)])
def test_better_is_up_whichever_way_the_figure_goes(quality: Quality) -> None:
    height = {name: y for name, (_x, y) in middles(pareto_picture(points(), quality)).items()}
    assert (height["full"] < height["poor"]) is not quality.higher_is_better


def test_the_axis_of_bytes_is_logarithmic_and_names_ratios() -> None:
    three = [Point(f"p{n}", "m", 10 ** (n + 5), 1.0 + n, 1.0 + n, 1.0 + n, f"/{n}/") for n in range(3)]
    found = middles(pareto_picture(three, PERPLEXITY))
    assert found["p1"][0] - found["p0"][0] == pytest.approx(found["p2"][0] - found["p1"][0], abs=0.2)
    ticks = [one.text for one in shapes(pareto_picture(points(), PERPLEXITY), "text", "tick")]
    assert "10.0×" in ticks
    assert "500 kB" in ticks


def test_a_share_reads_as_a_percentage() -> None:
    two = [Point("full", "full", 100, 0.412, 0.4, 0.42), Point("a", "m", 10, 0.4, 0.39, 0.41, "/a/")]
    picture = pareto_picture(two, ACCURACY)
    assert picture is not None
    assert [row[4] for row in picture.rows] == ["40.0 %", "41.2 %"]


def test_methods_differ_by_shape_and_colour() -> None:
    many = [Point(f"p{n}", f"method {n}", 100 + n, 9.0 - n, 9.0 - n, 9.0 - n, f"/{n}/") for n in range(7)]
    marks = [one for one in shapes(pareto_picture(many, PERPLEXITY), "path", "mark") if hover(one)]
    assert len({one.attrib["class"] for one in marks}) == 7
    assert "mark family-0" not in {one.attrib["class"] for one in marks}
    assert len({outline(shape, 0, 0) for shape in SHAPES}) == len(SHAPES)
    assert {place_of(at) for at in range(30)} == set(range(1, len(SHAPES)))


@pytest.mark.parametrize("count", [0, 1])
def test_one_point_alone_is_no_comparison(count: int) -> None:
    assert pareto_picture(points()[:count], PERPLEXITY) is None


def test_figures_that_are_no_numbers_are_left_out_and_open_intervals_closed() -> None:
    odd = [*points(), Point("nan", "m", 100, math.nan, 0, 1, "/x/"), Point("empty", "m", 0, 1.0, 1.0, 1.0, "/y/")]
    open_ended = Point("open", "m", 300, 4.8, -math.inf, math.nan, "/z/")
    picture = pareto_picture([*odd, open_ended], PERPLEXITY)
    assert picture is not None
    assert len(picture.rows) == 4
    assert picture.rows[0][5:7] == ("4.800", "4.800")


def test_two_equal_points_can_be_drawn() -> None:
    twins = [Point(name, "m", 100, 1.0, 1.0, 1.0, f"/{name}/") for name in ("a", "b")]
    picture = pareto_picture(twins, PERPLEXITY)
    assert len(shapes(picture, "a")) == 2
    assert shapes(picture, "path", "frontier") == []


def test_huge_numbers_stay_in_the_frame() -> None:
    wild = [*points(), Point("diverged", "m", 10**15, 1e30, 1e29, 1e31, "/w/")]
    picture = pareto_picture(wild, PERPLEXITY)
    width, height = size(picture)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in middles(picture).values())
    assert max(len(one.text or "") for one in shapes(picture, "text", "tick")) <= 9


def test_many_points_are_named_only_on_the_frontier() -> None:
    crowd = [Point(f"p{n}", "m", 1000 + n, 5.0 + n, 5.0 + n, 5.0 + n, f"/{n}/") for n in range(30)]
    labels = [one.text for one in shapes(pareto_picture([*crowd, *points()], PERPLEXITY), "text", "label")]
    assert set(labels) == {"full", NASTY, "p0"}


def test_labels_touch_neither_each_other_nor_a_mark() -> None:
    near = [Point(f"artifact {n}", "m", 1000 + 60 * n, 5 + n / 9, 5, 7, f"/{n}/") for n in range(6)]
    picture = pareto_picture(near, PERPLEXITY)
    boxes = []
    for one in shapes(picture, "text", "label"):
        width, x = 0.56 * 12 * len(one.text or ""), number(one, "x")
        boxes.append((x - width if one.attrib.get("text-anchor") == "end" else x, number(one, "y"), width))
    for at, (x, y, width) in enumerate(boxes):
        assert not [
            other for other in boxes[:at] if abs(y - other[1]) < 11 and x < other[0] + other[2] and other[0] < x + width
        ]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.13), (4.3, 5.1), (0.0, 1e30), (-3.0, 3.0), (0.999, 1.001)])
def test_ticks_are_round_and_neither_few_nor_many(low: float, high: float) -> None:
    ticks = round_values(low, high)
    assert 3 <= len(ticks) <= 8
    assert low <= ticks[0] < ticks[-1] <= high
    digits = f"{ticks[1] - ticks[0]:.3e}".partition("e")[0]
    assert digits in ("1.000", "2.000", "5.000")


def test_labels_do_not_run_out_of_the_frame() -> None:
    long = [Point("x" * 200, "m", 100, 1.0, 1.0, 1.0, "/a/"), Point("y" * 200, "m", 90, 2.0, 2.0, 2.0, "/b/")]
    picture = pareto_picture(long, PERPLEXITY)
    for one in shapes(picture, "text", "label"):
        assert number(one, "x") + 0.5 * 12 * len(one.text or "") <= size(picture)[0]
