"""Who may follow whom, how many have to, and at what rank: arithmetic on shapes."""

from __future__ import annotations

import pytest

from compression_worker.contracts import CompressionError
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.estimate import estimate
from compression_worker.methods.deltallm.groups import (
    Depth,
    budget,
    given,
    parse_groups,
    parse_ranks,
    picked,
    rounds,
    saving,
    spread,
)
from compression_worker.preflight import Inputs, Model


def test_groups_are_read_as_they_are_written() -> None:
    assert parse_groups(" 4:5, 6; 10:11") == {5: 4, 6: 4, 11: 10}
    assert parse_groups("") == {}
    assert parse_groups("4:5,6@32; 10:11 @ 64;4:7") == {5: 4, 6: 4, 11: 10, 7: 4}
    assert parse_ranks("4:5,6@32; 10:11 @ 64;4:7") == {5: 32, 6: 32, 11: 64}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4", "is no group; write anchor:follower"),
        ("4:five", "is no group"),
        ("5:4", "an anchor comes before its followers"),
        ("4:4", "block 4 cannot follow block 4"),
        ("-1:4", "block 4 cannot follow block -1"),
        ("1:3;2:3", "block 3 follows twice"),
        ("1:2;2:3", "block 2 is an anchor and a follower"),
        ("1:2@", "'1:2@' is no group; .* as in 4:5,6@32"),
        ("1:2@half", "'1:2@half' is no group"),
        ("1:2@4@8", "'1:2@4@8' is no group"),
        ("1@4:2", "'1@4:2' is no group"),
        ("1:2@-4", "group '1:2@-4' has rank -4; it must be 0 or more"),
    ],
)
def test_groups_that_contradict_each_other_are_refused(text: str, words: str) -> None:
    with pytest.raises(CompressionError, match=words) as refused:
        parse_groups(text)
    assert refused.value.code == "bad_setting"


def test_edges_never_follow_and_may_be_anchors() -> None:
    depth = Depth(blocks=8, alike=tuple(range(8)), protect_first=2, protect_last=2)
    assert depth.candidates == (2, 3, 4, 5)
    assert depth.allowed({}, 1) == {2: 1, 3: 2, 4: 3, 5: 4}
    assert depth.allowed({4: 3}, 1) == {2: 1, 5: 3}, "3 is an anchor; the nearest one of 5 that shares nothing is 3"
    assert depth.allowed({}, 4) == {2: 1}, "all four follow block 1, and the first choice cannot be another"
    assert Depth(blocks=4, alike=(0, 1, 2, 3), protect_first=0, protect_last=0).candidates == (1, 2, 3)


def test_choices_of_one_round_do_not_exclude_each_other() -> None:
    depth = Depth(blocks=8, alike=tuple(range(8)), protect_first=1, protect_last=1)
    cost = {1: 0.5, 2: 0.2, 3: 0.1, 4: 0.4, 5: 0.3, 6: 0.6}
    assert picked(cost, depth, {}, 1, 3) == [3]
    assert picked(cost, depth, {}, 2, 3) == [3, 5], "2 is the anchor of 3"
    assert picked(cost, depth, {}, 3, 3) == [3, 5, 1], "4 is the anchor of 5, and was measured on 3, which follows"
    still, chosen = 6, dict[int, int]()
    while still:
        for block in picked(cost, depth, chosen, 2, still):
            chosen[block] = depth.allowed(chosen, still)[block]
            still -= 1
    assert sorted(chosen) == [1, 2, 3, 4, 5, 6], "every candidate follows where that is asked for"
    assert set(chosen.values()) == {0}


PHI = [(8192, 3072), (8192, 3072), (3072, 8192)]
PARAMETERS = 3_821_079_552


@pytest.mark.parametrize(
    ("rank", "delta", "saved", "for_12", "for_24"),
    [
        (32, 1.08, 74.4, 6.2, 12.3),
        (64, 2.16, 73.3, 6.3, 12.5),
        (100, 3.38, 72.1, 6.4, 12.7),
        (128, 4.33, 71.2, 6.4, 12.9),
        (256, 8.65, 66.8, 6.9, 13.7),
    ],
)
def test_the_arithmetic_of_phi_follows_from_shapes(
    rank: int, delta: float, saved: float, for_12: float, for_24: float
) -> None:
    assert saving(PHI, 0) / 1e6 == pytest.approx(75.5, abs=0.05)
    assert (saving(PHI, 0) - saving(PHI, rank)) / 1e6 == pytest.approx(delta, abs=0.005)
    assert saving(PHI, rank) / 1e6 == pytest.approx(saved, abs=0.05)
    assert 0.12 * PARAMETERS / saving(PHI, rank) == pytest.approx(for_12, abs=0.06)
    assert 0.24 * PARAMETERS / saving(PHI, rank) == pytest.approx(for_24, abs=0.06)
    depth = Depth(blocks=32, alike=tuple(range(32)), protect_first=2, protect_last=2)
    for target, count in ((0.12, 7), (0.24, 13 if rank < 256 else 14)):
        found = budget(PHI, PARAMETERS, depth, target=target, followers=None, rank=rank)
        assert found.followers == count
        assert found.rank >= rank
        assert found.followers * saving(PHI, found.rank) >= target * PARAMETERS
        assert found.followers * saving(PHI, found.rank + 1) < target * PARAMETERS


def test_the_estimate_reads_phi_from_its_config() -> None:
    config = {
        **{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False},
    }
    model = Model(config=config, parameters=PARAMETERS, weight_bytes=2 * PARAMETERS, size_bytes=2 * PARAMETERS)
    found = estimate(DeltaLLMConfig(), Inputs(variant=model))
    assert found.exact
    assert found.result_bytes == pytest.approx(0.88 * model.weight_bytes, rel=0.002)


def test_a_group_has_the_rank_that_it_says_and_others_that_of_all() -> None:
    depth = Depth(blocks=12, alike=tuple(range(12)), protect_first=1, protect_last=1)
    text = "4:5,6@32;10:11@100;7:8"
    found = given(parse_groups(text), parse_ranks(text), depth, PHI, 64)
    assert found.ranks == {5: 32, 6: 32, 11: 100, 8: 64}
    assert (found.followers, found.rank, found.factors(PHI)) == (4, 100, 228 * sum(n + k for n, k in PHI))
    assert spread(found.rank, found.ranks.values(), " to ") == "32 to 100"
    plain = given({5: 4, 6: 4}, {}, depth, PHI, 64)
    assert (plain.rank, plain.ranks, plain.factors(PHI)) == (64, {}, 128 * sum(n + k for n, k in PHI))
    assert spread(plain.rank, plain.ranks.values(), "-") == "64"
    assert given({5: 4}, {5: 32}, depth, PHI, 5000).rank == 32, "a rank that nobody has is not checked"
    with pytest.raises(CompressionError, match="the rank of block 11, in the group of block 10, is 5000, and a shared"):
        given(parse_groups(text), {11: 5000}, depth, PHI, 64)


def test_rounds_come_to_all_followers() -> None:
    assert rounds(7, 2) == [2, 2, 2, 1]
    assert rounds(2, 5) == [2]
