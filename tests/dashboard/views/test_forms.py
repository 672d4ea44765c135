"""Forms: what is wrong stands beside its field, what was typed stays, what a service refuses is said on the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from django.conf import settings
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.urls import reverse

from dashboard.lifecycle import ApprovalState, DeploymentKind, JobState, Role
from dashboard.models import Approval, Job, Policy, SampleSet, User
from tests.factories import deploy, make_approval, make_artifact, make_evaluation, make_job, make_user


def post(client: Client, route: str, *key: object, **values: object) -> object:
    return client.post(reverse(route, args=key), values)


@pytest.fixture
def folder() -> str:
    root = Path(settings.IMPORT_ROOTS["imports"])
    (root / "a-model").mkdir(exist_ok=True)
    (root / "a-model" / "config.json").touch()
    return "imports/a-model"


def test_an_import_is_queued_as_a_job(client_as: Callable[[Role], Client], folder: str) -> None:
    client = client_as(Role.ENGINEER)
    response = post(client, "checkpoint-import", folder=folder, name="a-model", licence="MIT")
    job = Job.objects.get(kind="import")
    assert response.headers["Location"] == reverse("job-detail", args=[job.pk])  # type: ignore[attr-defined]
    assert job.spec["folder"] == "a-model"


def test_a_folder_that_is_not_listed_is_no_choice(client_as: Callable[[Role], Client], folder: str) -> None:
    client = client_as(Role.ENGINEER)
    for bad in ("imports/../secret", "/etc", "imports/", "other/a-model"):
        response = post(client, "checkpoint-import", folder=bad, name="typed-name")
        assert response.status_code == 422  # type: ignore[attr-defined]
        assert "folder" in response.context["form"].errors  # type: ignore[attr-defined]
        assert b'value="typed-name"' in response.content  # type: ignore[attr-defined]
    assert not Job.objects.exists()


def test_a_taken_name_is_refused_on_the_form(
    world: SimpleNamespace, client_as: Callable[[Role], Client], folder: str
) -> None:
    response = post(client_as(Role.ENGINEER), "checkpoint-import", folder=folder, name=world.base.name)
    assert response.status_code == 422  # type: ignore[attr-defined]
    assert b"already a checkpoint named" in response.content  # type: ignore[attr-defined]


def test_an_adapter_without_a_base_is_refused_on_the_form(client_as: Callable[[Role], Client], folder: str) -> None:
    root = Path(settings.IMPORT_ROOTS["imports"])
    (root / "tuned").mkdir()
    (root / "tuned" / "adapter_config.json").touch()
    response = post(client_as(Role.ENGINEER), "checkpoint-import", folder="imports/tuned", name="tuned")
    assert response.status_code == 422  # type: ignore[attr-defined]
    assert b"choose the base that it was trained on" in response.content  # type: ignore[attr-defined]
    assert not Job.objects.exists()


def test_a_variant_that_came_from_an_adapter_says_so(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    variant = world.variant
    page = reverse("checkpoint-detail", args=[variant.name])
    assert b"PEFT adapter" not in client_as(Role.VIEWER).get(page).content
    files = {"adapter_config.json": "ab" * 32, "adapter_model.safetensors": "cd" * 32}
    source = {"kind": "adapter", "base": world.base.fingerprint, "changed_tensors": 8, "files": files}
    variant.manifest = variant.manifest | {"source": source}
    variant.save(update_fields=["manifest"])
    for url in (page, reverse("checkpoint-list")):
        assert b"from a PEFT adapter" in client_as(Role.VIEWER).get(url).content
    detail = client_as(Role.VIEWER).get(page).content
    assert b"8 tensors changed" in detail
    assert b"adapter_model.safetensors" in detail


JOB = {
    "distill_steps": 0,
    "batch_size": 4,
    "sequence_length": 128,
    "learning_rate": 0.0001,
    "learning_rate_unit": "absolute",
    "schedule": "cosine",
    "seed": 7,
    "priority": 0,
}


def test_a_compression_is_queued_from_the_methods_form(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.ENGINEER)
    post(client, "job-create", "bitdelta", variant=world.variant.pk, **JOB)
    job = Job.objects.latest("pk")
    assert (job.method, job.state, job.spec["seed"]) == ("bitdelta", JobState.QUEUED, 7)
    assert job.spec["config"]["distill_steps"] == 0


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", "0"), ("learning_rate", "-1"), ("schedule", "sideways"), ("seed", "-3")]
)
def test_a_setting_that_cannot_work_is_refused_beside_its_field(
    world: SimpleNamespace, client_as: Callable[[Role], Client], field: str, value: str
) -> None:
    before = Job.objects.count()
    values = {**JOB, "variant": world.variant.pk, field: value}
    response = client_as(Role.ENGINEER).post(reverse("job-create", args=["bitdelta"]), values)
    assert response.status_code == 422
    assert list(response.context["form"].errors) == [field]
    assert f'id="id_{field}_error"' in response.content.decode()
    assert Job.objects.count() == before


def test_distillation_without_text_is_refused_beside_the_text(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    values = {**JOB, "variant": world.variant.pk, "distill_steps": 20}
    response = client_as(Role.ENGINEER).post(reverse("job-create", args=["bitdelta"]), values)
    assert list(response.context["form"].errors) == ["calibration_set"]


def test_a_clone_begins_with_what_the_original_said_and_shows_what_changed(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.ENGINEER)
    post(client, "job-create", "bitdelta", variant=world.variant.pk, **JOB)
    original = Job.objects.latest("pk")
    address = f"{reverse('job-create', args=['bitdelta'])}?from={original.pk}"
    assert client.get(address).context["form"]["seed"].value() == 7
    client.post(address, {**JOB, "variant": world.variant.pk, "batch_size": 8})
    clone = Job.objects.latest("pk")
    assert clone.cloned_from_id == original.pk
    page = client.get(reverse("job-detail", args=[clone.pk])).content.decode()
    assert "<del>4</del> <ins>8</ins>" in page


def test_an_unknown_method_is_no_page(client_as: Callable[[Role], Client]) -> None:
    assert client_as(Role.ENGINEER).get(reverse("job-create", args=["magic"])).status_code == 404


def test_a_queued_job_can_be_cancelled_and_tried_again(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.ENGINEER)
    post(client, "job-create", "bitdelta", variant=world.variant.pk, **JOB)
    job = Job.objects.latest("pk")
    post(client, "job-cancel", job.pk, how="stop")
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED
    response = post(client, "job-retry", job.pk)
    again = Job.objects.latest("pk")
    assert again.cloned_from_id == job.pk
    assert response.headers["Location"] == reverse("job-detail", args=[again.pk])  # type: ignore[attr-defined]


def test_a_finished_job_cannot_be_cancelled_and_the_page_says_so(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    address = reverse("job-cancel", args=[world.job.pk])
    response = client_as(Role.ENGINEER).post(address, {"how": "kill"}, follow=True)
    assert "the job has ended already" in response.content.decode()


def test_a_viewer_may_not_cancel(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    response = post(client_as(Role.VIEWER), "job-cancel", world.running.pk, how="kill")
    assert response.status_code == 403  # type: ignore[attr-defined]
    world.running.refresh_from_db()
    assert world.running.cancel_requested == ""


def test_a_queued_job_can_be_moved_in_the_queue(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    job = make_job(state=JobState.QUEUED, created_by=world.engineer)
    client = client_as(Role.ENGINEER)
    post(client, "job-priority", job.pk, priority=5)
    job.refresh_from_db()
    assert job.priority == 5
    response = client.post(reverse("job-priority", args=[job.pk]), {"priority": "soon"}, follow=True)
    assert "“soon” is none" in response.content.decode()


def upload(client: Client, data: bytes, kind: str = "choice", name: str = "my-set") -> object:
    file = SimpleUploadedFile("set.jsonl", data)
    return client.post(reverse("set-upload"), {"name": name, "kind": kind, "file": file, "origin": "typed origin"})


def test_a_sample_set_is_checked_and_stored(client_as: Callable[[Role], Client]) -> None:
    line = b'{"question": "2+2", "choices": ["3", "4"], "answer": 1}\n'
    response = upload(client_as(Role.ENGINEER), line * 3)
    made = SampleSet.objects.get(name="my-set")
    assert response.headers["Location"] == reverse("set-detail", args=["my-set", 1])  # type: ignore[attr-defined]
    assert made.samples == 3


def test_a_broken_sample_set_names_its_line_and_keeps_what_was_typed(client_as: Callable[[Role], Client]) -> None:
    good = b'{"question": "2+2", "choices": ["3", "4"], "answer": 1}\n'
    response = upload(client_as(Role.ENGINEER), good + b'{"question": "2+2"}\n')
    html = response.content.decode()  # type: ignore[attr-defined]
    assert response.status_code == 422  # type: ignore[attr-defined]
    assert "line 2" in html
    assert "typed origin" in html
    assert not SampleSet.objects.filter(name="my-set").exists()


def test_a_file_over_the_limit_is_refused_before_it_is_read(
    client_as: Callable[[Role], Client], settings: object
) -> None:
    settings.UPLOAD_LIMIT_BYTES = 10  # type: ignore[attr-defined]
    response = upload(client_as(Role.ENGINEER), b"x" * 11, kind="text")
    assert "file" in response.context["form"].errors  # type: ignore[attr-defined]


def test_an_evaluation_needs_a_set(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.ENGINEER)
    values = {
        "target": f"a{world.artifact.pk}",
        "window_tokens": 256,
        "max_windows": 40,
        "max_choices": 100,
        "max_new_tokens": 8,
        "bootstrap_resamples": 2000,
        "seed": 0,
    }
    refused = client.post(reverse("evaluation-new"), values)
    assert list(refused.context["form"].errors) == ["text_set"]
    client.post(reverse("evaluation-new"), {**values, "text_set": world.text.pk})
    assert Job.objects.latest("pk").kind == "evaluate"


def test_the_person_who_asked_cannot_decide_and_reads_why(world: SimpleNamespace, client: Client) -> None:
    person = make_user(Role.MANAGER)
    evaluation = make_evaluation(make_artifact(world.variant), text_set=world.text)
    approval = make_approval(evaluation, requested_by=person, submitted_by=person)
    client.force_login(person)
    page = client.get(reverse("approval-detail", args=[approval.pk])).content.decode()
    assert "You asked for this approval" in page
    assert 'value="approve" disabled' in page
    response = post(client, "approval-decide", approval.pk, decision="approve", reason="mine")
    assert response.status_code == 422  # type: ignore[attr-defined]
    assert "you asked for this approval" in response.content.decode()  # type: ignore[attr-defined]
    approval.refresh_from_db()
    assert approval.state == ApprovalState.PENDING


def test_a_manager_rejects_with_a_reason(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.MANAGER)
    silent = post(client, "approval-decide", world.pending.pk, decision="reject", reason="")
    assert silent.status_code == 422  # type: ignore[attr-defined]
    post(client, "approval-decide", world.pending.pk, decision="reject", reason="too many flips")
    page = client.get(reverse("approval-detail", args=[world.pending.pk])).content.decode()
    assert "too many flips" in page
    assert Approval.objects.get(pk=world.pending.pk).state == ApprovalState.REJECTED


def test_a_blocking_check_leaves_only_the_rejection(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.MANAGER)
    page = client.get(reverse("approval-detail", args=[world.pending.pk])).content.decode()
    assert "It can only be rejected: 1 check fails" in page
    response = post(client, "approval-decide", world.pending.pk, decision="approve", reason="please")
    assert response.status_code == 422  # type: ignore[attr-defined]


def test_an_approval_can_be_taken_back(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.MANAGER)
    post(client, "approval-revoke", world.approval.pk, reason="new evidence")
    assert Approval.objects.get(pk=world.approval.pk).state == ApprovalState.REVOKED


def test_the_list_and_the_detail_agree_on_whether_an_approval_counts(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    from dashboard.selectors.approvals import approval_problems
    from dashboard.selectors.memo import approval_list

    def agree() -> bool:
        (row,) = approval_list(ApprovalState.APPROVED)
        assert row.holds == (not approval_problems(row))  # type: ignore[attr-defined]
        return bool(row.holds)  # type: ignore[attr-defined]

    assert agree()
    deploy(world.production, world.variant, rollback=True)
    assert not agree()


def test_an_engineer_asks_for_approval(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    artifact = make_artifact(world.variant, name="third")
    client = client_as(Role.ENGINEER)
    address = reverse("artifact-detail", args=[artifact.pk])
    assert "Evaluate it first" in client.get(address).content.decode()
    evaluation = make_evaluation(artifact, text_set=world.text)
    post(client, "approval-new", artifact.pk, evaluation=evaluation.pk, note="please look")
    approval = Approval.objects.get(artifact=artifact)
    assert approval.note == "please look"
    assert approval.requested_by == client.user  # type: ignore[attr-defined]


def test_a_rollback_needs_a_reason_and_moves_the_pointer(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.OPS)
    page = client.get(reverse("environment-detail", args=["production"])).content.decode()
    assert "Roll production back to full precision" in page
    silent = post(client, "rollback", "production", reason="", seen_generation=2)
    assert silent.status_code == 422  # type: ignore[attr-defined]
    assert "Say why" in silent.content.decode()  # type: ignore[attr-defined]
    post(client, "rollback", "production", reason="refusals up", seen_generation=2)
    world.production.refresh_from_db()
    assert world.production.generation == 3
    assert world.production.active.kind == DeploymentKind.ROLLBACK
    page = client.get(reverse("environment-detail", args=["production"])).content.decode()
    assert "refusals up" in page
    assert "support-ja @ full precision" in page


def test_a_rollback_from_a_page_that_is_out_of_date_conflicts_and_keeps_the_reason(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    response = post(client_as(Role.OPS), "rollback", "production", reason="typed reason", seen_generation=1)
    assert response.status_code == 409  # type: ignore[attr-defined]
    assert "typed reason" in response.content.decode()  # type: ignore[attr-defined]
    world.production.refresh_from_db()
    assert world.production.generation == 2


def test_an_engineer_sees_what_a_rollback_would_do_but_cannot_do_it(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.ENGINEER)
    page = client.get(reverse("environment-detail", args=["production"])).content.decode()
    assert "Operations and administrators can roll back" in page
    assert post(client, "rollback", "production", reason="x", seen_generation=2).status_code == 403  # type: ignore[attr-defined]


def test_ops_deploy_an_approved_artifact(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    from tests.factories import make_environment

    staging = make_environment("staging")
    client = client_as(Role.OPS)
    values = {"approval": world.approval.pk, "reason": "try it", "seen_generation": staging.generation}
    response = client.post(reverse("deployment-create", args=["staging"]), values)
    assert response.status_code == 302, response.content.decode()
    staging.refresh_from_db()
    assert staging.active is not None
    assert staging.active.artifact == world.artifact


def test_ops_deploy_full_precision(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    from tests.factories import make_environment

    staging = make_environment("staging")
    client = client_as(Role.OPS)
    post(client, "deployment-full-precision", "staging", variant=world.variant.pk, reason="begin", seen_generation=0)
    staging.refresh_from_db()
    assert staging.generation == 1


def test_an_artifact_in_production_cannot_be_withdrawn(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.ENGINEER)
    refused = post(client, "artifact-retire", world.artifact.pk, reason="typed reason")
    assert refused.status_code == 422  # type: ignore[attr-defined]
    assert "production answers from it" in refused.content.decode()  # type: ignore[attr-defined]
    post(client, "artifact-retire", world.pending.artifact.pk, reason="worse")
    world.pending.artifact.refresh_from_db()
    assert world.pending.artifact.state == "retired"


def test_an_administrator_changes_the_policy(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.ADMIN)
    unlimited = post(client, "policy-change", true_ratio_severity="block")
    assert unlimited.status_code == 422  # type: ignore[attr-defined]
    post(client, "policy-change", perplexity_increase_limit="7.5", perplexity_increase_severity="warn")
    rules = Policy.objects.get(active=True).rules
    assert rules == [{"check": "perplexity_increase", "limit": 0.075, "severity": "warn"}]


def test_an_administrator_creates_people_and_changes_roles_with_a_reason(
    db: None, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.ADMIN)
    weak = post(client, "user-list", username="bob", password="short", role="viewer")
    assert weak.status_code == 422  # type: ignore[attr-defined]
    assert b'value="bob"' in weak.content  # type: ignore[attr-defined]
    post(client, "user-list", username="bob", password="a long enough pass phrase", role="viewer")
    bob = User.objects.get(username="bob")
    post(client, "user-role", bob.pk, role="ops", reason="on call")
    bob.refresh_from_db()
    assert bob.role == Role.OPS
    page = client.get(reverse("history") + "?kind=User").content.decode()
    assert "on call" in page
    assert "<del>Viewer</del> → <ins>Operations</ins>" in page


def test_nobody_changes_their_own_role(client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.ADMIN)
    address = reverse("user-role", args=[client.user.pk])  # type: ignore[attr-defined]
    response = client.post(address, {"role": "ops", "reason": "x"}, follow=True)
    assert "nobody changes their own role" in response.content.decode()


def test_signing_in_leads_to_the_page_one_wanted(db: None, client: Client) -> None:
    person = make_user(Role.VIEWER, username="carol")
    person.set_password("a long enough pass phrase")
    person.save()
    wrong = client.post(reverse("sign-in"), {"username": "carol", "password": "nope", "next": "/jobs/"})
    assert wrong.status_code == 200
    assert b'value="carol"' in wrong.content
    values = {"username": "carol", "password": "a long enough pass phrase", "next": "/jobs/"}
    right = client.post(reverse("sign-in"), values)
    assert right.headers["Location"] == "/jobs/"
    assert post(client, "sign-out").headers["Location"] == reverse("sign-in")  # type: ignore[attr-defined]


def test_the_language_is_kept_with_the_person(client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.VIEWER)
    response = post(client, "language", language="ja", next="/jobs/")
    assert response.headers["Location"] == "/jobs/"  # type: ignore[attr-defined]
    assert 'lang="ja"' in client.get("/jobs/").content.decode()
    away = post(client, "language", language="en", next="https://elsewhere.example/")
    assert away.headers["Location"] == "/"  # type: ignore[attr-defined]


def test_the_language_before_a_sign_in_is_kept_in_a_cookie(db: None, client: Client) -> None:
    post(client, "language", language="ja", next=reverse("sign-in"))
    assert "サインイン" in client.get(reverse("sign-in")).content.decode()
    assert client.cookies[settings.LANGUAGE_COOKIE_NAME].value == "ja"


def test_preferences_set_the_theme(client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.VIEWER)
    post(client, "preferences", language="", theme="dark")
    assert 'data-theme="dark"' in client.get("/").content.decode()
    assert post(client, "preferences", language="", theme="pink").status_code == 422  # type: ignore[attr-defined]


def test_history_says_who_did_what_and_why(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.OPS)
    post(client, "rollback", "production", reason="refusals up", seen_generation=2)
    page = client.get(f"{reverse('history')}?kind=Deployment&user={client.user}").content.decode()  # type: ignore[attr-defined]
    assert "refusals up" in page
    assert str(client.user) in page  # type: ignore[attr-defined]
    nobody = client.get(f"{reverse('history')}?kind=Deployment&user=nobody").content.decode()
    assert "No change matches" in nobody


def test_every_tracked_model_has_its_place_in_the_history() -> None:
    from dashboard.selectors.history import KINDS, tracked_models

    assert set(tracked_models()) == set(KINDS)


def test_search_finds_names_numbers_and_digests(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.VIEWER)
    assert b"support-ja" in client.get(reverse("search") + "?q=support").content
    number = client.get(f"{reverse('search')}?q=%23{world.failed.pk}")
    assert number.headers["Location"] == reverse("job-detail", args=[world.failed.pk])
    by_digest = client.get(f"{reverse('search')}?q={world.artifact.digest[:10]}")
    assert world.artifact.name in by_digest.content.decode()
    assert b"Nothing found" in client.get(reverse("search") + "?q=zzz").content
