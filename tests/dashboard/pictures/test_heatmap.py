"""Matrix by matrix: where each stands, how its error is shown, and how it is stored."""

from __future__ import annotations

import math
from collections import Counter
from time import process_time

import pytest

from dashboard.pictures import Matrix, coding_picture, heatmap_picture
from dashboard.pictures.coding import sign_table
from dashboard.pictures.heatmap import Scale, short_number
from dashboard.pictures.matrices import Place, from_figures, grid, place
from tests.dashboard.pictures.shapes import NASTY, hover, inside, number, shapes, size

LLAMA = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def llama(blocks: int) -> list[Matrix]:
    return [
        Matrix(f"model.layers.{block}.{kind}.weight", 0.2 + block / 1000 + at / 100)
        for block in range(blocks)
        for at, kind in enumerate(LLAMA)
    ]


def mixture(experts: int, blocks: int = 2) -> list[Matrix]:
    kinds = [f"block_sparse_moe.experts.{number}.{kind}" for number in range(experts) for kind in ("w1", "w2", "w3")]
    return [
        Matrix(f"model.layers.{block}.{kind}.weight", 0.1 + at / 1000)
        for block in range(blocks)
        for at, kind in enumerate(["self_attn.q_proj", *kinds])
    ]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Place(3, ("self_attn", "q"))),
        ("transformer.h.11.mlp.c_fc", Place(11, ("mlp", "c_fc"))),
        ("gpt_neox.layers.0.attention.query_key_value.weight", Place(0, ("attention", "query_key_value"))),
        ("model.layers.2.block_sparse_moe.experts.7.w1.weight", Place(2, ("block_sparse_moe", "experts", "w1"), "7")),
        ("model.layers.2.mlp.experts.7.gate_proj.weight", Place(2, ("mlp", "experts", "gate"), "7")),
        ("lm_head.weight", None),
        ("model.embed_tokens.weight", None),
    ],
)
def test_matrix_names_give_block_kind_and_expert(name: str, found: Place | None) -> None:
    assert place(name) == found


def test_columns_stand_in_reading_order_and_rows_are_blocks() -> None:
    shown = grid(reversed(llama(3)))
    assert shown.kinds == ["q", "k", "v", "o", "gate", "up", "down"]
    assert shown.blocks == [0, 1, 2]


def test_kinds_of_one_last_name_stay_apart() -> None:
    """GPT-2 calls two matrices of a block c_proj."""
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    shown = grid([Matrix(f"transformer.h.0.{name}.weight", 0.5) for name in names])
    assert shown.kinds == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert [len(cell.matrices) for cell in shown.cells.values()] == [1, 1, 1, 1]


def test_few_experts_stand_apart_and_many_share_a_column() -> None:
    few, many = grid(mixture(2)), grid(mixture(8))
    assert few.kinds == ["q", "w1 0", "w1 1", "w3 0", "w3 1", "w2 0", "w2 1"]
    assert many.kinds == ["q", "w1 ×8", "w3 ×8", "w2 ×8"]
    assert len(many.cells[1, "w1 ×8"].matrices) == 8


def test_a_shared_expert_is_not_one_of_the_experts() -> None:
    kinds = ["shared_expert.gate_proj", *(f"experts.{number}.gate_proj" for number in range(60))]
    shown = grid([Matrix(f"model.layers.0.mlp.{kind}.weight", 0.5) for kind in kinds])
    assert sorted(shown.kinds) == ["experts.gate ×60", "shared_expert.gate"]


def test_a_cell_of_many_experts_shows_the_largest_error_and_says_the_range() -> None:
    picture = heatmap_picture(mixture(8))
    assert picture is not None
    cell = next(one for one in shapes(picture, "rect") if "w1 of 8 experts" in hover(one))
    assert hover(cell) == "block 0, w1 of 8 experts: 0.101 to 0.122, mean 0.112"
    assert "largest error" in picture.note
    assert picture.rows[1] == ("block 0, w1 of 8 experts", "0.1220")
    assert heatmap_picture(llama(2)).note == ""  # type: ignore[union-attr]


@pytest.mark.parametrize(("blocks", "panels"), [(1, 1), (4, 1), (30, 1), (34, 1), (35, 1), (80, 2), (126, 3)])
def test_every_matrix_has_a_cell_of_its_own_from_one_block_to_126(blocks: int, panels: int) -> None:
    picture = heatmap_picture(llama(blocks))
    cells = [one for one in shapes(picture, "rect") if hover(one)]
    assert len({(one.attrib["x"], one.attrib["y"]) for one in cells}) == 7 * blocks
    assert Counter(one.text for one in shapes(picture, "text"))["gate"] == panels
    assert inside(picture)
    width, height = size(picture)
    assert height < 850
    assert width < 1000
    assert picture is not None
    assert len(picture.rows) == 7 * blocks


