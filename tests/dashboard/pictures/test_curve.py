"""The curve of a training: bounded, on a logarithmic scale, and honest while it runs."""

from __future__ import annotations

import math

from dashboard.pictures import Training, curve_picture, training_picture
from dashboard.pictures.curve import HEIGHT, LEFT, MOST_POINTS, WIDTH
from tests.dashboard.pictures.shapes import shapes


def points(picture: object) -> list[tuple[float, float]]:
    (curve,) = shapes(picture, "path", "curve")  # type: ignore[arg-type]
    pairs = [one.split(",") for one in curve.attrib["d"].removeprefix("M").split(" L")]
    return [(float(x), float(y)) for x, y in pairs]


def test_a_training_is_not_called_a_distillation() -> None:
    training, distillation = training_picture(Training([1.0, 0.5])), curve_picture([1.0, 0.5])
    assert training is not None
    assert distillation is not None
    assert training.title == "Training: the loss goes from 1.00 to 0.500 in 2 steps"
    assert distillation.title == "Distillation: the loss goes from 1.00 to 0.500 in 2 steps"


def test_a_running_training_leaves_room_for_what_is_to_come() -> None:
    picture = training_picture(Training([1.0, 0.5, 0.25], total=9))
    assert picture is not None
    assert picture.title == "Training so far: the loss goes from 1.00 to 0.250 in 3 of 9 steps"
    assert picture.note == "It shows the steps of those parts of the training that are done."
    assert points(picture)[-1][0] == LEFT + (WIDTH - LEFT - 8) / 4
    done = training_picture(Training([1.0, 0.5, 0.25], total=3))
    assert done is not None
    assert done.note == ""
    assert points(done)[-1][0] == WIDTH - 8


def test_however_many_steps_there_are_the_line_has_few_points() -> None:
    losses = [1 / (n + 1) for n in range(10_000)]
    picture = training_picture(Training(losses))
    assert picture is not None
    assert len(points(picture)) == MOST_POINTS
    assert points(picture)[0][0] == LEFT
    assert points(picture)[-1][0] == WIDTH - 8
    assert len(picture.rows) <= 60
    assert "in 10000 steps" in picture.title


def test_a_loss_of_nothing_moves_no_other_and_spoils_no_scale() -> None:
    """Where no module is replaced in a step, there is nothing to learn in it."""
    picture = training_picture(Training([0.4, -2e-8, 1e-30, math.nan, 0.2], replaces=True))
    assert picture is not None
    assert picture.title == "Training: the loss goes from 0.400 to 0.200 in 5 steps"
    assert [x for x, _y in points(picture)] == [LEFT + share * (WIDTH - LEFT - 8) for share in (0, 0.5, 1)]
    assert max(y for _x, y in points(picture)) < HEIGHT
    assert points(picture)[0][1] != points(picture)[2][1], "one outlier leaves the others apart"
    assert "may rise though it learns" in picture.note
    assert picture.rows[3] == (4, "–")


def test_a_first_step_without_anything_to_learn_is_no_end_and_its_tick_fits() -> None:
    picture = training_picture(Training([9.5e-12, 0.3, 0.39], replaces=True))
    assert picture is not None
    assert picture.title == "Training: the loss goes from 0.300 to 0.390 in 3 steps"
    ticks = [one.text or "" for one in shapes(picture, "text", "tick")]
    assert "4e-06" in ticks
    assert max(map(len, ticks)) <= 6


def test_one_loss_is_no_curve() -> None:
    assert training_picture(Training()) is None
    assert training_picture(Training([1.0, 0.0])) is None
    assert curve_picture([1.0]) is None
