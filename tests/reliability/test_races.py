"""Eight people at once: approvals asked for, decided and revoked while the pointer is deployed, rolled back and moved.

Each of the eight keeps a connection of its own; a barrier lets every round start at one moment. What came out is noted,
and replayed against the rows afterwards. ``RACE_ROUNDS`` asks for more rounds, ``RACE_SEED`` for another order.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from django.apps import apps
from django.db import connection
from django.test import Client
from django.urls import reverse

from dashboard.lifecycle import ApprovalState, Conflict, DeploymentKind, DeploymentState, Refused, Role
from dashboard.models import Approval, Artifact, Deployment, Environment, Evaluation, User
from dashboard.services.releases import (
    approval_decide,
    approval_request,
    approval_revoke,
    deployment_create,
    deployment_full_precision,
    rollback,
)
from tests.dashboard.world import artifact, certificate, environment, evaluation, pair, person, policy

pytestmark = pytest.mark.django_db(transaction=True)

ROUNDS = int(os.environ.get("RACE_ROUNDS", "500"))
SEED = int(os.environ.get("RACE_SEED", "7"))
ACTORS = 8
PATIENCE_SECONDS = 60

Call = Callable[[], object]


class Crowd:
    """Threads that start each round together and keep their connections from one round to the next."""

    def __init__(self, size: int) -> None:
        self._calls: list[Call] = []
        self._results: list[object] = [None] * size
        self._start, self._end = threading.Barrier(size + 1), threading.Barrier(size + 1)
        self._threads = [threading.Thread(target=self._work, args=(at,), daemon=True) for at in range(size)]
        for thread in self._threads:
            thread.start()

    def run(self, calls: list[Call]) -> list[object]:
        """What each of ``calls`` returned or raised."""
        self._calls = calls
        self._start.wait(PATIENCE_SECONDS)
        self._end.wait(PATIENCE_SECONDS)
        return list(self._results)

    def dismiss(self) -> None:
        self._start.abort()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def _work(self, at: int) -> None:
        try:
            while True:
                self._start.wait()
                try:
                    self._results[at] = self._calls[at]()
                except Exception as error:  # whatever came out is looked at
                    self._results[at] = error
                self._end.wait(PATIENCE_SECONDS)
        except threading.BrokenBarrierError:
            connection.close()


@contextmanager
def crowd() -> Iterator[Crowd]:
    present = Crowd(ACTORS)
    try:
        yield present
    finally:
        present.dismiss()


@dataclass
class World:
    """Two artifacts with their evidence, the people, and what was noted of every round."""

    artifacts: list[tuple[Artifact, Evaluation]]
    people: dict[str, User]
    dice: random.Random
    asked: int = 0
    decided: Counter[int] = field(default_factory=Counter)
    deployed: list[Deployment] = field(default_factory=list)
    refused: int = 0
    conflicts: int = 0


@pytest.fixture
def world() -> World:
    policy()
    people = {role: person(role) for role in (Role.ENGINEER, Role.MANAGER, Role.OPS)}
    people |= {name: person(Role.MANAGER, name) for name in ("second manager", "submitter")}
    people |= {name: person(Role.OPS, name) for name in ("second ops",)}
    # The submitter has become a manager since: approving their own job stays refused.
    made = [artifact(name, by=people["submitter"]) for name in ("one", "two")]
    certificate(made[0].variant)
    environment()
    return World([(each, evaluation(each)) for each in made], people, random.Random(SEED))


def pending(world: World, of: Artifact, evidence: Evaluation) -> Approval:
    found = Approval.objects.filter(artifact=of, state=ApprovalState.PENDING).first()
    if found is None:
        found = approval_request(actor=world.people[Role.ENGINEER], artifact=of, evaluation=evidence)
        world.asked += 1
    return found


def round_of(world: World) -> list[Call]:
    """What eight people do at once, all of them having looked at the same page."""
    who, dice = world.people, world.dice
    of, evidence = dice.choice(world.artifacts)
    asked = pending(world, of, evidence)
    live = Approval.objects.filter(artifact=of, state=ApprovalState.APPROVED).order_by("-pk").first()
    used = dice.choice([live or asked, asked])
    place = environment()
    seen = place.generation

    def decide(name: str, approve: bool) -> Call:
        return lambda: approval_decide(actor=who[name], approval=asked, approve=approve, reason="read it")

    def deploy(name: str) -> Call:
        return lambda: deployment_create(
            actor=who[name], environment=place, artifact=of, approval=used, reason="smaller", seen_generation=seen
        )

    calls = [
        decide(Role.MANAGER, True),
        decide("second manager", dice.random() < 0.8),
        decide("submitter", True),
        lambda: approval_revoke(actor=who["second manager"], approval=used, reason="complaints"),
        deploy(Role.OPS),
        deploy("second ops"),
        lambda: rollback(actor=who[Role.OPS], environment=place, reason="complaints", seen_generation=seen),
        lambda: deployment_full_precision(
            actor=who["second ops"], environment=place, variant=pair()[1], reason="calm", seen_generation=seen
        ),
    ]
    # Not all every time: a rollback that always takes part would win most rounds, and revoke most approvals.
    for at, share in ((3, 0.4), (6, 0.5), (7, 0.3)):
        if dice.random() > share:
            calls[at] = deploy(dice.choice([Role.OPS, "second ops"]))
    dice.shuffle(calls)
    return calls


def note(world: World, results: list[object]) -> None:
    """Keep what was accepted; anything but an accepted change or a refusal ends the test."""
    for result in results:
        match result:
            case Deployment():
                world.deployed.append(result)
            case Approval():
                world.decided[result.pk] += 1
            case Conflict():
                world.conflicts += 1
            case Refused():
                world.refused += 1
            case _:
                raise AssertionError(f"neither accepted nor refused: {result!r}")


def test_eight_at_once_leave_no_wrong_approval_one_order_and_one_event_for_each_change(world: World) -> None:
    with crowd() as people:
        for _ in range(ROUNDS):
            before = len(world.deployed)
            note(world, people.run(round_of(world)))
            assert len(world.deployed) <= before + 1, "two changes were accepted from one generation"
    check_order(world)
    check_events(world)
    check_approvals(world)
    # The race was one: both sides of every rule were met.
    compressed = sum(each.kind == DeploymentKind.COMPRESSED for each in world.deployed)
    assert min(compressed, len(world.deployed) - compressed, len(world.decided), world.conflicts) > ROUNDS // 50
    print(f"\n{ROUNDS} rounds: {len(world.deployed)} deployed ({compressed} compressed), {sum(world.decided.values())} "
          f"decided, {world.conflicts} conflicts, {world.refused} refused")  # fmt: skip


def check_order(world: World) -> None:
    """Generations 1 to n without a gap, each made by one accepted call, each replacing the one before."""
    place = environment()
    rows = list(Deployment.objects.filter(environment=place).order_by("generation"))
    assert [row.generation for row in rows] == list(range(1, place.generation + 1))
    assert sorted(row.pk for row in rows) == sorted(made.pk for made in world.deployed)
    assert [row.replaces_id for row in rows] == [None, *(row.pk for row in rows[:-1])]
    assert place.active == rows[-1]
    ended = {DeploymentState.SUPERSEDED, DeploymentState.ROLLED_BACK}
    assert {row.state for row in rows[:-1]} <= ended
    assert rows[-1].state == DeploymentState.REQUESTED


def events(kind: str, key: int) -> list[tuple[str, str, dict[str, object]]]:
    """(label, state, context) of each event of a row, in the order in which they were written."""
    rows = apps.get_model("dashboard", kind).objects.filter(pgh_obj_id=key).order_by("pgh_id")
    return list(rows.values_list("pgh_label", "state", "pgh_context__metadata"))


def check_events(world: World) -> None:
    """One inserted and one ended event for each deployment, one event for each request and each decision."""
    last = environment().active_id
    for made in world.deployed:
        labels = [label for label, _, _ in events("DeploymentEvent", made.pk)]
        assert labels == (["insert"] if made.pk == last else ["insert", "update"])
    rows = Approval.objects.all()
    assert rows.count() == world.asked
    for row in rows:
        written = events("ApprovalEvent", row.pk)
        assert [label for label, _, _ in written] == ["insert"] + ["update"] * world.decided[row.pk]
        assert all(context["user"] and context["reason"] for _, _, context in written)


def check_approvals(world: World) -> None:
    """Who decided is neither who asked nor who submitted; what was deployed was approved then, by its digests."""
    for row in Approval.objects.select_related("artifact__job"):
        assert row.decided_by_id not in (row.requested_by_id, row.submitted_by_id)
        assert row.submitted_by_id == row.artifact.job.created_by_id
    for made in world.deployed:
        if made.kind == DeploymentKind.COMPRESSED:
            _check_compressed(made)


def _check_compressed(made: Deployment) -> None:
    approval = Approval.objects.select_related("artifact", "evaluation", "policy").get(pk=made.approval_id)
    assert approval.artifact_id == made.artifact_id
    assert approval.artifact_digest == made.digest == approval.artifact.digest
    assert approval.evaluation_digest == approval.evaluation.digest
    states = [state for _, state, _ in events("ApprovalEvent", approval.pk)]
    assert ApprovalState.APPROVED in states, f"generation {made.generation} was never approved: {states}"
    if approval.state == ApprovalState.REVOKED:
        # Both clocks were read under the lock of the approval's row: their order is that of the locks.
        assert approval.decided_at is not None
        assert made.created_at < approval.decided_at, f"generation {made.generation} came after the revocation"
    else:
        assert approval.state == ApprovalState.APPROVED


def test_over_http_every_loser_gets_a_page_that_says_so_and_never_a_server_error(world: World) -> None:
    place, targets = environment(), pair()
    url = reverse("deployment-full-precision", args=[place.name])
    clients = [Client(raise_request_exception=False) for _ in range(ACTORS)]
    for client in clients:
        client.force_login(world.people[Role.OPS])

    def post(client: Client, seen: int) -> Call:
        fields = {"variant": targets[seen % 2].pk, "reason": "race", "seen_generation": seen}
        return lambda: client.post(url, fields).status_code

    with crowd() as people:
        for seen in range(20):
            codes = Counter(people.run([post(client, seen) for client in clients]))
            assert codes == Counter({302: 1, 409: ACTORS - 1})
    assert Environment.objects.get(pk=place.pk).generation == 20
