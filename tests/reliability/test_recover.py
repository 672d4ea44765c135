"""The database is set back to an older dump, for real, while a server follows it and the store keeps every byte.

A run of events is dumped after each of them with ``pg_dump``. Then a dump is restored into a fresh database, as an
operator would, and ``manage.py recover`` has to bring rows, store, workers and servers together again.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import psycopg
import pytest
import torch
from django.apps import apps
from django.core.management import call_command
from django.core.serializers.json import DjangoJSONEncoder
from django.db import ProgrammingError, connection
from django.test import Client
from psycopg import sql
from pytest_django.fixtures import Settings

from compression_worker.contracts import canonical_json
from compression_worker.launcher import Outcome, _outcome
from compression_worker.runner import Runner
from compression_worker.serving.follower import Follower, Identity
from compression_worker.serving.switch import Switch
from compression_worker.serving.variants import Resident, Variants
from compression_worker.store import Store
from dashboard.lifecycle import JobState, Refused, Role, StepState
from dashboard.models import (
    Approval,
    Artifact,
    Checkpoint,
    Deployment,
    Environment,
    Job,
    Recovery,
    ServerReport,
    Step,
    Sweep,
)
from dashboard.selectors.recovery import restored
from dashboard.services.jobs import compression_create, job_retry
from dashboard.services.registry import checkpoint_import
from dashboard.services.releases import deployment_create, deployment_full_precision, rollback
from dashboard.services.steps import step_claim, step_finish
from dashboard.services.storage_sweep import sweep_request
from deploy.postgres import OWNER, EmbeddedPostgres, binaries
from tests.dashboard.world import approved, certificate, environment, person
from tests.tiny import fine_tuned, make_tiny_pair, tiny_config, tiny_state, write_checkpoint

pytestmark = pytest.mark.django_db(transaction=True)

SEED = int(os.environ.get("RECOVER_SEED", "3"))
UNCOMPARED = {"ServerReport"}  # servers go on reporting while rows are compared


class Loads:
    """Brings a digest into memory at once: what it would load is not looked at here."""

    def full_precision(self, digest: str, abandoned: Callable[[], bool]) -> Resident:
        return Resident(digest, torch.nn.Linear(1, 1), None, 1)

    def compressed(self, artifact: str, base: str, abandoned: Callable[[], bool]) -> Resident:
        return self.full_precision(artifact, abandoned)


@dataclass
class Run:
    """One installation: a store, a worker in this process, and a real follower with its own connection."""

    store: Store
    postgres: EmbeddedPostgres
    folder: Path
    follower: Follower | None = None
    variants: Variants = field(default_factory=Variants)
    dumps: list[Path] = field(default_factory=list)
    answered: list[tuple[int, int]] = field(default_factory=list)

    def work(self, limit: int = 1_000) -> int:
        """Claim, compute and finish up to ``limit`` steps, as a worker does."""
        runner = Runner(store=self.store, import_roots={"models": self.folder / "models"}, device="cpu")
        for count in range(limit):
            claim = step_claim(worker="worker-1", queues=["cpu"])
            if claim is None:
                return count
            answer = runner.answer(claim.spec, claim.cached, lambda event: None)
            outcome = _outcome(json.dumps(answer).encode(), lambda event: None)
            assert isinstance(outcome, Outcome)
            step_finish(claim=claim, outcome=outcome)
        return limit

    def dump(self) -> None:
        target = self.folder / f"dump-{len(self.dumps)}.sql"
        self._run("pg_dump", "--file", str(target))
        self.dumps.append(target)

    def restore(self, dump: Path) -> None:
        """A fresh database in the place of the present one, filled from ``dump``."""
        name = connection.settings_dict["NAME"]
        connection.close()
        with psycopg.connect(self.postgres.url(), autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
            admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(OWNER)))
        self._run("psql", "--quiet", "--set", "ON_ERROR_STOP=1", "--file", str(dump))

    def _run(self, program: str, *flags: str) -> None:
        address = self.postgres.url(database=str(connection.settings_dict["NAME"]))
        command = [str(binaries() / program), *flags, "--dbname", address]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def blobs(self) -> set[str]:
        return {path.name for path in (self.store.root / "sha256").glob("??/*")}

    def answers(self) -> tuple[int, int]:
        handle = self.variants.active("production")
        self.answered.append(handle.place if handle else (0, 0))
        return self.answered[-1]


def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path, settings: Settings, postgres: EmbeddedPostgres | None) -> Iterator[Run]:
    if postgres is None:
        pytest.skip("restores a database of the embedded Postgres only")
    settings.ARTIFACT_ROOT = str(tmp_path / "store")
    settings.LEASE_SECONDS = 1
    make_tiny_pair(tmp_path / "models")
    generator = torch.Generator().manual_seed(9)
    state = fine_tuned(tiny_state(torch.Generator().manual_seed(0), tied=True, vocab=288), generator)
    other = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    write_checkpoint(tmp_path / "models" / "other", other, tiny_config())
    settings.IMPORT_ROOTS = {"models": str(tmp_path / "models")}
    present = Run(Store(tmp_path / "store"), postgres, tmp_path)
    yield present
    if present.follower:
        present.follower.stop()


def follow(run: Run) -> None:
    """Start a server's follower on the present database."""
    database = connection.settings_dict
    address = f"{database['HOST']}:{database['PORT']}/{database['NAME']}"
    run.follower = Follower(
        dsn=f"postgres://{database['USER']}:{database['PASSWORD']}@{address}",
        identity=Identity(server="server-1", address=""),
        environments=["production"],
        variants=run.variants,
        make_switch=lambda name, changed: Switch(name, run.variants, Loads(), changed),
    )
    run.follower.start()


