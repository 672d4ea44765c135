"""The ledger bar: to scale, adding up, every part named somewhere."""

from __future__ import annotations

import pytest
from django.utils import translation

from compression_worker.ledger import PARTS
from dashboard.glossary import PARTS as WORDS
from dashboard.pictures import ledger_picture
from tests.dashboard.pictures.shapes import NASTY, hover, inside, number, shapes


def test_the_ledger_bar_adds_up_and_names_the_largest_part() -> None:
    picture = ledger_picture([{"name": "codes", "bytes": 300}, {"name": NASTY, "bytes": 700}], 5000)
    widths = [number(one, "width") for one in shapes(picture, "rect", "segment")]
    assert widths[0] / widths[1] == pytest.approx(700 / 300, rel=1e-3)
    assert picture is not None
    assert "5.00×" in picture.title
    assert [row[1] for row in picture.rows] == ["700", "300", "1,000"]
    assert [row[3] for row in picture.rows] == ["14.00 %", "6.00 %", "20.00 %"]


def test_the_two_bars_have_one_scale() -> None:
    picture = ledger_picture([{"name": "codes", "bytes": 250}], 1000)
    (source,), (artifact,) = shapes(picture, "rect", "fill-muted"), shapes(picture, "rect", "fill-accent")
    assert number(artifact, "width") / number(source, "width") == pytest.approx(0.25, rel=1e-3)
    assert number(artifact, "x") == number(source, "x")


def test_parts_too_narrow_for_a_name_are_named_below_in_the_bars_order() -> None:
    parts = [{"name": name, "bytes": size} for name, size in (("codes", 10**9), ("norms", 900), ("scales", 4000))]
    picture = ledger_picture(parts, 10**10)
    words = [one.text or "" for one in shapes(picture, "text")]
    assert "codes" in words
    assert [word for word in words if word.startswith(("scales", "norms"))] == ["scales 4.00 kB", "norms 900 B"]
    assert [hover(one).partition(" ")[0] for one in shapes(picture, "rect", "segment")] == ["codes", "scales", "norms"]


def test_the_same_part_has_the_same_colour_in_another_artifact() -> None:
    def tone(parts: list[dict[str, object]]) -> str:
        found = shapes(ledger_picture(parts, 10**6), "rect", "segment")
        return next(one.attrib["class"] for one in found if hover(one).startswith("embeddings"))

    assert tone([{"name": "embeddings", "bytes": 9}, {"name": "codes", "bytes": 1}]) == tone(
        [{"name": "embeddings", "bytes": 1}, {"name": "codes", "bytes": 9}]
    )


def test_every_part_of_the_ledger_has_its_word() -> None:
    assert set(PARTS) <= set(WORDS)


@pytest.mark.parametrize("parts", [[], [{"name": "codes", "bytes": 0}]])
def test_an_artifact_without_bytes_has_no_picture(parts: list[dict[str, object]]) -> None:
    assert ledger_picture(parts, 1000) is None


def test_an_artifact_larger_than_its_source_does_not_say_smaller() -> None:
    picture = ledger_picture([{"name": "codes", "bytes": 2000}], 1000)
    assert picture is not None
    assert picture.title.startswith("Not smaller")
    assert inside(picture)


@pytest.mark.parametrize("source", [0, 1, 10**18])
def test_it_stays_in_its_frame_at_any_size(source: int) -> None:
    parts = [{"name": name, "bytes": 10 ** (at + 1)} for at, name in enumerate((*PARTS, NASTY))]
    assert inside(ledger_picture(parts, source))


def test_it_reads_in_japanese() -> None:
    with translation.override("ja"):
        assert inside(ledger_picture([{"name": name, "bytes": 1000} for name in PARTS], 10**6))
