"""Residents and handles: shared by digest, kept while somebody points at them, never back a generation."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from compression_worker.serving.variants import NotReady, Resident, UnknownModel, Variants
from tests.compression_worker.serving.conftest import handle


def test_a_model_leaves_memory_when_nobody_points_at_it(full_precision: Resident, poisoned: Resident) -> None:
    table = Variants()
    table.swap(handle(poisoned, 1, fallback=full_precision))
    assert table.resident_digests() == [full_precision.digest, poisoned.digest]
    table.swap(handle(full_precision, 2))
    assert table.resident_digests() == [full_precision.digest]


def test_a_running_answer_keeps_its_model_and_its_handle(full_precision: Resident, poisoned: Resident) -> None:
    table = Variants()
    table.swap(handle(poisoned, 1))
    with table.checkout("support") as held:
        table.swap(handle(full_precision, 2))
        assert held.resident is poisoned
        assert poisoned.digest in table.resident_digests()
    assert table.resident_digests() == [full_precision.digest]


def test_two_environments_share_one_resident_model(full_precision: Resident) -> None:
    table = Variants()
    table.swap(handle(full_precision))
    alone = table.resident_bytes()
    table.swap(replace(handle(full_precision), environment="staging", alias="support-staging"))
    assert table.resident_bytes() == alone
    assert alone == sum(p.numel() * p.element_size() for p in full_precision.model.parameters()) + sum(
        b.numel() * b.element_size() for b in full_precision.model.buffers()
    )


def test_threads_that_want_one_digest_load_it_once(full_precision: Resident) -> None:
    table, loads, barrier = Variants(), [], threading.Barrier(4)

    def load() -> Resident:
        loads.append(1)
        return full_precision

    def want() -> None:
        with table.obtain(full_precision.digest, load) as resident:
            assert resident is full_precision
            barrier.wait(5)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(loads) == 1
    assert table.resident_digests() == []


def test_a_load_that_fails_leaves_nothing_behind(full_precision: Resident) -> None:
    table = Variants()

    def fail() -> Resident:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"), table.obtain(full_precision.digest, fail):
        pass
    with table.obtain(full_precision.digest, lambda: full_precision) as resident:
        assert resident is full_precision


def test_it_never_goes_back_a_generation(full_precision: Resident, poisoned: Resident) -> None:
    table = Variants()
    assert table.swap(handle(full_precision, 5))
    assert not table.swap(handle(poisoned, 4))
    assert table.active("production").generation == 5
    assert table.resident_digests() == [full_precision.digest]


def test_a_fallback_loses_against_a_newer_generation(full_precision: Resident, poisoned: Resident) -> None:
    table = Variants()
    first = handle(poisoned, 1, fallback=full_precision)
    table.swap(first)
    table.swap(handle(poisoned, 2, fallback=full_precision))
    assert not table.swap(first.fallen_back("broken"), only_from=first)
    assert table.active("production").generation == 2


def test_an_unknown_name_differs_from_one_that_is_not_ready() -> None:
    table = Variants()
    table.expect("support", "production")
    with pytest.raises(NotReady), table.checkout("support"):
        pass
    with pytest.raises(UnknownModel), table.checkout("nobody"):
        pass
