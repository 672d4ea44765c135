"""The demo comes by itself, once, from whatever state its rows are in; and goes with everything that stands on it."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from django.apps import apps
from django.core.management import CommandError, call_command
from pytest_django.fixtures import Settings

from compression_worker.store import Store
from dashboard.lifecycle import JobKind, JobState, Refused, Role
from dashboard.models import (
    Approval,
    Artifact,
    Checkpoint,
    Deployment,
    Environment,
    Evaluation,
    Job,
    SampleSet,
    User,
)
from dashboard.services import demo, evaluations, registry, releases
from dashboard.services.demo_removal import demo_remove
from tests.dashboard import world

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _roots(settings: Settings, tmp_path: Path) -> None:
    settings.IMPORT_ROOTS = {"demo": str(demo.SETS.parent), "imports": str(tmp_path)}
    settings.ARTIFACT_ROOT = str(tmp_path / "store")
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


def ended(job: Job) -> Job:
    Job.objects.filter(pk=job.pk).update(state=JobState.SUCCEEDED, finished_at="2026-01-01T00:00Z")
    job.refresh_from_db()
    return job


def imported(name: str, base: Checkpoint | None = None) -> Checkpoint:
    """The checkpoint that the demo's import of ``name`` would publish."""
    job = ended(Job.objects.get(kind=JobKind.IMPORT, spec__name=name))
    return world.checkpoint(name, base, job=job, is_demo=True)


def compressed() -> Artifact:
    """The artifact that the demo's short job would publish."""
    job = ended(Job.objects.get(kind=JobKind.COMPRESS))
    variant = Checkpoint.objects.get(name=demo.VARIANT)
    assert variant.base is not None
    return Artifact.objects.create(
        name="demo",
        variant=variant,
        base=variant.base,
        job=job,
        digest=world.digest("the demo's artifact"),
        method="bitdelta",
        config=job.spec["config"],
        source_bytes=1_000,
        artifact_bytes=100,
        nominal_ratio=16.0,
        bits_per_weight=1.0,
        ledger=[{"name": "codes", "bytes": 100}],
        is_demo=True,
    )


def evaluated(artifact: Artifact) -> Evaluation:
    job = ended(Job.objects.get(kind=JobKind.EVALUATE))
    return Evaluation.objects.create(
        variant=artifact.variant,
        artifact=artifact,
        job=job,
        digest=world.digest("the demo's evaluation"),
        results=world.RESULTS,
        is_demo=True,
    )


def whole_demo() -> Artifact:
    """Everything that a newcomer finds once the first jobs are done."""
    demo.demo_seed()
    base = imported(demo.BASE)
    demo.demo_advance()
    imported(demo.VARIANT, base)
    demo.demo_advance()
    artifact = compressed()
    demo.demo_advance()
    evaluated(artifact)
    demo.demo_advance()
    return artifact


def rows() -> dict[str, int]:
    kinds = (Approval, Artifact, Checkpoint, Deployment, Evaluation, Job, SampleSet, User)
    return {kind.__name__: kind.objects.count() for kind in kinds}


def test_it_seeds_people_of_each_role_with_passwords_of_their_own() -> None:
    passwords = demo.demo_seed()
    assert len(set(passwords.values())) == len(Role) == len(passwords)
    assert {user.role for user in User.objects.filter(is_demo=True)} == set(Role.values)
    for name, password in passwords.items():
        assert User.objects.get(username=name).check_password(password)


def test_seeding_again_changes_nothing_and_shows_no_password() -> None:
    demo.demo_seed()
    before = rows()
    assert demo.demo_seed() == {}
    assert rows() == before


def test_each_finished_job_brings_the_next_until_one_waits_for_approval_and_one_runs() -> None:
    artifact = whole_demo()
    approval = Approval.objects.get()
    assert (approval.artifact, approval.state, approval.is_demo) == (artifact, "pending", True)
    production = Environment.objects.get(name="production")
    assert production.generation == 1
    assert production.active is not None
    assert production.active.kind == "full_precision"
    assert production.active.created_by is not None
    assert production.active.created_by.role == Role.OPS
    waiting = Job.objects.filter(state=JobState.QUEUED).order_by("pk")
    assert [job.kind for job in waiting] == [JobKind.REHEARSE, JobKind.COMPRESS]
    assert waiting[1].priority < 0
    assert all(Job.objects.values_list("is_demo", flat=True))


def test_it_asks_for_nothing_twice_whenever_it_is_called() -> None:
    demo.demo_seed()
    for _ in range(3):
        demo.demo_advance()
    assert Job.objects.count() == 1
    whole = rows() | {"Job": 1}
    world.at_once(*[demo.demo_advance] * 4)
    assert rows() == whole


def test_a_failed_job_is_not_asked_for_again() -> None:
    demo.demo_seed()
    Job.objects.update(state=JobState.FAILED, finished_at="2026-01-01T00:00Z")
    demo.demo_advance()
    assert Job.objects.count() == 1


def test_it_stops_quietly_when_its_engineer_was_given_another_role() -> None:
    demo.demo_seed()
    imported(demo.BASE)
    User.objects.filter(role=Role.ENGINEER).update(role=Role.VIEWER)
    demo.demo_advance()
    assert Job.objects.count() == 1


def test_where_there_is_no_demo_nothing_is_queued() -> None:
    demo.demo_advance()
    assert rows() == dict.fromkeys(rows(), 0)


