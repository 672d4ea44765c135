"""Importing checkpoints through real children, publishing them, and withdrawing artifacts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pghistory.models
import pytest
from django.core.exceptions import PermissionDenied
from pytest_django.fixtures import Settings

from compression_worker.launcher import Launcher, child_command
from compression_worker.store import Store
from dashboard.execution import Execution
from dashboard.lifecycle import ArtifactState, JobState, Refused, Role
from dashboard.models import Checkpoint, Job
from dashboard.services.jobs import job_retry
from dashboard.services.registry import (
    artifact_mark_corrupt,
    artifact_retire,
    checkpoint_import,
    import_folders,
)
from dashboard.services.releases import deployment_create, deployment_full_precision
from tests.dashboard.world import approved, artifact, checkpoint, digest, environment, pair, person
from tests.families import make_family_pair
from tests.peft_adapters import make_adapter
from tests.tiny import make_tiny_pair

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def roots(settings: Settings, tmp_path: Path) -> Path:
    """An import root with a base and its variant, and a store of its own."""
    make_tiny_pair(tmp_path / "models")
    (tmp_path / "outside").mkdir()
    (tmp_path / "models" / "link").symlink_to(tmp_path / "outside")
    settings.IMPORT_ROOTS = {"models": str(tmp_path / "models")}
    settings.ARTIFACT_ROOT = str(tmp_path / "store")
    return tmp_path / "models"


@pytest.fixture
def real_worker(roots: Path, tmp_path: Path) -> Iterator[Execution]:
    """A worker whose child is the product's own."""
    command = child_command(tmp_path / "store", {"models": roots}, "cpu")
    assert command[0] == sys.executable
    present = Execution(name="real", queues=["cpu"], launcher=Launcher(command))
    yield present
    present.close()


def test_the_listing_shows_folders_of_models_and_no_links(roots: Path, settings: Settings) -> None:
    (roots / "notes").mkdir()
    (roots / "notes" / "README.md").write_text("no model here")
    settings.IMPORT_ROOTS = {"models": str(roots), "gone": "/nowhere/at/all"}
    assert import_folders() == {"models": ["base", "variant"], "gone": []}


def test_a_base_and_its_variant_are_imported_by_a_real_child(real_worker: Execution, tmp_path: Path) -> None:
    engineer = person(Role.ENGINEER)
    checkpoint_import(actor=engineer, root="models", folder="base", name="tiny-base", licence="Apache-2.0")
    real_worker.run_all()
    base = Checkpoint.objects.get(name="tiny-base")
    assert (base.base, base.licence, base.created_by, base.architecture) == (
        None,
        "Apache-2.0",
        engineer,
        "LlamaForCausalLM",
    )
    assert Store(tmp_path / "store").has(base.digest)
    checkpoint_import(actor=engineer, root="models", folder="variant", name="tiny", base=base)
    real_worker.run_all()
    variant = Checkpoint.objects.get(name="tiny")
    assert (variant.base, variant.differences) == (base, [])
    assert variant.fingerprint != base.fingerprint


def test_an_adapter_becomes_a_whole_variant_of_the_base_that_was_chosen(
    real_worker: Execution, roots: Path, tmp_path: Path
) -> None:
    engineer = person(Role.ENGINEER)
    checkpoint_import(actor=engineer, root="models", folder="base", name="tiny-base")
    real_worker.run_all()
    base = Checkpoint.objects.get(name="tiny-base")
    make_adapter(roots / "base", roots / "tuned", target_modules=["q_proj", "v_proj"])
    job = checkpoint_import(actor=engineer, root="models", folder="tuned", name="tuned", base=base)
    assert job.estimate["source_bytes"] > base.size_bytes, "the whole variant is written, not the adapter alone"
    real_worker.run_all()
    variant = Checkpoint.objects.get(name="tuned")
    assert (variant.base, variant.differences, variant.parameters) == (base, [], base.parameters)
    assert variant.manifest["source"]["kind"] == "adapter"
    assert variant.fingerprint != base.fingerprint
    assert Store(tmp_path / "store").has(variant.digest)


def test_an_adapter_without_a_base_is_refused_before_it_is_queued(roots: Path) -> None:
    (roots / "tuned").mkdir()
    (roots / "tuned" / "adapter_config.json").write_text("{}")
    assert "tuned" in import_folders()["models"]
    with pytest.raises(Refused, match="PEFT adapter, which is no model by itself"):
        checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="tuned", name="tuned")
    assert not Job.objects.exists()


def test_an_adapter_for_another_base_fails_the_job_with_what_to_do(real_worker: Execution, roots: Path) -> None:
    engineer = person(Role.ENGINEER)
    checkpoint_import(actor=engineer, root="models", folder="base", name="tiny-base")
    real_worker.run_all()
    other, _ = make_family_pair(roots.parent / "other", "mistral")
    make_adapter(other, roots / "tuned", target_modules=["gate_proj"])
    base = Checkpoint.objects.get(name="tiny-base")
    job = checkpoint_import(actor=engineer, root="models", folder="tuned", name="tuned", base=base)
    real_worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "choose the base that the adapter was trained on" in job.error


def test_a_folder_that_is_no_checkpoint_fails_the_job_with_its_message(real_worker: Execution, roots: Path) -> None:
    (roots / "empty").mkdir()
    job = checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="empty", name="empty")
    real_worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert job.error
    assert not Checkpoint.objects.exists()


