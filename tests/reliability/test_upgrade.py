"""Two releases at once: processes of the former one against the new tables, and the way back.

What the former release writes is written through its historical models, which hold exactly the columns and defaults
that its code had. The tests name no migration but the last one of that release, so they hold for those to come.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.apps import apps
from django.apps.registry import Apps
from django.core.management import call_command
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.utils import timezone

from compression_worker import contracts
from compression_worker.contracts import StepSpec
from dashboard.execution import Execution
from dashboard.lifecycle import JobState, Role
from dashboard.models import Artifact, Attempt, Environment, Job, Step, Worker
from dashboard.services.releases import deployment_create
from tests.dashboard.services.jobs_at_work import artifact_result, execution, ordered, step
from tests.dashboard.world import approved, certificate, environment, pair, person
from tests.factories import make_log, make_sample_set

pytestmark = pytest.mark.django_db(transaction=True)

FORMER = ("dashboard", "0002_serving_pointer")
CORE = ["User", "Checkpoint", "Job", "Step", "Attempt", "LogLine", "Artifact", "SampleSet", "Evaluation", "Policy",
        "Approval", "Environment", "Deployment", "RollbackCertificate", "ServerReport", "Worker"]  # fmt: skip


@pytest.fixture(scope="module")
def former() -> Apps:
    """The models as the former release had them."""
    return MigrationLoader(None).project_state(FORMER).apps


@pytest.fixture
def worker() -> Iterator[Execution]:
    present = execution()
    yield present
    present.close()


def populate() -> None:
    """At least one row in every core table, written by today's services and models."""
    job = ordered(step("done"))
    present = execution()
    try:
        present.run_all()
    finally:
        present.close()
    make_log(job)
    make_sample_set()
    approval = approved(Artifact.objects.get())
    certificate(approval.artifact.variant)
    place = environment()
    deployment_create(
        actor=person(Role.OPS), environment=place, artifact=approval.artifact, approval=approval, reason="smaller",
        seen_generation=0,
    )  # fmt: skip
    now = timezone.now()
    apps.get_model("dashboard", "ServerReport").objects.create(
        server="server-1", environment=place.name, started_at=now, reported_at=now
    )


def rows(columns: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
    """The former columns of every core row."""
    found = {}
    for name, fields in columns.items():
        table = apps.get_model("dashboard", name)._meta.db_table
        listed = ", ".join(f'"{field}"' for field in fields)
        with connection.cursor() as cursor:
            cursor.execute(f'SELECT {listed} FROM "{table}" ORDER BY id')
            found[name] = [dict(zip(fields, row, strict=True)) for row in cursor.fetchall()]
    return found


def test_every_migration_goes_back_and_forth_on_a_populated_database_and_keeps_its_rows(former: Apps) -> None:
    populate()
    columns = {name: [f.column for f in former.get_model("dashboard", name)._meta.local_fields] for name in CORE}
    before = rows(columns)
    assert all(before.values()), [name for name, found in before.items() if not found]
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM serving_pointer")
        shown = cursor.fetchall()
    try:
        call_command("migrate", "dashboard", "0001", verbosity=0)
        assert rows(columns) == before
    finally:
        call_command("migrate", verbosity=0)
    assert rows(columns) == before
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM serving_pointer")
        assert cursor.fetchall() == shown
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)
    # And the present code works on what went back and forth.
    job = ordered(step("done", name="after"))
    present = execution()
    try:
        present.run_all()
    finally:
        present.close()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED


def test_every_new_column_of_a_former_table_is_filled_without_its_writer_knowing_of_it(former: Apps) -> None:
    missing = []
    for model in former.get_app_config("dashboard").get_models():
        known = {field.column for field in model._meta.local_fields}
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT column_name, is_nullable, column_default, is_identity FROM information_schema.columns "
                "WHERE table_schema = current_schema() AND table_name = %s",
                [model._meta.db_table],
            )
            columns = cursor.fetchall()
        assert columns, f"table {model._meta.db_table} is gone: the former release still reads it"
        present = {name for name, *_ in columns}
        missing += [f"{model._meta.db_table}.{name} is gone" for name in known - present]
        missing += [
            f"{model._meta.db_table}.{name} has neither a database default nor null"
            for name, nullable, default, identity in columns
            if name not in known and nullable == "NO" and default is None and identity == "NO"
        ]
    assert missing == []


