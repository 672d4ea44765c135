"""The scrubber finds every damage within one cycle, says whose it is, and takes it back when the bytes are whole."""

from __future__ import annotations

import os
import random
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from compression_worker.store import Store
from dashboard.lifecycle import ArtifactState, DamageKind
from dashboard.models import Artifact, Damage, Scrub
from dashboard.selectors.storage import damages_of_artifact, damages_of_checkpoint
from dashboard.services import storage_scrub
from dashboard.services.storage_scrub import scrub_turn
from dashboard.services.storage_sweep import sweep_survey
from tests.dashboard.shelf import Shelf

pytestmark = pytest.mark.django_db

START = timezone.now()
TURN = timedelta(minutes=15)
CYCLE = timedelta(hours=24)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    storage_scrub._FILES.clear()
    return Shelf(Store(tmp_path / "store"))


def run(shelf: Shelf, since: datetime, span: timedelta = CYCLE, turn: timedelta = TURN) -> datetime:
    """Turns as a worker takes them, in simulated time; the time after them."""
    now = since
    while now <= since + span:
        scrub_turn(store=shelf.store, now=now, seconds=20)
        now += turn
    return now


def fill(shelf: Shelf, blobs: int) -> list[str]:
    chance = random.Random(blobs)
    return sorted(shelf.store.write_bytes(chance.randbytes(chance.randrange(1, 3000))) for _ in range(blobs))


@pytest.mark.parametrize("seed", range(5))
def test_random_damage_is_found_within_one_cycle(shelf: Shelf, seed: int) -> None:
    """Injected at a random moment of a cycle: every blob comes up again within the time of one, give or take a turn."""
    chance, digests = random.Random(seed), fill(shelf, 200)
    sweep_survey(store=shelf.store)
    now = run(shelf, START, timedelta(hours=24 * chance.random()))
    assert not Damage.objects.exists()
    victims = sorted(chance.sample(digests, 20))
    for digest in victims:
        damage(shelf, digest, chance)
    run(shelf, now, CYCLE + 2 * TURN)
    assert sorted(Damage.objects.values_list("digest", flat=True)) == victims


def damage(shelf: Shelf, digest: str, chance: random.Random) -> None:
    path = shelf.store.path(digest)
    data = bytearray(path.read_bytes())
    match chance.choice(["flip", "cut", "append"]):
        case "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "cut":
            del data[chance.randrange(len(data)) :]
        case "append":
            data += b"\0"
    path.unlink()
    path.write_bytes(data)


def test_damage_before_a_cycle_begins_is_found_by_that_cycle_and_all_in_its_time(shelf: Shelf) -> None:
    digests = fill(shelf, 300)
    sweep_survey(store=shelf.store)
    chance = random.Random(1)
    victims = sorted(chance.sample(digests, 100))
    for digest in victims:
        damage(shelf, digest, chance)
    run(shelf, START)
    assert sorted(Damage.objects.values_list("digest", flat=True)) == victims
    scrub = Scrub.objects.get()
    assert scrub.last_blobs == 300
    assert scrub.last_finished_at is not None
    assert scrub.last_finished_at <= START + CYCLE


def test_the_work_is_spread_over_the_cycle(shelf: Shelf) -> None:
    fill(shelf, 300)
    sweep_survey(store=shelf.store)
    turns, now = [], START
    while now <= START + CYCLE:
        turns.append(scrub_turn(store=shelf.store, now=now, seconds=20))
        now += TURN
    assert sum(turns) == 300
    assert max(turns) <= 15
    assert scrub_turn(store=shelf.store, now=START + timedelta(hours=23, minutes=59), seconds=20) == 0


