"""Blocks that share: who uses whose weights, in form and in words, and what each candidate would have cost."""

from __future__ import annotations

import math

import pytest

from dashboard.pictures import Candidate, Matrix, Round, Sharing, candidates_picture, coding_picture, sharing_picture
from dashboard.pictures.blocks import MOST_IN_ROW, Strip
from dashboard.pictures.candidates import _short
from dashboard.pictures.matrices import from_figures
from tests.dashboard.pictures.shapes import hover, inside, number, shapes
from tests.factories import sharing_figures

GROUPS = {3: 2, 4: 2, 6: 5}
SHARING = Sharing(8, GROUPS, frozenset({0, 7}), 0.1207)


def words(picture: object) -> list[str]:
    return [one.text or "" for one in shapes(picture, "text", "note")]  # type: ignore[arg-type]


def test_the_title_says_how_many_share_and_what_that_saves() -> None:
    picture = sharing_picture(SHARING)
    assert picture is not None
    assert picture.title == "3 of 8 blocks use another's weights; 12.1 % fewer parameters"
    one = sharing_picture(Sharing(8, {3: 2}, still=2))
    assert one is not None
    assert one.title == "1 of 8 blocks uses another's weights; 2 more are still to be chosen"
    assert inside(picture)


def test_each_kind_of_block_has_a_form_and_a_word() -> None:
    picture = sharing_picture(SHARING)
    said = {hover(one): one.attrib["class"] for one in shapes(picture, "rect") if hover(one)}
    assert said == {
        "block 0: protected": "untouched",
        "block 1: untouched": "untouched",
        "block 2: anchor, used by 3, 4": "anchor",
        "block 3: follower, uses the weights of block 2": "follower",
        "block 4: follower, uses the weights of block 2": "follower",
        "block 5: anchor, used by 6": "anchor",
        "block 6: follower, uses the weights of block 5": "follower",
        "block 7: protected": "untouched",
    }
    assert len(shapes(picture, "line", "guard")) == 2 * (2 + 1), "two bars at each protected block and in the legend"
    assert words(picture) == [
        "anchor: others use its weights (2)",
        "follower: keeps a difference only (3)",
        "between bars: protected, never follows (2)",
        "untouched (1)",
    ]


def test_an_anchor_that_is_protected_is_shown_as_both() -> None:
    picture = sharing_picture(Sharing(4, {1: 0}, frozenset({0})))
    assert "block 0: anchor, protected, used by 1" in [hover(one) for one in shapes(picture, "rect")]
    assert picture is not None
    assert picture.rows[0] == (0, "anchor, protected", "–", "1")


def test_an_arc_leads_from_each_follower_to_its_anchor() -> None:
    picture = sharing_picture(SHARING)
    arcs = {hover(one): one.attrib["d"] for one in shapes(picture, "path", "curve")}
    assert len(arcs) == 3
    boxes = {hover(one)[: len("block 3")]: one for one in shapes(picture, "rect") if hover(one)}
    middle = {block: number(boxes[f"block {block}"], "x") + 13 for block in (2, 3)}
    arc = arcs["block 3: follower, uses the weights of block 2"]
    assert arc.startswith(f"M{middle[3]:.1f},")
    assert f" {middle[2]:.1f}," in arc.rpartition(" ")[0] + arc[arc.rindex(" ") :]
    assert [one.text for one in shapes(picture, "text", "tick")] == ["↰2", "↰2", "↰5"]


@pytest.mark.parametrize(("blocks", "rows"), [(1, 1), (30, 1), (31, 2), (80, 3), (126, 5)])
def test_many_blocks_stand_in_even_rows(blocks: int, rows: int) -> None:
    strip = Strip(blocks, left=2, height=80)
    assert strip.rows == rows
    assert strip.in_row <= MOST_IN_ROW
    places = {strip.at(block) for block in range(blocks)}
    assert len(places) == blocks
    assert {y for _x, y in places} == {80.0 * row for row in range(rows)}
    picture = sharing_picture(Sharing(max(blocks, 2), {max(blocks, 2) - 1: 0}))
    assert inside(picture)
    assert ("v-10" in shapes(picture, "path", "curve")[0].attrib["d"]) == (rows > 1), "a stub leads out of its row"


def test_without_a_follower_there_is_no_picture() -> None:
    assert sharing_picture(None) is None
    assert sharing_picture(Sharing(8, {})) is None


