"""Who follows whom: a square for each block, an arc for each follower, and every candidate's divergence in the table."""

from __future__ import annotations

import pytest

from dashboard.pictures import sharing_picture
from tests.dashboard.pictures.shapes import hover, inside, shapes

SHARING = {
    "blocks": 8,
    "groups": {"2": [3, 4], "5": [6]},
    "rounds": [
        {"kl": {"3": [2, 0.01], "4": [3, 0.03], "6": [5, 0.02]}, "chosen": [3, 6]},
        {"kl": {"4": [2, 0.05]}, "chosen": [4]},
    ],
    "parameters": {"before": 1000, "after": 880},
    "operations": {"before": 2000, "after": 2020},
}


def test_the_finding_says_what_sharing_saves_and_what_it_costs() -> None:
    picture = sharing_picture(SHARING)
    assert picture is not None
    assert inside(picture)
    assert picture.title == (
        "3 of 8 blocks use the weights of another: 12.0 % fewer parameters, and 1.0 % more arithmetic for each token"
    )


def test_every_block_has_a_square_and_every_follower_an_arc() -> None:
    picture = sharing_picture(SHARING)
    assert len(shapes(picture, "path", "edge")) == 3
    assert len(shapes(picture, "rect")) == 8
    assert len(shapes(picture, "rect", "fill-accent")) == 2
    assert [hover(one) for one in shapes(picture, "rect", "fill-reused")] == [
        f"block {block}: follows · {anchor}" for block, anchor in ((3, 2), (4, 2), (6, 5))
    ]


def test_the_table_has_what_every_candidate_cost_in_every_round() -> None:
    picture = sharing_picture(SHARING)
    assert picture is not None
    assert picture.columns == ("block", "role", "weights of block", "KL in round 1", "KL in round 2")
    rows = {row[0]: tuple(row[1:]) for row in picture.rows}
    assert rows[3] == ("follows", 2, "0.01 ✓", "–")
    assert rows[4] == ("follows", 2, "0.03", "0.05 ✓")
    assert rows[2] == ("anchor", "–", "–", "–")
    assert rows[0] == ("by itself", "–", "–", "–")


@pytest.mark.parametrize("blocks", [2, 32, 80])
def test_many_blocks_stay_inside_the_drawing(blocks: int) -> None:
    picture = sharing_picture(SHARING | {"blocks": blocks, "groups": {"0": [blocks - 1]}, "rounds": []})
    assert picture is not None
    assert inside(picture)


def test_without_shared_layers_there_is_no_picture() -> None:
    assert sharing_picture({}) is None