def imported(run: Run, name: str, base: Checkpoint | None = None) -> None:
    checkpoint_import(actor=person(Role.ENGINEER), root="models", folder=name, name=name, base=base)


def compressed(seed: int, priority: int = 0) -> Job:
    variant = Checkpoint.objects.get(name="variant")
    return compression_create(
        actor=person(Role.ENGINEER), method="bitdelta", variant=variant, config={"distill_steps": 0}, seed=seed,
        priority=priority,
    )  # fmt: skip


def deploy(artifact: Artifact) -> Deployment:
    place = environment()
    return deployment_create(
        actor=person(Role.OPS), environment=place, artifact=artifact, approval=approved(artifact), reason="smaller",
        seen_generation=place.generation,
    )  # fmt: skip


def set_up(run: Run) -> None:
    """A base, its variant, production on full precision and a server that follows."""
    call_command("recover", "--yes", stdout=StringIO())
    imported(run, "base")
    run.work()
    imported(run, "variant", Checkpoint.objects.get(name="base"))
    run.work()
    place = environment()
    deployment_full_precision(
        actor=person(Role.OPS), environment=place, variant=Checkpoint.objects.get(name="variant"), reason="first",
        seen_generation=0,
    )  # fmt: skip
    follow(run)
    until(lambda: run.answers() == (1, 1), "the server answers from generation 1")


def events(run: Run) -> list[Callable[[], object]]:
    """What happens one after the other; a dump is made after each."""

    def half_of_a_job() -> None:
        compressed(seed=1)
        run.work(2)

    def a_lost_worker() -> None:
        assert step_claim(worker="lost", queues=["cpu"]) is not None

    def the_job_is_done() -> None:
        time.sleep(1.1)
        run.work()
        assert Artifact.objects.count() == 1

    def another_job() -> None:
        compressed(seed=2)
        run.work()

    def another_variant() -> None:
        imported(run, "other", Checkpoint.objects.get(name="base"))
        run.work()

    def deployed() -> None:
        deploy(Artifact.objects.order_by("pk")[0])

    def rolled_back() -> None:
        place = environment()
        rollback(actor=person(Role.OPS), environment=place, reason="worse", seen_generation=place.generation)

    return [half_of_a_job, a_lost_worker, the_job_is_done, another_job, another_variant, deployed, rolled_back]


