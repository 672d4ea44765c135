"""Checkpoints and artifacts: asking for an import, publishing what a job made, withdrawing what must not be used."""

from __future__ import annotations

import contextlib
import os

from django.conf import settings
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from compression_worker.adapters import is_adapter
from compression_worker.catalog import METHODS
from compression_worker.contracts import PlannedStep
from compression_worker.faults import failpoint
from compression_worker.preflight import import_estimate
from dashboard.lifecycle import ACTIVE_JOB_STATES, ArtifactState, JobKind, Refused
from dashboard.models import Artifact, Checkpoint, Environment, Job, Step, User
from dashboard.selectors.preflight import plain_preflight
from dashboard.selectors.queues import default_queue
from dashboard.services.ordering import job_order, require_fit, unique_seed
from dashboard.services.units import authorise, recorded, required, unit_of_work


@unit_of_work
def checkpoint_import(
    *,
    actor: User,
    root: str,
    folder: str,
    name: str,
    base: Checkpoint | None = None,
    licence: str = "",
    is_demo: bool = False,
) -> Job:
    """Queue the import of ``folder`` below the import root ``root`` as checkpoint ``name`` (a variant of ``base``).

    A folder that holds a PEFT adapter becomes a whole variant: it is merged into ``base``, which it cannot do without.
    What comes from the root ``demo``, or stands on a base of the demo, goes when the demo is removed.
    """
    actor = authorise(actor, "checkpoint.import")
    _check_folder(root, folder)
    check_import_name(name)
    if base is not None and base.base_id is not None:
        raise Refused(_("'%(name)s' is itself a variant: choose a base model") % {"name": base.name})
    size, weights = _import_bytes(root, folder, base)
    first = PlannedStep(
        name="import",
        kind="checkpoint.import",
        group="import",
        params={"root": root, "folder": folder, "licence": licence},
        inputs={"base": base.digest} if base else {},
        seed=unique_seed(),
    )
    spec = {"root": root, "folder": folder, "name": name, "licence": licence, "base": base.pk if base else None}
    fit = plain_preflight(import_estimate(size, weights), default_queue())
    with recorded(actor=actor, reason=f"import {root}/{folder} as {name}"):
        return job_order(
            actor=actor,
            kind=JobKind.IMPORT,
            title=f"import {name}",
            spec=spec,
            first=first,
            is_demo=is_demo or root == "demo" or bool(base and base.is_demo),
            estimate=require_fit(fit),
        )


MODEL_FILES = ("config.json", ".safetensors", ".bin", ".pt", ".pth", ".gguf")


def import_folders() -> dict[str, list[str]]:
    """The folders that hold a model, by import root: only names are read, nothing in them is opened."""
    return {
        root: [folder for folder in _folders(path) if _holds_model(os.path.join(path, folder))]
        for root, path in settings.IMPORT_ROOTS.items()
    }


def _holds_model(folder: str) -> bool:
    """Whether a file is named like a model's. Pickles count: an import says what to do about them."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.endswith(MODEL_FILES) for entry in entries)
    except OSError:
        return True  # what cannot be looked at is better refused by an import, with its reason, than hidden


def _import_bytes(root: str, folder: str, base: Checkpoint | None) -> tuple[int, int]:
    """Bytes that the import will write, and of the weights among them. An adapter comes to a model like its base.

    Refuses an adapter without a base. Only names and sizes are read.
    """
    path = os.path.join(settings.IMPORT_ROOTS[root], folder)
    size, weights = _folder_bytes(path)
    if not _holds_adapter(path):
        return size, weights
    if base is None:
        raise Refused(
            _("'%(folder)s' holds a PEFT adapter, which is no model by itself: choose the base that it was trained on")
            % {"folder": folder}
        )
    return size + base.size_bytes, weights + int(base.manifest.get("weight_bytes", base.size_bytes))


def _holds_adapter(path: str) -> bool:
    try:
        return is_adapter(os.listdir(path))
    except OSError:
        return False  # the import says what is wrong with it


def _folder_bytes(path: str) -> tuple[int, int]:
    """Bytes of the files of a folder and of the weights among them, by their entries: none is opened."""
    sizes = [0, 0]
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                size = entry.stat(follow_symlinks=False).st_size
                sizes[0] += size
                sizes[1] += size if entry.name.endswith(".safetensors") else 0
    return sizes[0], sizes[1]


def _folders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _check_folder(root: str, folder: str) -> None:
    """Only a name that the listing has is taken, so that no name can lead out of the root."""
    if root not in settings.IMPORT_ROOTS:
        raise Refused(_("there is no import root '%(root)s'") % {"root": root})
    if folder not in _folders(settings.IMPORT_ROOTS[root]):
        raise Refused(_("the import root '%(root)s' has no folder '%(folder)s'") % {"root": root, "folder": folder})


def check_import_name(name: str) -> None:
    """Refuses a name that no checkpoint may have, or that one has or is about to have."""
    try:
        Checkpoint._meta.get_field("name").clean(name, None)
    except ValidationError as error:
        raise Refused(" ".join(error.messages)) from None
    if Checkpoint.objects.filter(name=name).exists():
        raise Refused(_("there is already a checkpoint named '%(name)s': choose another name") % {"name": name})
    if Job.objects.filter(kind=JobKind.IMPORT, state__in=ACTIVE_JOB_STATES, spec__name=name).exists():
        raise Refused(_("an import named '%(name)s' is under way: choose another name") % {"name": name})


def checkpoint_publish(*, job: Job, step: Step) -> Checkpoint:
    """The checkpoint that an import job made. Called by the last step's finish, in its transaction."""
    name, manifest = job.spec["name"], step.data["manifest"]
    base = _base_of(job)
    if Checkpoint.objects.filter(name=name).exists():
        raise Refused(f"a checkpoint named '{name}' was imported in the meantime: import again under another name")
    checkpoint = Checkpoint.objects.create(
        name=name,
        base=base,
        digest=step.data["checkpoint"],
        fingerprint=manifest["fingerprint"],
        manifest=manifest,
        size_bytes=manifest["size_bytes"],
        parameters=manifest["parameters"],
        dtype=manifest["dtype"],
        architecture=manifest["architecture"],
        licence=job.spec["licence"][:100],
        differences=step.data["differences"],
        job=job,
        created_by=job.created_by,
        is_demo=job.is_demo,
    )
    failpoint("publish.checkpoint")
    return checkpoint


