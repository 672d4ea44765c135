"""Pictures: valid SVG without inline style, a title that says the finding, and the same figures as a table."""

from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree

import pytest

from dashboard.lifecycle import AttemptOutcome, DeploymentKind, DeploymentState, StepState
from dashboard.pictures import (
    Bar,
    Column,
    Generation,
    Node,
    Picture,
    Point,
    curve_picture,
    generations_picture,
    ledger_picture,
    lineage_picture,
    pareto_picture,
    strip_picture,
    timeline_picture,
)
from dashboard.pictures.pareto import dominated
from dashboard.pictures.strip import layer_and_kind

NASTY = '<script>"&'


def shapes(picture: Picture | None, tag: str, class_: str = "") -> list[ElementTree.Element]:
    """The elements of a picture, which has to be well-formed and free of inline style."""
    assert picture is not None
    root = ElementTree.fromstring(picture.svg)
    assert all("style" not in one.attrib for one in root.iter())
    assert root.attrib["role"] == "img"
    return [one for one in root.iter(tag) if class_ in one.attrib.get("class", "").split() or not class_]


def points() -> list[Point]:
    return [
        Point("full", "full", 5_000_000, 4.5, 4.3, 4.7),
        Point(NASTY, "bitdelta", 400_000, 4.6, 4.4, 4.8, href="/a/1/"),
        Point("poor", "bitdelta", 900_000, 5.5, 5.2, 5.8, href="/a/2/"),
    ]


def test_the_ledger_bar_adds_up_and_names_the_largest_part() -> None:
    picture = ledger_picture([{"name": "codes", "bytes": 300}, {"name": NASTY, "bytes": 700}], 5000)
    widths = [float(one.attrib["width"]) for one in shapes(picture, "rect") if "tone" in one.attrib["class"]]
    assert widths[0] / widths[1] == pytest.approx(700 / 300, rel=1e-3)
    assert "5.00×" in picture.title
    assert [row[1] for row in picture.rows] == ["700", "300"]


def test_a_point_is_dominated_when_another_is_smaller_and_better() -> None:
    full, good, poor = points()
    assert dominated(poor, points(), higher_is_better=False)
    assert not dominated(good, points(), higher_is_better=False)
    assert not dominated(full, points(), higher_is_better=False)


def test_the_pareto_picture_greys_what_is_dominated_and_draws_whiskers() -> None:
    picture = pareto_picture(points(), "Perplexity", higher_is_better=False)
    assert len(shapes(picture, "path", "mark")) == 3
    assert len(shapes(picture, "path", "muted")) == 1
    assert len(shapes(picture, "line", "whisker")) == 9
    assert picture is not None
    assert [row[6] for row in picture.rows] == ["", "dominated", ""]


def test_better_is_up_also_where_lower_is_better() -> None:
    scale_low = pareto_picture(points(), "Perplexity", higher_is_better=False)
    marks = shapes(scale_low, "path", "mark")
    height = {one.find("title").text.split(" ")[0]: float(one.attrib["d"].split(",")[1].split(" ")[0]) for one in marks}  # type: ignore[union-attr]
    assert height["full"] < height["poor"]


def test_one_point_alone_is_no_comparison() -> None:
    assert pareto_picture(points()[:1], "Perplexity", higher_is_better=False) is None


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "q_proj")),
        ("transformer.h.11.mlp.c_fc", (11, "c_fc")),
        ("lm_head.weight", None),
    ],
)
def test_matrix_names_give_layer_and_kind(name: str, place: tuple[int, str] | None) -> None:
    assert layer_and_kind(name) == place


def test_the_layer_strip_has_a_cell_per_matrix_and_names_the_worst() -> None:
    errors = {f"model.layers.{n}.mlp.{kind}": n + len(kind) / 10 for n in range(3) for kind in ("up_proj", "down_proj")}
    picture = strip_picture(errors)
    assert len(shapes(picture, "rect")) == 6
    assert picture is not None
    assert "model.layers.2.mlp.down_proj" in picture.title
    assert strip_picture({"lm_head.weight": 1.0}) is None


def test_the_timeline_marks_kills_and_tells_reuse() -> None:
    columns = [
        Column(0, "plan", "plan", StepState.DONE, True, ()),
        Column(
            1,
            NASTY,
            "layer",
            StepState.DONE,
            False,
            (Bar(1, "w", AttemptOutcome.KILLED, 3.0, "signal 9"), Bar(2, "w", AttemptOutcome.DONE, 5.0)),
        ),
        Column(2, "layer 1", "layer", StepState.WAITING, False, ()),
    ]
    picture = timeline_picture(columns)
    assert len(shapes(picture, "text", "kill")) == 1
    assert picture is not None
    assert "2 of 3 steps done" in picture.title
    assert "1 attempt was lost and repeated" in picture.title
    assert "1 reused" in picture.title
    assert [row[2] for row in picture.rows] == ["", 1, 2, ""]
    assert timeline_picture([]) is None


def test_the_generation_strip_marks_rollbacks_and_what_serves_now() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    kinds = (DeploymentKind.FULL_PRECISION, DeploymentKind.COMPRESSED, DeploymentKind.ROLLBACK)
    history = [
        Generation(n + 1, f"what {n}", kind, DeploymentState.LIVE, moment, None, "ops", NASTY)
        for n, kind in enumerate(kinds)
    ]
    picture = generations_picture(history, "production")
    assert len(shapes(picture, "line", "rollback-mark")) == 1
    assert picture is not None
    assert "what 2" in picture.title
    assert [row[0] for row in picture.rows] == [3, 2, 1]
    assert generations_picture([], "production") is None


def test_the_lineage_links_every_node_and_labels_its_bytes() -> None:
    leaf = Node("production", "environment", "/p/")
    artifact = Node("artifact", "BitDelta", "/a/", 1_000_000, (leaf,))
    root = Node("base", "base", "/b/", 5_000_000, (Node(NASTY, "variant", "/v/", 5_000_000, (artifact,), True),))
    picture = lineage_picture(root)
    assert {one.attrib["href"] for one in shapes(picture, "a")} == {"/p/", "/a/", "/b/", "/v/"}
    assert len(shapes(picture, "path", "edge")) == 3
    assert len(shapes(picture, "rect", "node-here")) == 1
    assert [row[2] for row in picture.rows] == ["", "base", NASTY, "artifact"]


def test_the_loss_curve_tells_where_it_begins_and_ends() -> None:
    picture = curve_picture([1.0, 0.5, 0.25])
    assert "from 1.00 to 0.250 in 3 steps" in (picture.title if picture else "")
    assert len(shapes(picture, "path", "curve")) == 1
    assert curve_picture([1.0]) is None