def test_a_worker_and_a_web_process_of_the_former_release_write_against_the_new_tables(former: Apps) -> None:
    models = {name: former.get_model("dashboard", name) for name in CORE}
    now = timezone.now()
    by = models["User"].objects.create(username="former", role="engineer", password="!")
    variant = pair()[1]
    job = models["Job"].objects.create(
        kind="compress", title="of the former release", spec={"config": {}}, created_by=by, method="bitdelta",
        variant_id=variant.pk, state="queued",
    )  # fmt: skip
    row = models["Step"].objects.create(job=job, index=0, name="plan", kind="scripted.plan", params={"act": "done"})
    models["Worker"].objects.create(name="former-1", queues="cpu", pid=1, started_at=now, seen_at=now)
    # A claim, a heartbeat and an end, as its code wrote them.
    models["Step"].objects.filter(pk=row.pk).update(
        state="running", attempt=1, owner="former-1", lease_until=now + timedelta(seconds=60), key="k", started_at=now
    )
    attempt = models["Attempt"].objects.create(step=row, number=1, worker="former-1", started_at=now)
    models["Job"].objects.filter(pk=job.pk).update(state="running", started_at=now)
    models["LogLine"].objects.create(job=job, step=row, at=now, text="computing")
    models["Step"].objects.filter(pk=row.pk, attempt=1).update(progress_done=1, progress_total=2, progress_at=now)
    models["Attempt"].objects.filter(pk=attempt.pk).update(outcome="done", finished_at=now)
    held = models["Step"].objects.get(pk=row.pk)
    held.state, held.output, held.lease_until, held.owner, held.finished_at = "done", "d" * 64, None, "", now
    held.save()
    ended = models["Job"].objects.get(pk=job.pk)
    ended.state, ended.finished_at = "succeeded", now
    ended.save()
    place = models["Environment"].objects.create(name="former", alias="former")
    pointed = models["Deployment"].objects.create(
        environment=place, generation=1, kind="full_precision", variant_id=variant.pk, digest=variant.digest, reason="x"
    )
    models["Environment"].objects.filter(pk=place.pk).update(generation=1, active=pointed)
    report = {"state": "serving", "generation": 1, "wanted": 1, "started_at": now, "reported_at": now}
    models["ServerReport"].objects.create(server="former", environment="former", digest=variant.digest, **report)
    # The present code reads all of it.
    seen = Job.objects.get(pk=job.pk)
    assert (seen.state, seen.steps.get().output) == (JobState.SUCCEEDED, "d" * 64)
    assert Attempt.objects.get(step=row.pk).outcome == "done"
    assert Worker.objects.get(name="former-1").queues == "cpu"
    assert Environment.objects.get(name="former").active.generation == 1


def former_job(former: Apps, *, title: str = "old web") -> Any:
    """A job as the web process of the former release writes it down."""
    by = former.get_model("dashboard", "User").objects.get_or_create(username="former", role="engineer", password="!")[
        0
    ]
    variant = pair()[1]
    steps = [step("done", data=artifact_result())]
    first = step("plan", steps=steps)
    job = former.get_model("dashboard", "Job").objects.create(
        kind="compress", title=title, spec={"config": {}, "first": first}, created_by=by, method="bitdelta",
        variant_id=variant.pk, state="queued", queue="cpu",
    )  # fmt: skip
    former.get_model("dashboard", "Step").objects.create(
        job=job, index=0, name=first["name"], group=first["group"], kind=first["kind"], params=first["params"],
        inputs=first["inputs"], seed=first["seed"], queue="cpu",
    )  # fmt: skip
    return job


def test_a_new_worker_runs_a_job_that_the_former_web_process_wrote(former: Apps, worker: Execution) -> None:
    job = former_job(former)
    worker.run_all()
    seen = Job.objects.get(pk=job.pk)
    assert (seen.state, seen.error) == (JobState.SUCCEEDED, "")
    assert Artifact.objects.get(job=seen).variant == pair()[1]


def test_a_worker_whose_code_makes_other_bytes_reuses_nothing_of_the_former(
    former: Apps, worker: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    former_job(former)
    worker.run_all()
    former_job(former, title="again")
    worker.run_all()
    assert [row.reused for row in Step.objects.filter(job__title="again").order_by("index")] == [True, True]
    spec = StepSpec(kind="bitdelta.plan")
    before = spec.key
    monkeypatch.setattr(contracts, "CODE_VERSION", contracts.CODE_VERSION + " and more")
    assert spec.key != before
    former_job(former, title="new code")
    worker.run_all()
    assert [row.reused for row in Step.objects.filter(job__title="new code").order_by("index")] == [False, False]
    assert Job.objects.get(title="new code").state == JobState.SUCCEEDED
