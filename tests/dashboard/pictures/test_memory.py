"""Memory of a training beside other ways of training: to one scale, the job's own first."""

from __future__ import annotations

import pytest

from dashboard.pictures import Measure, heatmap_picture, memory_picture
from dashboard.pictures.matrices import from_figures
from tests.dashboard.pictures.shapes import inside, number, shapes
from tests.factories import standalone_figures

TRAINING = {
    "peak_bytes": 5_000_000_000,
    "lora_fp16_bytes": 15_000_000_000,
    "lora_fp32_bytes": 28_000_000_000,
    "full_finetune_bytes": 100_000_000_000,
    "losses": [1.0, 0.5],
    "tokens": 1000,
}


def test_bars_are_to_one_scale_and_only_one_is_the_jobs_own() -> None:
    picture = memory_picture(TRAINING)
    assert picture is not None
    assert inside(picture)
    widths = [number(one, "width") for one in shapes(picture, "rect")]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 3, 5.6, 20], rel=1e-2)
    assert len(shapes(picture, "rect", "fill-accent")) == 1
    assert picture.title == (
        "Training holds 5.00 GB at once, 3.00× less than LoRA on 16-bit weights, which needs 15.0 GB"
    )
    assert [row[1:] for row in picture.rows] == [
        ("5,000,000,000", "1.00×"),
        ("15,000,000,000", "3.00×"),
        ("28,000,000,000", "5.60×"),
        ("100,000,000,000", "20.0×"),
    ]


def test_what_is_not_less_is_not_called_less() -> None:
    picture = memory_picture(TRAINING | {"peak_bytes": 20_000_000_000})
    assert picture is not None
    assert picture.title == "Training holds 20.0 GB at once; LoRA on 16-bit weights needs 15.0 GB"


@pytest.mark.parametrize("figures", [{}, {"peak_bytes": 5}, {"lora_fp16_bytes": 5, "lora_fp32_bytes": 6}])
def test_without_two_figures_of_which_one_is_its_own_there_is_no_picture(figures: dict[str, int]) -> None:
    assert memory_picture(figures) is None


def test_figures_that_are_not_told_are_left_out() -> None:
    picture = memory_picture({"peak_bytes": 5, "full_finetune_bytes": 50, "lora_fp16_bytes": None})
    assert picture is not None
    assert len(picture.rows) == 2


def test_proxy_losses_are_a_heatmap_of_their_own() -> None:
    matrices = from_figures(standalone_figures()["matrices"], "proxy_loss")
    picture = heatmap_picture(matrices, Measure.PROXY)
    assert picture is not None
    assert picture.title == "Relative proxy loss between 0.002 and 0.005; the largest is model.layers.3.mlp.down_proj"
    assert picture.columns[:3] == ["matrix", "relative proxy loss", "coding"]
    assert picture.rows[0] == ("model.layers.0.self_attn.q_proj", "0.002000", "4 bits")
    edges = [one.text for one in shapes(picture, "text", "tick")][-8:]
    assert len(set(edges)) == 8, "the scale of colours tells its levels apart"
    assert heatmap_picture(from_figures([{"name": "a", "relative_error": 0.1}], "proxy_loss"), Measure.PROXY) is None
