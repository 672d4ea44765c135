"""Pictures: valid SVG without inline style, a title that says the finding, and the same figures as a table."""

from __future__ import annotations

from datetime import UTC, datetime

from dashboard.lifecycle import AttemptOutcome, DeploymentKind, DeploymentState, StepState
from dashboard.pictures import (
    Bar,
    Column,
    Generation,
    Node,
    curve_picture,
    generations_picture,
    lineage_picture,
    timeline_picture,
)
from tests.dashboard.pictures.shapes import NASTY, shapes


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