def test_every_cell_has_its_number_and_its_name_on_hover() -> None:
    picture = heatmap_picture([Matrix(f"model.layers.0.{NASTY}", 0.25, "row", 1500), Matrix("model.layers.0.b", 0.5)])
    assert sorted(one.text or "" for one in shapes(picture, "text", "cell")) == ["0.25", "0.50"]
    assert {hover(one) for one in shapes(picture, "rect")} >= {f"model.layers.0.{NASTY} · 0.2500 · row · 1.50 kB"}


def test_colours_follow_the_error_and_the_legend_gives_their_edges() -> None:
    picture = heatmap_picture(llama(4))
    levels = {hover(one): one.attrib["class"] for one in shapes(picture, "rect") if hover(one)}
    assert levels["model.layers.0.self_attn.q_proj.weight · 0.2000"] == "heat-0"
    assert levels["model.layers.3.mlp.down_proj.weight · 0.2630"] == "heat-6 worst"
    legend = [one for one in shapes(picture, "rect") if not hover(one)]
    assert [one.attrib["class"] for one in legend] == [f"heat-{level}" for level in range(7)]
    assert [number(one, "x") for one in legend] == sorted(number(one, "x") for one in legend)
    words = [one.text for one in shapes(picture, "text", "tick")]
    assert words[-8:] == ["0.20", "0.21", "0.22", "0.23", "0.24", "0.24", "0.25", "0.26"]


def test_levels_divide_the_range_evenly_and_hold_both_ends() -> None:
    scale = Scale(0.0, 0.7)
    assert [scale.level(value) for value in (0.0, 0.099, 0.101, 0.35, 0.7)] == [0, 0, 1, 3, 6]
    assert [round(scale.edge(level), 2) for level in (0, 3, 7)] == [0.0, 0.3, 0.7]


def test_the_title_names_the_worst_matrix() -> None:
    assert "model.layers.2.mlp.down_proj" in heatmap_picture(llama(3)).title  # type: ignore[union-attr]


def test_equal_errors_need_no_scale() -> None:
    picture = heatmap_picture([Matrix(f"model.layers.{n}.mlp.up_proj", 0.5) for n in range(3)])
    assert picture is not None
    assert "0.50 in every matrix" in picture.title
    assert len([one for one in shapes(picture, "rect") if not hover(one)]) == 1


def test_what_lies_outside_the_blocks_is_shown_below_them() -> None:
    picture = heatmap_picture([*llama(2), Matrix("lm_head.weight", 0.9)])
    head = next(one for one in shapes(picture, "rect") if hover(one).startswith("lm_head"))
    last = max(number(one, "y") for one in shapes(picture, "rect") if hover(one).startswith("model"))
    assert number(head, "y") > last
    assert picture is not None
    assert picture.rows[-1][0] == "lm_head.weight"
    assert inside(heatmap_picture([Matrix("lm_head.weight", 0.9)]))


@pytest.mark.parametrize(
    "matrices", [[], [Matrix("model.layers.0.a")], [Matrix("model.layers.0.a", math.nan)], [Matrix("a", math.inf)]]
)
def test_without_an_error_that_is_a_number_there_is_no_picture(matrices: list[Matrix]) -> None:
    assert heatmap_picture(matrices) is None


def test_an_error_that_is_no_number_is_said_and_spoils_no_scale() -> None:
    picture = heatmap_picture([*llama(1), Matrix("model.layers.1.mlp.up_proj", math.nan)])
    bad = next(one for one in shapes(picture, "rect") if hover(one).startswith("model.layers.1"))
    assert bad.attrib["class"] == "heat-none"
    assert "?" in [one.text for one in shapes(picture, "text", "cell")]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"), (0.412, "0.41"), (0.0042, "0.004"), (0.00001, "1e-5"), (1.26, "1.3"), (12.34, "12"),
        (123.4, "123"), (1e30, "1e30"), (None, "?"), (math.inf, "?"),
    ],
)  # fmt: skip
def test_numbers_in_cells_are_short(value: float | None, words: str) -> None:
    assert short_number(value) == words


