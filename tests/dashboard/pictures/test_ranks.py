"""What the rank of differences buys, drawn: its finding, its table, and labels that can be read."""

from __future__ import annotations

import pytest

from dashboard.pictures import Rank, ranks_picture
from tests.dashboard.pictures.shapes import shapes

POINTS = [Rank(rank, 800 + 4 * rank, 1000, kl) for rank, kl in ((0, 0.9), (1, 0.85), (2, 0.8), (16, 0.5), (32, 0.25))]


def test_one_point_is_no_sweep() -> None:
    assert ranks_picture([]) is None
    assert ranks_picture(POINTS[:1]) is None


def test_it_says_what_the_rank_buys_and_carries_every_point() -> None:
    picture = ranks_picture(POINTS)
    assert picture is not None
    assert picture.title == "Before training KL falls from 0.900 nats at rank 0 to 0.250 at rank 32"
    assert picture.rows[0] == ("0", "800", "20.0 %", "0.9000")
    assert picture.rows[-1] == ("32", "928", "7.2 %", "0.2500")
    assert len(shapes(picture, "circle")) == len(POINTS)


def test_labels_that_would_touch_are_left_out_but_never_the_highest_rank() -> None:
    labels = [one.text for one in shapes(ranks_picture(POINTS), "text", "tick") if str(one.text).startswith("r")]
    assert labels[0] == "r32"
    assert "r16" in labels
    assert len({"r0", "r1", "r2"} & set(labels)) == 1


@pytest.mark.parametrize("worse", [0.9, 1.5])
def test_a_rank_that_brings_nothing_is_said_to(worse: float) -> None:
    picture = ranks_picture([POINTS[0], Rank(8, 900, 1000, worse)])
    assert picture is not None
    assert "brings nothing" in picture.title


def test_ranks_that_differ_are_named_from_the_lowest_to_the_highest() -> None:
    picture = ranks_picture([POINTS[0], Rank(32, 900, 1000, 0.25, lowest=8)])
    assert picture is not None
    assert picture.title == "Before training KL falls from 0.900 nats at rank 0 to 0.250 at rank 8 to 32"
    assert picture.rows[-1][0] == "8 to 32"
    assert "r8–32" in [one.text for one in shapes(picture, "text", "tick")]