def test_removing_leaves_no_row_no_person_and_no_blob_but_all_of_history() -> None:
    whole_demo()
    events = apps.get_model("dashboard", "JobEvent")
    history = events.objects.count()
    removal = demo_remove(actor=None, patience=0)
    assert rows() == dict.fromkeys(rows(), 0)
    assert removal.counts["users"] == len(Role)
    assert removal.blobs == len(demo.SAMPLE_SETS)
    assert removal.bytes_freed > 100_000
    assert events.objects.count() >= history


def test_an_environment_that_served_the_demo_counts_on_from_its_generation() -> None:
    whole_demo()
    demo_remove(actor=None, patience=0)
    production = Environment.objects.get(name="production")
    assert (production.generation, production.active) == (1, None)
    world.pair()
    releases.deployment_full_precision(
        actor=world.person(Role.OPS),
        environment=production,
        variant=Checkpoint.objects.get(name="variant"),
        reason="a model of our own",
        seen_generation=1,
    )
    production.refresh_from_db()
    assert production.generation == 2


def test_what_others_made_stays_with_its_bytes(settings: Settings) -> None:
    whole_demo()
    own = world.artifact("ours", by=world.person(Role.ENGINEER, "grace"))
    world.evaluation(own, text_set=SampleSet.objects.get(name=demo.TEXT_SET))
    ours = evaluations.sample_set_create(
        actor=world.person(Role.ENGINEER, "grace"), name="ours", kind="text", data=b"some words of our own\n" * 9
    )
    demo_remove(actor=None, patience=0)
    assert list(Artifact.objects.all()) == [own]
    assert set(SampleSet.objects.values_list("name", flat=True)) == {"ours", demo.TEXT_SET}
    store = Store(settings.ARTIFACT_ROOT)
    assert store.read_bytes(ours.digest)
    assert store.read_bytes(SampleSet.objects.get(name=demo.TEXT_SET).digest)


def test_a_person_of_the_demo_whose_work_stays_can_no_longer_sign_in() -> None:
    whole_demo()
    world.artifact("ours", by=User.objects.get(username="erin"))
    removal = demo_remove(actor=None, patience=0)
    assert removal.kept_users == ["erin"]
    erin = User.objects.get(username="erin")
    assert not erin.is_active
    assert not erin.has_usable_password()


def test_the_demo_can_come_back_after_its_removal() -> None:
    whole_demo()
    world.artifact("ours", by=User.objects.get(username="erin"))
    demo_remove(actor=None, patience=0)
    passwords = demo.demo_seed()
    assert len(passwords) == len(Role)
    assert Job.objects.filter(kind=JobKind.IMPORT, spec__name=demo.BASE).exists()


def test_what_was_made_from_a_demo_model_goes_with_it() -> None:
    artifact = whole_demo()
    world.checkpoint("tuned-by-grace", artifact.base)
    demo_remove(actor=None, patience=0)
    assert not Checkpoint.objects.filter(name="tuned-by-grace").exists()


def test_it_waits_for_the_jobs_of_others() -> None:
    whole_demo()
    job = registry.checkpoint_import(
        actor=world.person(Role.ENGINEER, "grace"), root="imports", folder="store", name="grace-model"
    )
    before = rows()
    with pytest.raises(Refused, match=f"#{job.pk}"):
        demo_remove(actor=None, patience=0)
    assert rows() == before


def test_it_does_not_empty_an_environment_that_also_served_others() -> None:
    whole_demo()
    _base, variant = world.pair()
    ops = world.person(Role.OPS)
    production = Environment.objects.get(name="production")
    demo_variant = Checkpoint.objects.get(name=demo.VARIANT)
    for generation, chosen in enumerate((variant, demo_variant), start=1):
        releases.deployment_full_precision(
            actor=ops, environment=production, variant=chosen, reason="in turn", seen_generation=generation
        )
    with pytest.raises(Refused, match="production"):
        demo_remove(actor=None, patience=0)
    releases.deployment_full_precision(
        actor=ops, environment=production, variant=variant, reason="ours again", seen_generation=3
    )
    demo_remove(actor=None, patience=0)
    assert list(Deployment.objects.values_list("variant", flat=True)) == [variant.pk, variant.pk]


def test_the_command_prints_each_password_once_and_says_what_it_removed() -> None:
    out = StringIO()
    call_command("demo", "seed", stdout=out)
    for user in User.objects.all():
        password = out.getvalue().split(f" {user.username} ")[1].split()[0]
        assert user.check_password(password)
    again = StringIO()
    call_command("demo", "seed", stdout=again)
    assert "there already" in again.getvalue()
    removed = StringIO()
    call_command("demo", "remove", stdout=removed)
    assert "Removed: 5 sample sets, 1 job, 5 users." in removed.getvalue()
    assert "Freed " in removed.getvalue()
    with pytest.raises(CommandError, match="demo seed"):
        call_command("demo", "passwords", stdout=StringIO())


def test_new_passwords_replace_the_lost_ones() -> None:
    first = demo.demo_seed()
    second = demo.demo_new_passwords()
    assert set(first) == set(second)
    erin = User.objects.get(username="erin")
    assert erin.check_password(second["erin"])
    assert not erin.check_password(first["erin"])


def test_a_dry_run_only_counts() -> None:
    demo.demo_seed()
    before = rows()
    out = StringIO()
    call_command("demo", "remove", "--dry-run", stdout=out)
    assert out.getvalue().startswith("Would remove: ")
    assert rows() == before
