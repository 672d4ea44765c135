"""The knapsack against all choices there are, and its order of moves."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from compression_worker.deltas.budget import Choice, Option, cheapest, cost, loss, moves, within

OPTIONS = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.builds(Option, st.integers(0, 40), st.floats(0, 10)), min_size=1, max_size=5),
    min_size=1,
)


def best(options: dict[str, list[Option]], budget: int) -> float | None:
    """The least loss of all choices that fit."""
    names = list(options)
    fitting = [
        loss(options, choice)
        for picks in itertools.product(*(range(len(options[name])) for name in names))
        if cost(options, choice := dict(zip(names, picks, strict=True))) <= budget
    ]
    return min(fitting, default=None)


@given(OPTIONS, st.integers(0, 160))
@settings(max_examples=300, deadline=None)
def test_a_choice_fits_and_is_at_most_one_step_from_the_best(options: dict[str, list[Option]], budget: int) -> None:
    choice = within(options, budget)
    least = best(options, budget)
    if least is None:
        assert choice == cheapest(options)
        return
    assert cost(options, choice) <= budget
    assert loss(options, choice) >= least - 1e-9
    # The relaxed optimum is missed by one fractional step at most, which saves no more than the greatest step does.
    greatest = max((move.loss for move in moves(options)), default=0.0)
    assert loss(options, choice) <= least + greatest + 1e-9


@given(OPTIONS)
def test_moves_go_along_each_hull_with_falling_savings_a_byte(options: dict[str, list[Option]]) -> None:
    path = moves(options)
    choice: Choice = cheapest(options)
    rates = []
    for move in path:
        before, after = options[move.name][choice[move.name]], options[move.name][move.to]
        assert (after.bytes - before.bytes, before.loss - after.loss) == (move.bytes, move.loss)
        assert move.bytes > 0
        assert move.loss > 0
        rates.append(move.loss / move.bytes)
        choice[move.name] = move.to
    assert rates == sorted(rates, reverse=True)
    least = min(sum(min(way.loss for way in ways) for ways in options.values()), loss(options, choice))
    assert loss(options, choice) <= least + 1e-9


def test_room_that_no_hull_step_fills_goes_to_a_smaller_change() -> None:
    options = {"a": [Option(0, 10.0), Option(6, 6.0), Option(10, 0.0)]}
    assert within(options, 10) == {"a": 2}
    assert within(options, 9) == {"a": 1}
    assert within(options, 5) == {"a": 0}