def rows() -> dict[str, str]:
    """Every row of every table as text."""
    encoder = DjangoJSONEncoder()
    models = apps.get_app_config("dashboard").get_models()
    return {
        model.__name__: encoder.encode(list(model._default_manager.order_by("pk").values()))
        for model in models
        if model.__name__ not in UNCOMPARED
    }


def recover(*flags: str) -> str:
    out = StringIO()
    call_command("recover", *flags, stdout=out)
    return out.getvalue()


def published() -> set[str]:
    return {
        *Artifact.objects.values_list("digest", flat=True),
        *Checkpoint.objects.values_list("digest", flat=True),
    }


def live_out(run: Run) -> int:
    """All events with a dump after each; the last generation that the server saw."""
    set_up(run)
    for event in events(run):
        event()
        run.dump()
    last = environment().generation
    until(lambda: run.answers()[1] == last, "the server answers from the last generation")
    return last


def check_after(run: Run, before: set[str], blobs: set[str], used: set[int]) -> str:
    """Recover three times; rows, store, workers and server are together again and nothing is lost."""
    assert restored()
    with pytest.raises(Refused, match="was restored"):
        sweep_request(actor=person(Role.ADMIN), sweep=Sweep(), reason="what has no row yet would go")
    untouched = rows()
    shown = recover()
    assert rows() == untouched, "without --yes nothing changes"
    assert "Nothing was changed" in shown
    approvals = set(Approval.objects.values_list("pk", "state"))
    deployments = Deployment.objects.count()
    first = recover("--yes")
    once = rows()
    for _ in range(2):
        recover("--yes")
        assert rows() == once, "three times is as once"
    assert not restored()
    assert set(Approval.objects.values_list("pk", "state")) == approvals, "nothing is approved by a recovery"
    assert Deployment.objects.count() == deployments, "nothing is deployed by a recovery"
    until(lambda: run.answers()[1] == environment().generation, "the server follows the raised epoch")
    run.work()
    recover("--yes")
    assert blobs <= run.blobs(), "files were lost"
    assert before <= published(), first
    for digest in sorted(blobs):
        run.store.verify(digest)
    assert not Job.objects.exclude(state__in=[JobState.SUCCEEDED]).exists()
    assert compressed(seed=3).pk not in used, "an id of the time that is gone is given out again"
    run.work()
    assert run.answered == sorted(run.answered), "the server went back"
    return first


def jobs() -> set[int]:
    return set(Job.objects.values_list("pk", flat=True))


def test_a_restored_dump_is_recovered_and_no_server_goes_back_before_that(run: Run) -> None:
    last = live_out(run)
    before, blobs, used = published(), run.blobs(), jobs()
    digests = dict(Artifact.objects.values_list("job__spec__seed", "digest"))
    run.restore(run.dumps[1])  # a job under way, a step that its worker took with it
    until(lambda: ServerReport.objects.filter(state="rewound").exists(), "the server says that it was set back")
    assert run.answers() == (1, last)
    first = check_after(run, before, blobs, used)
    assert "was restored" in first
    assert "it goes back into the queue" in first
    assert ": servers then answer from generation 1" in first
    assert "is still to be done and makes it again" in first
    assert dict(Artifact.objects.values_list("job__spec__seed", "digest")).items() >= digests.items()
    taken = Step.objects.get(attempts__worker="lost")
    assert (taken.state, taken.causes, taken.attempt > 1_000) == (StepState.DONE, {}, True)
    adopted = Artifact.objects.get(digest=digests[2])
    assert adopted.name.endswith("-adopted")
    assert (adopted.job.created_by.username, adopted.job.created_by.is_active) == ("recovery", False)
    other = Checkpoint.objects.get(name__startswith="adopted-")
    assert other.base == Checkpoint.objects.get(name="base")
    with pytest.raises(Refused):
        deploy_without_approval(adopted)
    for page in (
        f"/jobs/{adopted.job.pk}/",
        f"/registry/artifacts/{adopted.pk}/",
        f"/registry/checkpoints/{other.name}/",
    ):
        assert looked_at(page) == 200, page
    retried = job_retry(actor=person(Role.ENGINEER), job=adopted.job)
    run.work()
    retried.refresh_from_db()
    assert retried.artifact.digest == adopted.digest