def test_a_worker_that_was_away_catches_up_within_its_bounds(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(shelf, 100)
    sweep_survey(store=shelf.store)
    scrub_turn(store=shelf.store, now=START, seconds=20)
    monkeypatch.setattr(storage_scrub, "SLICE_BYTES", 10_000)
    done = scrub_turn(store=shelf.store, now=START + timedelta(hours=20), seconds=20)
    assert 0 < done < 20
    assert Scrub.objects.get().bytes < 10_000 + 3000


def test_the_cursor_survives_and_nothing_is_hashed_twice_in_a_cycle(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = fill(shelf, 60)
    sweep_survey(store=shelf.store)
    hashed: list[str] = []
    verify = Store.verify
    monkeypatch.setattr(Store, "verify", lambda self, digest: (hashed.append(digest), verify(self, digest))[1])
    now = START
    while now < START + CYCLE:
        # A new process each time knows nothing but the row.
        scrub_turn(store=Store(shelf.store.root), now=now, seconds=20)
        now += timedelta(hours=1)
    assert hashed == digests


def test_a_late_turn_of_another_cycle_moves_no_cursor(shelf: Shelf) -> None:
    fill(shelf, 10)
    sweep_survey(store=shelf.store)
    scrub_turn(store=shelf.store, now=START, seconds=20)
    state = storage_scrub.scrub_state()
    found_at = {"cursor": state.cursor, "started_at": state.started_at}
    Scrub.objects.update(cursor="5" * 64, started_at=START + CYCLE)
    storage_scrub._advance(state, storage_scrub.Slice("f" * 64, 1, 1), START, found_at)
    assert Scrub.objects.get().cursor == "5" * 64


def artifact_of(shelf: Shelf) -> Artifact:
    return shelf.artifact(shelf.checkpoint("variant", shelf.checkpoint("base")))


def test_an_artifact_with_a_damaged_file_may_not_be_used_until_it_is_whole_again(shelf: Shelf) -> None:
    artifact = artifact_of(shelf)
    victim = sorted(shelf.files(artifact) - {artifact.digest})[0]
    whole = shelf.store.read_bytes(victim)
    shelf.damage(victim)
    now = run(shelf, START)
    artifact.refresh_from_db()
    assert artifact.state == ArtifactState.CORRUPT
    found = Damage.objects.get()
    assert (found.digest, found.kind) == (victim, DamageKind.DAMAGED)
    assert [(one["kind"], one["name"]) for one in found.concerns] == [("artifact", "small")]
    assert damages_of_artifact(artifact) == [found]
    shelf.store.write_bytes(whole)  # as the job that made it does, run again
    scrub_turn(store=shelf.store, now=now, seconds=20)
    found.refresh_from_db()
    artifact.refresh_from_db()
    assert found.mended_at == now
    assert artifact.state == ArtifactState.PUBLISHED
    assert damages_of_artifact(artifact) == []


def test_a_damaged_manifest_is_found_too(shelf: Shelf) -> None:
    artifact = artifact_of(shelf)
    shelf.damage(artifact.digest)
    run(shelf, START)
    artifact.refresh_from_db()
    assert artifact.state == ArtifactState.CORRUPT


def test_one_of_two_damages_mended_is_not_enough(shelf: Shelf) -> None:
    artifact = artifact_of(shelf)
    one, other = sorted(shelf.files(artifact) - {artifact.digest})
    whole = {digest: shelf.store.read_bytes(digest) for digest in (one, other)}
    shelf.damage(one)
    shelf.store.path(other).unlink()
    now = run(shelf, START)
    assert dict(Damage.objects.values_list("digest", "kind")) == {one: "damaged", other: "missing"}
    shelf.store.write_bytes(whole[one])
    scrub_turn(store=shelf.store, now=now, seconds=20)
    artifact.refresh_from_db()
    assert artifact.state == ArtifactState.CORRUPT
    shelf.store.write_bytes(whole[other])
    scrub_turn(store=shelf.store, now=now + timedelta(minutes=11), seconds=20)
    artifact.refresh_from_db()
    assert artifact.state == ArtifactState.PUBLISHED


def test_a_withdrawn_artifact_does_not_come_back_by_being_mended(shelf: Shelf) -> None:
    artifact = artifact_of(shelf)
    victim = sorted(shelf.files(artifact))[0]
    whole = shelf.store.read_bytes(victim)
    Artifact.objects.update(state=ArtifactState.RETIRED)
    shelf.damage(victim)
    now = run(shelf, START)
    shelf.store.write_bytes(whole)
    scrub_turn(store=shelf.store, now=now, seconds=20)
    artifact.refresh_from_db()
    assert artifact.state == ArtifactState.RETIRED


@pytest.mark.parametrize("place", ["first", "last"])
def test_what_is_missing_is_found_though_no_listing_shows_it(shelf: Shelf, place: str) -> None:
    artifact = artifact_of(shelf)
    files = sorted(shelf.files(artifact.base))
    victim = files[0] if place == "first" else files[-1]
    shelf.store.path(victim).unlink()
    run(shelf, START)
    found = Damage.objects.get()
    assert (found.digest, found.kind) == (victim, DamageKind.MISSING)
    assert damages_of_checkpoint(artifact.base) == [found]
    assert damages_of_checkpoint(artifact.variant) == []
    assert damages_of_artifact(artifact) == [found], "it cannot answer without its base"
    artifact.refresh_from_db()
    assert artifact.state == ArtifactState.PUBLISHED, "its own bytes are whole"


def test_a_damage_that_nobody_needs_any_more_is_closed_when_it_is_gone(shelf: Shelf) -> None:
    leftover = shelf.blob()
    shelf.damage(leftover)
    now = run(shelf, START)
    assert Damage.objects.get().concerns == []
    os.unlink(shelf.store.path(leftover))
    scrub_turn(store=shelf.store, now=now, seconds=20)
    assert Damage.objects.get().mended_at == now


def test_damage_is_looked_at_again_now_and_then_not_each_turn(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = shelf.blob()
    shelf.damage(victim)
    now = run(shelf, START, timedelta(hours=1))
    looks: list[str] = []
    verify = Store.verify
    monkeypatch.setattr(Store, "verify", lambda self, digest: (looks.append(digest), verify(self, digest))[1])
    run(shelf, now, timedelta(minutes=60), timedelta(minutes=1))
    assert 4 <= len(looks) <= 8, "of sixty turns"
    assert Damage.objects.count() == 1
