"""The curve of a training on held-out text: what the teacher and the text say of each stage of it."""

from __future__ import annotations

import math
from typing import Any

from dashboard.pictures import heldout_picture
from tests.dashboard.pictures.shapes import hover, inside, number, shapes


def point(phase: str, tokens: int, kl: float, ce: float = 2.5) -> dict[str, Any]:
    return {"phase": phase, "tokens": tokens, "kl": kl, "ce": ce}


CURVE = [point("base", 0, 0.8, 3.1), point("start", 0, 0.5), point("lrec", 4096, 0.25), point("emef", 8192, 0.3)]


def test_each_point_stands_at_its_tokens_and_the_table_says_what_had_been_done() -> None:
    picture = heldout_picture(CURVE)
    assert picture is not None
    assert picture.title == "On held-out text KL falls from 0.800 to 0.300 nats over 8,192 tokens"
    marks = shapes(picture, "circle")
    places = [number(mark, "cx") for mark in marks]
    assert places[0] == places[1] < places[2] < places[3]
    assert places[2] - places[0] == places[3] - places[2], "tokens are on a linear scale"
    heights = [number(mark, "cy") for mark in marks]
    assert heights[0] < heights[1] < heights[3] < heights[2], "up is a larger divergence"
    assert hover(marks[2]) == "after error correction, 4,096 tokens: KL 0.2500"
    assert picture.rows[0] == ("nothing: the packed base alone", "0", "0.8000", "3.100")
    assert [row[0] for row in picture.rows[1:]] == ["what training begins with", "error correction", "task tuning"]
    assert inside(picture)


def test_a_training_that_helped_nothing_is_not_told_as_one_that_did() -> None:
    picture = heldout_picture([point("base", 0, 0.25), point("lrec", 64, 0.5)])
    assert picture is not None
    assert picture.title == "On held-out text KL does not fall: 0.250 nats before, 0.500 after 64 tokens"


def test_what_cannot_be_drawn_is_left_out_and_one_point_is_no_curve() -> None:
    assert heldout_picture([]) is None
    assert heldout_picture(CURVE[:1]) is None
    picture = heldout_picture([*CURVE, point("lrec", 9000, math.nan), point("lrec", 9000, 0.0)])
    assert len(shapes(picture, "circle")) == len(CURVE)
    level = heldout_picture([point("base", 0, 0.5, math.inf), point("lrec", 0, 0.5)])
    assert inside(level)
    assert level is not None
    assert level.rows[0][3] == "–"