def _base_of(job: Job) -> Checkpoint | None:
    """The base that the import was compared with, if it still is what it was then."""
    if job.spec["base"] is None:
        return None
    base = Checkpoint.objects.filter(pk=job.spec["base"]).first()
    if base is None or base.digest != job.spec["first"]["inputs"]["base"]:
        raise Refused("the base model was removed or replaced during the import: import again")
    return base


def artifact_publish(*, job: Job, step: Step) -> Artifact:
    """The artifact that a compression job made. Called by the last step's finish, in its transaction."""
    data, variant = step.data, job.variant
    base = variant.base if variant and METHODS[data["method"]].needs_base else variant
    if variant is None or base is None:
        raise Refused("the checkpoint or its base was removed during the job")
    _check_artifact(data, variant, base)
    artifact = Artifact.objects.create(
        name=f"{variant.name}-{data['name_hint']}"[:200],
        variant=variant,
        base=base,
        job=job,
        digest=data["artifact"],
        method=data["method"],
        config=data["config"],
        source_bytes=data["source_bytes"],
        artifact_bytes=data["artifact_bytes"],
        nominal_ratio=data["nominal_ratio"],
        bits_per_weight=data["bits_per_weight"],
        ledger=data["ledger"],
        figures=data["figures"],
        state=ArtifactState.PUBLISHED,
        is_demo=job.is_demo,
    )
    failpoint("publish.artifact")
    return artifact


def _check_artifact(data: dict[str, object], variant: Checkpoint, base: Checkpoint) -> None:
    """What the job says it made has to fit what it was asked to make, and its ledger has to add up."""
    ledger = data["ledger"]
    total = sum(part["bytes"] for part in ledger) if isinstance(ledger, list) else -1
    if data["variant_fingerprint"] != variant.fingerprint:
        raise Refused("the artifact was made from another checkpoint: run the job again")
    if data["base_fingerprint"] != base.fingerprint:
        raise Refused(
            f"the artifact was made against another base: its fingerprint is {data['base_fingerprint']}, "
            f"the base's is {base.fingerprint}"
        )
    if total != data["artifact_bytes"]:
        raise Refused(f"the ledger adds up to {total} bytes, the artifact has {data['artifact_bytes']}")


@unit_of_work
def artifact_retire(*, actor: User, artifact: Artifact, reason: str) -> Artifact:
    """Withdraw a published artifact; refused while an environment answers from it."""
    actor = authorise(actor, "artifact.retire")
    reason = required(reason, _("Say why: the reason is kept in the history."))
    artifact = Artifact.objects.select_for_update(no_key=True).get(pk=artifact.pk)
    if artifact.state != ArtifactState.PUBLISHED:
        raise Refused(_("only a published artifact can be withdrawn"))
    serving = Environment.objects.filter(active__artifact=artifact).first()
    if serving is not None:
        raise Refused(_("%(environment)s answers from it: roll back first") % {"environment": serving.name})
    with recorded(actor=actor, reason=reason):
        return _artifact_move(artifact, ArtifactState.RETIRED)


@unit_of_work
def artifact_mark_corrupt(*, artifact: Artifact, detail: str) -> Artifact:
    """Its bytes no longer match their digests: it may not be approved or deployed any more."""
    artifact = Artifact.objects.select_for_update(no_key=True).get(pk=artifact.pk)
    with recorded(actor=None, reason=detail):
        return _artifact_move(artifact, ArtifactState.CORRUPT)


@unit_of_work
def artifact_mark_sound(*, artifact: Artifact, detail: str) -> Artifact:
    """Every byte matches its digest again: it is what was published, and counts as that."""
    artifact = Artifact.objects.select_for_update(no_key=True).get(pk=artifact.pk)
    if artifact.state != ArtifactState.CORRUPT:
        return artifact
    with recorded(actor=None, reason=detail):
        return _artifact_move(artifact, ArtifactState.PUBLISHED)


def _artifact_move(artifact: Artifact, state: ArtifactState) -> Artifact:
    artifact.state = state
    artifact.save(update_fields=["state"])
    return artifact