def test_the_table_has_a_column_for_what_is_known_only() -> None:
    bare = heatmap_picture(llama(1))
    whole = heatmap_picture([Matrix("model.layers.0.a", 0.5, "2 masks", 1500, 0.02), Matrix("model.layers.0.b", 0.4)])
    assert bare is not None
    assert whole is not None
    assert list(bare.columns) == ["matrix", "relative error"]
    assert list(whole.columns) == ["matrix", "relative error", "error of the output", "coding", "bytes"]
    assert whole.rows[0] == ("model.layers.0.a", "0.5000", "0.02000", "2 masks", "1.50 kB")
    assert whole.numeric == {1, 2, 4}


def test_figures_give_matrices_and_nothing_else_does() -> None:
    entries = [{"name": "a", "relative_error": 0.5, "scale": 1, "bytes": 7}, {"relative_error": 1}, {"name": "b"}]
    assert from_figures(entries) == [Matrix("a", 0.5, "", 7), Matrix("b")]
    assert from_figures([{"name": "a", "relative_error": "big", "bytes": True, "coding": None}]) == [Matrix("a")]


def coded(*codings: str) -> list[Matrix]:
    return [
        Matrix(f"model.layers.{block}.mlp.up_proj.weight", 0.5, coding, 100 * (block + 1))
        for block, coding in enumerate(codings)
    ]


def test_the_coding_of_each_matrix_has_a_sign_and_the_table_sums_it_up() -> None:
    picture = coding_picture(coded("row", "row", "2 masks", "tensor"))
    assert [one.text for one in shapes(picture, "text", "cell")] == ["R", "R", "2M", "T"]
    assert picture is not None
    assert "row: 2 of 4" in picture.title
    assert picture.rows[0] == ("row", "R", "2", "50.0 %", "300 B", "0.500")
    assert [row[0] for row in picture.rows] == ["row", "2 masks", "tensor"]
    assert inside(picture)


def test_one_coding_for_all_is_no_picture() -> None:
    assert coding_picture(coded("row", "row")) is None
    assert coding_picture(llama(2)) is None
    assert coding_picture([]) is None


def test_a_head_stored_another_way_is_below_the_blocks_and_no_reason_for_a_picture_alone() -> None:
    head = Matrix("lm_head.weight", 0.2, "raw", 100)
    assert coding_picture([*coded("row", "row"), head]) is None
    picture = coding_picture([*coded("row", "tensor"), head])
    cells = shapes(picture, "rect", "ground")
    assert hover(cells[-1]) == "lm_head.weight · raw"
    assert number(cells[-1], "y") > number(cells[-2], "y")
    assert inside(picture)


def test_signs_are_short_and_never_the_same() -> None:
    known = {
        "tensor": "T", "row": "R", "column": "C", "group 64": "G64", "2 masks": "2M", "rank 8": "r8", "dropped": "×",
        "2 masks, row": "2MR", "3 masks, group 128, rank 16": "3MG128r16",
        "4 bits, 3 groups": "4b3g", "2 bits, whole rows": "2bw", "E8P, 2 bits, rank 8": "E8P2br8",
    }  # fmt: skip
    signs = sign_table([*known, "odd", "oddly", NASTY, "3 masks, group 128, rank 160"])
    assert {coding: signs[coding] for coding in known} == known
    assert len(set(signs.values())) == len(signs)
    assert max(len(sign) for sign in signs.values()) <= 10


def test_cells_are_as_wide_as_the_longest_sign() -> None:
    picture = coding_picture(coded("3 masks, group 128, rank 16", *(["row"] * 80)))
    cell = shapes(picture, "rect", "ground")[0]
    assert number(cell, "width") >= 0.56 * 10 * len("3MG128r16")
    assert inside(picture)


def test_experts_coded_differently_in_one_cell_are_said_to_be() -> None:
    mixed = [Matrix(one.name, one.error, "row" if at % 2 else "tensor") for at, one in enumerate(mixture(8))]
    picture = coding_picture(mixed)
    assert "…" in [one.text for one in shapes(picture, "text", "cell")]
    assert any(hover(one).endswith("row, tensor") for one in shapes(picture, "rect"))


def test_a_large_mixture_is_drawn_quickly_and_stays_small() -> None:
    """48 blocks of 128 experts: 18,432 matrices in 192 cells."""
    matrices = mixture(128, 48)
    began = process_time()
    picture = heatmap_picture(matrices)
    assert process_time() - began < 10
    assert picture is not None
    assert len(picture.rows) == 48 * 4
    assert len(picture.svg) < 150_000
