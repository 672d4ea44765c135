"""A turn at the store: one worker at a time, most wanted first, and nothing that goes wrong in it hurts its caller."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from django.db import OperationalError

from compression_worker.store import Store, StoreAway
from dashboard.lifecycle import Role, SweepState
from dashboard.models import Scrub, Sweep
from dashboard.services import storage
from dashboard.services.storage import storage_tend, storage_turn
from dashboard.services.storage_sweep import sweep_look, sweep_request
from tests.dashboard.shelf import Shelf
from tests.factories import make_user

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def shelf(tmp_path: Path, settings: object) -> Shelf:
    settings.ARTIFACT_ROOT = str(tmp_path / "store")  # type: ignore[attr-defined]
    return Shelf(Store(tmp_path / "store"))


def next_turn() -> bool:
    """As after the pause between turns."""
    Scrub.objects.update(turn_until=None)
    return storage_turn()


def test_the_first_turn_looks_through_the_store_and_begins_to_hash_it(shelf: Shelf) -> None:
    shelf.blob()
    assert storage_turn()
    assert Sweep.objects.get().store_blobs == 1
    assert Scrub.objects.get().started_at is not None
    assert not storage_turn(), "the next one is due after a pause"


def test_what_a_person_asked_for_is_done_by_the_next_turns(shelf: Shelf) -> None:
    leftover, admin = shelf.blob(), make_user(Role.ADMIN)
    storage_turn()
    shelf.age()
    assert Sweep.objects.get().blobs == 0
    sweep_look(actor=admin)
    sweep_look(actor=admin)
    next_turn()
    preview = Sweep.objects.get()
    assert (preview.state, preview.blobs) == (SweepState.PREVIEWED, 1)
    sweep_request(actor=admin, sweep=preview, reason="room")
    next_turn()
    preview.refresh_from_db()
    assert preview.state == SweepState.DONE
    assert not shelf.store.has(leftover)
    next_turn()
    assert Sweep.objects.filter(state=SweepState.PREVIEWED).count() == 1, "and the preview is made anew"


def test_many_workers_take_one_turn(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    monkeypatch.setattr(storage, "_work", lambda store, now: (turns.append(1), time.sleep(0.3), True)[2])
    threads = [threading.Thread(target=storage._turn_alone) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns == [1]


def test_a_turn_of_a_worker_that_died_is_free_again_after_a_while(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(store: Store, now: object) -> bool:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_work", killed)
        patch.setattr(storage, "TURN_LEASE", storage.timedelta(seconds=0.5))
        with pytest.raises(Killed):
            storage_turn()
    assert not storage_turn()
    time.sleep(0.6)
    assert storage_turn()


def test_a_store_that_is_away_is_said_on_the_page_and_tried_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Store, after: str = "") -> None:
        raise StoreAway(5, "the store does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "blobs", away)
        assert storage_turn()
    scrub = Scrub.objects.get()
    assert "does not answer" in scrub.trouble
    assert scrub.trouble_at is not None
    assert next_turn()
    assert Scrub.objects.get().trouble == ""


def test_a_database_that_is_away_hurts_nobody(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> bool:
        raise OperationalError("the server closed the connection")

    monkeypatch.setattr(storage, "_turn_take", away)
    assert storage_turn() is False


def test_tending_never_holds_up_its_caller_and_never_raises(
    shelf: Shelf, settings: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that hangs for minutes must not keep a worker's parent from beating for its lease."""
    settings.STORAGE_TEND_SECONDS = 0.2  # type: ignore[attr-defined]
    monkeypatch.setattr(storage, "_TENDING", storage._Tending())
    hung, turns = threading.Event(), list[str]()

    def hang() -> bool:
        turns.append(threading.current_thread().name)
        hung.wait(30)
        raise RuntimeError("and then it breaks")

    monkeypatch.setattr(storage, "storage_turn", hang)
    started = time.monotonic()
    assert storage_tend()
    assert not storage_tend()
    time.sleep(0.3)
    assert not storage_tend(), "one turn at a time"
    assert time.monotonic() - started < 5
    hung.set()
    assert storage._TENDING.thread is not None
    storage._TENDING.thread.join(10)
    assert storage_tend()
    storage._TENDING.thread.join(10)
    assert turns == ["storage", "storage"]
    settings.STORAGE_TEND_SECONDS = 0  # type: ignore[attr-defined]
    assert not storage_tend()
