"""Results that are made ahead come in order, few at a time, and an error comes where its result would."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from compression_worker.making.threads import MOST, ahead


@pytest.fixture(autouse=True, params=[1, 2, 5])
def fixture_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_few_are_made_before_they_are_asked_for() -> None:
    started: list[int] = []
    lock = threading.Lock()

    def square(value: int) -> int:
        with lock:
            started.append(value)
        return value * value

    found = []
    for at, result in enumerate(ahead(square, range(20))):
        found.append(result)
        assert len(started) <= at + 1 + MOST
    assert found == [value * value for value in range(20)]


def test_an_error_comes_where_its_result_would() -> None:
    results = ahead(lambda value: 6 // value, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