def test_blocks_that_are_left_out_have_a_form_of_their_own_and_no_arc() -> None:
    picture = sharing_picture(Sharing(8, {3: 2}, frozenset({0, 7}), 0.12, left_out=frozenset({4, 6})))
    assert picture is not None
    assert inside(picture)
    assert picture.title == "1 of 8 blocks uses another's weights; 2 are left out; 12.0 % fewer parameters"
    assert len(shapes(picture, "path", "curve")) == 1
    assert [hover(one) for one in shapes(picture, "rect", "absent") if hover(one)] == [
        "block 4: left out",
        "block 6: left out",
    ]
    assert "× left out: keeps nothing (2)" in words(picture)
    assert picture.rows[4] == (4, "left out", "–", "–")
    alone = sharing_picture(Sharing(4, {}, left_out=frozenset({1})))
    assert alone is not None
    assert alone.title.startswith("0 of 4 blocks use another's weights; 1 is left out")


def test_a_candidate_without_an_anchor_would_be_left_out() -> None:
    picture = candidates_picture([Round({1: Candidate(None, 0.5), 3: Candidate(None, 0.1)}, frozenset({3}))], 4)
    assert picture is not None
    assert "block 3 left out: KL divergence 0.1000 · picked" in {hover(one) for one in shapes(picture, "rect")}
    assert picture.rows[0] == (1, 1, "left out", "0.5000", "")


ROUNDS = [
    Round({1: Candidate(0, 0.58), 3: Candidate(2, 0.006), 6: Candidate(5, 0.0008)}, frozenset({6, 3})),
    Round({1: Candidate(0, math.nan), 4: Candidate(2, 0.025)}, frozenset({4})),
]


def test_every_candidate_has_a_cell_and_those_chosen_are_framed() -> None:
    picture = candidates_picture(ROUNDS, 8)
    assert picture is not None
    assert inside(picture)
    cells = {hover(one): one.attrib["class"] for one in shapes(picture, "rect") if hover(one)}
    assert cells["block 1 on block 0: KL divergence 0.5800"] == "heat-6"
    assert cells["block 6 on block 5: KL divergence 0.0008000 · picked"] == "heat-0 worst"
    assert cells["block 1 on block 0: KL divergence –"] == "heat-none"
    assert [one.text for one in shapes(picture, "text", "cell")] == [
        *("0.58", ".006", "8e-4"),
        *("?", "✓", ".025", "✓"),
    ]
    assert picture.title == ("Chosen blocks came to a KL divergence of 0.00080 to 0.025; the dearest candidate to 0.58")
    assert picture.rows[1] == (1, 3, 2, "0.006000", "yes")
    assert picture.rows[3] == (2, 1, 0, "–", "")


def test_levels_are_even_between_logarithms() -> None:
    found = {block: Candidate(0, 10.0 ** (block - 8)) for block in range(1, 9)}
    picture = candidates_picture([Round(found, frozenset())], 9)
    levels = [one.attrib["class"] for one in shapes(picture, "rect") if hover(one)]
    assert levels == [f"heat-{level}" for level in (0, 1, 2, 3, 4, 5, 6, 6)]
    assert "dearest candidate came to a KL divergence of 1.0" in (picture.title if picture else "")


def test_candidates_of_many_blocks_stand_in_rows_of_their_own() -> None:
    found = {block: Candidate(block - 1, 0.1) for block in range(1, 80)}
    picture = candidates_picture([Round(found, frozenset({5}))] * 2, 80)
    assert inside(picture)
    cells = [one for one in shapes(picture, "rect") if hover(one)]
    assert len({(one.attrib["x"], one.attrib["y"]) for one in cells}) == 2 * 79
    assert [one.text for one in shapes(picture, "text", "tick")].count("round 1") == 3


@pytest.mark.parametrize("rounds", [[], [Round({}, frozenset())], [Round({1: Candidate(0, math.nan)}, frozenset())]])
def test_without_a_divergence_there_are_no_candidates(rounds: list[Round]) -> None:
    assert candidates_picture(rounds, 4) is None


@pytest.mark.parametrize(
    ("kl", "said"), [(0.58, "0.58"), (0.0123, ".012"), (0.00099, "1e-3"), (0.0, "0"), (1.94, "1.9"), (-0.0, "0")]
)
def test_divergences_fit_into_cells(kl: float, said: str) -> None:
    assert _short(kl) == said


def test_a_shared_matrix_is_coded_by_the_block_it_stands_on() -> None:
    matrices = from_figures(sharing_figures()["matrices"])
    assert {one.coding for one in matrices} == {"whole", "rank 4 on block 2", "rank 4 on block 5"}
    assert from_figures([{"name": "a", "coding": "rank 4 on 'head'"}]) == [Matrix("a", coding="rank 4 on 'head'")]
    picture = coding_picture(matrices)
    assert picture is not None
    assert picture.title == "Most matrices are stored as they were: 13 of 16"
    assert [row[:2] for row in picture.rows] == [
        ("whole", "="), ("rank 4 on block 2", "r4@2"), ("rank 4 on block 5", "r4@5"),
    ]  # fmt: skip
