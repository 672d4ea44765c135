"""The decisions of one environment: newer wins over a load, nothing goes back, refusals keep what answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from compression_worker.contracts import CompressionError
from compression_worker.serving.loading import LoadAbandoned
from compression_worker.serving.switch import Pointer, Switch
from compression_worker.serving.variants import Resident, Variants

FULL, SMALL, BASE, OTHER = "a" * 64, "b" * 64, "c" * 64, "d" * 64


class GatedLoader:
    """Gives out models that are in memory already, each when its gate opens; fails where it was told to."""

    def __init__(self, *residents: Resident) -> None:
        self._residents = {resident.digest: resident for resident in residents}
        self.gates = {digest: threading.Event() for digest in self._residents}
        self.failures: dict[str, Exception] = {}
        self.loads: list[str] = []

    def full_precision(self, digest: str, abandoned: Callable[[], bool]) -> Resident:
        self.loads.append(digest)
        while not self.gates[digest].wait(0.005):
            if abandoned():
                raise LoadAbandoned
        if digest in self.failures:
            raise self.failures[digest]
        return self._residents[digest]

    def compressed(self, digest: str, base: str, abandoned: Callable[[], bool]) -> Resident:
        assert base == BASE
        return self.full_precision(digest, abandoned)


def full(generation: int) -> Pointer:
    return Pointer(
        environment="production", alias="support", generation=generation, kind="full_precision",
        variant_digest=FULL, base_digest=None, artifact_digest=None, digest=FULL,
    )  # fmt: skip


def compressed(generation: int) -> Pointer:
    return replace(
        full(generation), kind="compressed", base_digest=BASE, artifact_digest=SMALL, digest=SMALL
    )  # fmt: skip


@pytest.fixture
def loader(full_precision: Resident, poisoned: Resident) -> GatedLoader:
    return GatedLoader(full_precision, poisoned)


@pytest.fixture
def variants() -> Variants:
    return Variants()


@pytest.fixture
def switch(variants: Variants, loader: GatedLoader) -> Switch:
    return Switch("production", variants, loader, lambda: None, retry_seconds=0.2)


def wait_for(switch: Switch, state: str, generation: int, digest: str) -> None:
    deadline = time.monotonic() + 10
    expected = (state, generation, digest)
    while (found := (switch.status().state, switch.status().generation, switch.status().digest)) != expected:
        assert time.monotonic() < deadline, f"{found}: {switch.status().message}"
        time.sleep(0.005)


def open_all(loader: GatedLoader) -> None:
    for gate in loader.gates.values():
        gate.set()


def test_nothing_deployed_is_a_start_and_no_fault(switch: Switch) -> None:
    nothing = replace(full(0), kind=None, variant_digest=None, digest=None)
    switch.see(nothing)
    assert (switch.status().state, switch.ready) == ("starting", True)


def test_it_loads_beside_and_swaps(switch: Switch, loader: GatedLoader) -> None:
    loader.gates[FULL].set()
    switch.see(full(1))
    wait_for(switch, "serving", 1, FULL)
    switch.see(compressed(2))
    wait_for(switch, "loading", 1, FULL)
    assert switch.status().wanted == 2
    loader.gates[SMALL].set()
    wait_for(switch, "serving", 2, SMALL)


def test_a_first_load_is_not_ready(switch: Switch, loader: GatedLoader) -> None:
    switch.see(full(1))
    assert not switch.ready
    loader.gates[FULL].set()
    wait_for(switch, "serving", 1, FULL)
    assert switch.ready


def test_full_precision_stays_resident_under_a_compressed_model(
    switch: Switch, loader: GatedLoader, variants: Variants
) -> None:
    open_all(loader)
    switch.see(compressed(1))
    wait_for(switch, "serving", 1, SMALL)
    assert variants.resident_digests() == [FULL, SMALL]
    switch.see(full(2))
    wait_for(switch, "serving", 2, FULL)
    assert loader.loads == [FULL, SMALL]


def test_a_rollback_wins_over_a_running_load(switch: Switch, loader: GatedLoader, variants: Variants) -> None:
    loader.gates[FULL].set()
    switch.see(full(1))
    wait_for(switch, "serving", 1, FULL)
    switch.see(compressed(2))
    wait_for(switch, "loading", 1, FULL)
    began = time.monotonic()
    switch.see(full(3))
    wait_for(switch, "serving", 3, FULL)
    assert time.monotonic() - began < 1
    loader.gates[SMALL].set()
    time.sleep(0.1)
    assert (switch.status().state, switch.status().generation) == ("serving", 3)
    assert variants.resident_digests() == [FULL]


def test_a_load_that_ends_too_late_does_not_take_over(
    switch: Switch, loader: GatedLoader, variants: Variants, poisoned: Resident
) -> None:
    """The load does not notice in time that it was abandoned: the check before the swap has to."""
    open_all(loader)
    reached, go_on = threading.Event(), threading.Event()

    def slow(digest: str, base: str, abandoned: Callable[[], bool]) -> Resident:
        reached.set()
        assert go_on.wait(10)
        return poisoned

    loader.compressed = slow  # type: ignore[method-assign]
    switch.see(compressed(1))
    assert reached.wait(5)
    switch.see(full(2))
    wait_for(switch, "serving", 2, FULL)
    go_on.set()
    time.sleep(0.1)
    wait_for(switch, "serving", 2, FULL)
    assert variants.resident_digests() == [FULL]


def test_an_older_load_does_not_answer_while_a_newer_one_is_loading(
    switch: Switch, loader: GatedLoader, variants: Variants
) -> None:
    """A rollback to another variant takes its time; the compressed model it replaces must not slip in before it."""
    switch.see(full(1))
    loader.gates[FULL].set()
    wait_for(switch, "serving", 1, FULL)
    reached, go_on = threading.Event(), threading.Event()

    def slow(digest: str, base: str, abandoned: Callable[[], bool]) -> Resident:
        reached.set()
        assert go_on.wait(10)
        return GatedLoader.full_precision(loader, digest, lambda: False)

    loader.compressed = slow  # type: ignore[method-assign]
    loader.gates |= {SMALL: threading.Event(), OTHER: threading.Event()}
    loader.gates[SMALL].set()
    switch.see(compressed(2))
    assert reached.wait(5)
    switch.see(replace(full(3), variant_digest=OTHER, digest=OTHER))
    go_on.set()
    time.sleep(0.2)
    assert (switch.status().state, switch.status().generation) == ("loading", 1)
    assert variants.resident_digests() == [FULL]
    switch.close()


def test_a_refused_generation_leaves_the_previous_one_answering(switch: Switch, loader: GatedLoader) -> None:
    open_all(loader)
    switch.see(full(1))
    wait_for(switch, "serving", 1, FULL)
    loader.failures[SMALL] = CompressionError("damaged_artifact", "'delta.safetensors' does not match its digest")
    switch.see(compressed(2))
    wait_for(switch, "refused", 1, FULL)
    assert switch.status().wanted == 2
    assert switch.status().message == "generation 2 is refused: 'delta.safetensors' does not match its digest"


def test_without_a_way_back_nothing_new_is_served(switch: Switch, loader: GatedLoader) -> None:
    open_all(loader)
    loader.failures[FULL] = CompressionError("missing_blob", "'model.safetensors' is missing")
    switch.see(compressed(1))
    wait_for(switch, "refused", 0, "")
    assert loader.loads == [FULL]
    assert not switch.ready


def test_a_refused_generation_is_tried_again_and_taken_when_it_was_put_right(
    switch: Switch, loader: GatedLoader
) -> None:
    open_all(loader)
    switch.see(full(1))
    loader.failures[SMALL] = OSError("the disk is away")
    wait_for(switch, "serving", 1, FULL)
    switch.see(compressed(2))
    wait_for(switch, "refused", 1, FULL)
    switch.see(compressed(2))
    assert loader.loads.count(SMALL) == 1
    del loader.failures[SMALL]
    time.sleep(0.25)
    switch.see(compressed(2))
    wait_for(switch, "serving", 2, SMALL)


def test_with_nothing_else_to_answer_from_full_precision_stands_in(switch: Switch, loader: GatedLoader) -> None:
    open_all(loader)
    loader.failures[SMALL] = CompressionError("damaged_artifact", "'delta.safetensors' is missing")
    switch.see(compressed(7))
    wait_for(switch, "fallback", 7, FULL)
    assert switch.status().message == "'delta.safetensors' is missing"
    assert switch.ready


@pytest.mark.parametrize("set_back", [full(1), compressed(1), full(2)])
def test_a_pointer_that_went_back_is_refused_until_it_passes_what_was_seen(
    switch: Switch, loader: GatedLoader, set_back: Pointer
) -> None:
    open_all(loader)
    switch.see(full(1))
    switch.see(compressed(2))
    wait_for(switch, "serving", 2, SMALL)
    switch.see(set_back)
    wait_for(switch, "rewound", 2, SMALL)
    assert "set back" in switch.status().message
    switch.see(compressed(2))
    wait_for(switch, "serving", 2, SMALL)
    switch.see(set_back)
    switch.see(full(3))
    wait_for(switch, "serving", 3, FULL)


@pytest.mark.parametrize("set_back", [full(1), compressed(1), full(2)])
def test_a_pointer_that_went_back_is_followed_once_its_epoch_is_raised(
    switch: Switch, loader: GatedLoader, set_back: Pointer
) -> None:
    open_all(loader)
    switch.see(compressed(2))
    wait_for(switch, "serving", 2, SMALL)
    switch.see(set_back)
    wait_for(switch, "rewound", 2, SMALL)
    assert "recover" in switch.status().message
    raised = replace(set_back, epoch=2)
    switch.see(raised)
    assert raised.digest is not None
    wait_for(switch, "serving", raised.generation, raised.digest)
    assert switch.status().epoch == 2
    # What the former epoch still shows, a replica that lags or a second restore, is behind now.
    switch.see(full(9))
    wait_for(switch, "rewound", raised.generation, raised.digest)


def test_a_raised_epoch_of_what_answers_already_loads_nothing_twice(switch: Switch, loader: GatedLoader) -> None:
    open_all(loader)
    switch.see(compressed(2))
    wait_for(switch, "serving", 2, SMALL)
    loads = list(loader.loads)
    switch.see(replace(compressed(2), epoch=5))
    deadline = time.monotonic() + 5
    while switch.status().epoch != 5 or switch.status().state != "serving":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert loader.loads == loads


def test_a_row_that_contradicts_itself_is_refused(switch: Switch) -> None:
    switch.see(replace(compressed(1), digest=FULL))
    wait_for(switch, "refused", 0, "")
    assert "do not agree" in switch.status().message