@pytest.mark.parametrize("folder", ["", ".", "..", "../outside", "/etc", "link", "no-such", "base/", "base/../variant"])
def test_only_a_listed_folder_is_taken(roots: Path, folder: str) -> None:
    with pytest.raises(Refused, match="no folder"):
        checkpoint_import(actor=person(Role.ENGINEER), root="models", folder=folder, name="x")


def test_an_unknown_root_is_refused(roots: Path) -> None:
    with pytest.raises(Refused, match="no import root 'etc'"):
        checkpoint_import(actor=person(Role.ENGINEER), root="etc", folder="base", name="x")


@pytest.mark.parametrize("name", ["", "with space", "<script>", "a/b", "x" * 101])
def test_a_name_that_is_no_slug_is_refused(roots: Path, name: str) -> None:
    with pytest.raises(Refused):
        checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="base", name=name)


def test_a_name_is_given_once_also_while_an_import_runs(roots: Path) -> None:
    checkpoint("taken")
    engineer = person(Role.ENGINEER)
    with pytest.raises(Refused, match="already a checkpoint named 'taken'"):
        checkpoint_import(actor=engineer, root="models", folder="base", name="taken")
    checkpoint_import(actor=engineer, root="models", folder="base", name="soon")
    with pytest.raises(Refused, match="under way"):
        checkpoint_import(actor=engineer, root="models", folder="base", name="soon")


def test_a_name_taken_in_the_meantime_fails_the_import_and_keeps_the_other(real_worker: Execution) -> None:
    job = checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="base", name="late")
    other = checkpoint("late")
    real_worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "another name" in job.error
    assert Checkpoint.objects.get(name="late") == other


def test_a_base_replaced_during_the_import_is_noticed(real_worker: Execution) -> None:
    engineer = person(Role.ENGINEER)
    checkpoint_import(actor=engineer, root="models", folder="base", name="tiny-base")
    real_worker.run_all()
    base = Checkpoint.objects.get(name="tiny-base")
    job = checkpoint_import(actor=engineer, root="models", folder="variant", name="tiny", base=base)
    Checkpoint.objects.filter(pk=base.pk).update(digest=digest("another base"))
    real_worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "replaced" in job.error


def test_a_variant_is_no_base(roots: Path) -> None:
    with pytest.raises(Refused, match="itself a variant"):
        checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="base", name="x", base=pair()[1])


def test_importing_the_same_folder_again_is_really_done_again(roots: Path) -> None:
    engineer = person(Role.ENGINEER)
    seeds = {
        checkpoint_import(actor=engineer, root="models", folder="base", name=name).steps.get().seed
        for name in ("one", "two")
    }
    assert len(seeds) == 2


def test_an_import_that_failed_can_be_tried_again_under_its_name(real_worker: Execution, roots: Path) -> None:
    (roots / "late").mkdir()
    job = checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="late", name="late")
    real_worker.run_all()
    again = job_retry(actor=person(Role.ENGINEER), job=job)
    assert again.steps.get().seed != job.steps.get().seed


def test_a_manager_may_not_import(roots: Path) -> None:
    with pytest.raises(PermissionDenied):
        checkpoint_import(actor=person(Role.MANAGER), root="models", folder="base", name="x")


def test_an_artifact_is_withdrawn_with_a_reason_that_history_keeps() -> None:
    withdrawn = artifact_retire(actor=person(Role.ENGINEER), artifact=artifact(), reason=" superseded ")
    assert withdrawn.state == ArtifactState.RETIRED
    event = pghistory.models.Events.objects.tracks(withdrawn).order_by("-pgh_id").first()
    assert event.pgh_context == {"user": person(Role.ENGINEER).pk, "reason": "superseded"}
    with pytest.raises(Refused, match="only a published"):
        artifact_retire(actor=person(Role.ENGINEER), artifact=withdrawn, reason="again")


def test_withdrawing_needs_a_reason() -> None:
    with pytest.raises(Refused, match="Say why"):
        artifact_retire(actor=person(Role.ENGINEER), artifact=artifact(), reason="  ")


def test_what_production_answers_from_cannot_be_withdrawn() -> None:
    approval = approved()
    ops, production = person(Role.OPS), environment()
    deployment_create(
        actor=ops,
        environment=production,
        artifact=approval.artifact,
        approval=approval,
        reason="go",
        seen_generation=0,
    )
    with pytest.raises(Refused, match="production answers from it"):
        artifact_retire(actor=person(Role.ENGINEER), artifact=approval.artifact, reason="old")
    deployment_full_precision(
        actor=ops, environment=production, variant=approval.artifact.variant, reason="back", seen_generation=1
    )
    assert artifact_retire(actor=person(Role.ENGINEER), artifact=approval.artifact, reason="old").state == "retired"


def test_a_corrupt_artifact_may_not_be_deployed() -> None:
    approval = approved()
    assert artifact_mark_corrupt(artifact=approval.artifact, detail="a flipped bit").state == ArtifactState.CORRUPT
    with pytest.raises(Refused, match="no longer published"):
        deployment_create(
            actor=person(Role.OPS),
            environment=environment(),
            artifact=approval.artifact,
            approval=approval,
            reason="go",
            seen_generation=0,
        )