def looked_at(page: str) -> int:
    client = Client()
    client.force_login(person(Role.ENGINEER))
    return client.get(page).status_code


def deploy_without_approval(adopted: Artifact) -> None:
    certificate(adopted.variant)
    other = approved(Artifact.objects.exclude(pk=adopted.pk)[0])
    deployment_create(
        actor=person(Role.OPS), environment=environment(), artifact=adopted, approval=other, reason="quickly",
        seen_generation=environment().generation,
    )  # fmt: skip


@pytest.mark.slow
def test_every_cut_point_is_recovered(run: Run) -> None:
    live_out(run)
    before, blobs = published(), run.blobs()
    dice = random.Random(SEED)
    cuts = [dice.choice(run.dumps) for _ in range(int(os.environ.get("RECOVER_CUTS", "50")))]
    used = jobs()
    for cut in cuts:
        run.restore(cut)
        time.sleep(1.1)  # leases of the dump have run out by then
        check_after(run, before, blobs, used)
        used |= jobs()


def orphaned(run: Run) -> Artifact:
    """A published artifact whose row, job and steps are gone, as after a restore; the row as it was."""
    set_up(run)
    compressed(seed=1)
    run.work()
    made = Artifact.objects.select_related("job").get()
    kept = Artifact.objects.get(pk=made.pk)
    made.delete()
    made.job.delete()
    return kept


def test_without_a_restore_a_recovery_touches_neither_epochs_nor_numbers(run: Run) -> None:
    set_up(run)
    before = rows()
    said = recover("--yes")
    assert "Nothing says that the database was set back" in said
    assert rows() == before
    assert Recovery.objects.count() == 1


def test_a_damaged_artifact_is_not_adopted_and_named_with_its_file(run: Run) -> None:
    lost = orphaned(run)
    manifest = json.loads(run.store.read_bytes(lost.digest))
    blob = run.store.path(manifest["files"]["codes-00001.safetensors"]["sha256"])
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1])
    said = recover("--yes")
    assert f"artifact {lost.digest[:12]} has no row: not adopted: 'codes-00001.safetensors'" in said
    assert not Artifact.objects.exists()


def test_a_checkpoint_of_unknown_role_and_what_stands_on_it_are_named(run: Run) -> None:
    """Outputs of the release before name no base; only an artifact's manifest tells."""
    set_up(run)
    Recovery.objects.all().delete()
    imported(run, "other")
    run.work()
    other = Checkpoint.objects.select_related("job").get(name="other")
    output = other.job.steps.get().output
    document = json.loads(run.store.read_bytes(output))
    del document["data"]["base"]
    run.store.remove([output])
    run.store.write_bytes(canonical_json(document))
    other.delete()
    other.job.delete()
    said = recover("--yes")
    assert f"checkpoint {other.digest[:12]} has no row: not adopted: nothing says whether it is a base" in said


def test_an_adopted_row_says_the_same_as_the_one_that_was_lost(run: Run) -> None:
    lost = orphaned(run)
    recover("--yes")
    found = Artifact.objects.get()
    ignored = {"id", "name", "job_id", "created_at", "_state"}
    assert {key: value for key, value in vars(found).items() if key not in ignored} == {
        key: value for key, value in vars(lost).items() if key not in ignored
    }
    assert found.name == f"{lost.name}-adopted"


def test_an_epoch_can_be_asked_for_and_is_raised_once(run: Run) -> None:
    set_up(run)
    recover("--yes", "--epoch", "4")
    assert Environment.objects.get().epoch == 4
    once = rows()
    recover("--yes", "--epoch", "4")
    assert rows() == once
    until(lambda: run.answers() == (4, 1), "the server follows")


def test_an_epoch_cannot_be_lowered(run: Run) -> None:
    set_up(run)
    recover("--yes", "--epoch", "4")
    with pytest.raises(ProgrammingError, match="only grows"):
        Environment.objects.update(epoch=3)
