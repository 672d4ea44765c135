"""Rows for what lies whole in the store and has none: checkpoints, artifacts and escrows published after the backup.

The outputs of the steps that made them say all that a row needs, except who asked and how a person called it. What is
adopted says so in its name and in its job; it is neither approved nor deployed by that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from django.utils import timezone

from compression_worker.catalog import METHODS
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepOutput
from compression_worker.store import Blob, Store
from dashboard.lifecycle import ACTIVE_JOB_STATES, JobKind, JobState, Refused, Role, StepState
from dashboard.models import Artifact, Checkpoint, Escrow, Job, Step, User
from dashboard.services.escrows import escrow_publish
from dashboard.services.registry import artifact_publish, checkpoint_publish
from dashboard.services.units import recorded, unit_of_work

ADOPTER = "recovery"
"""Who stands for the submitter that nobody knows any more: a person that cannot sign in."""
OUTPUT_START = b'{"blobs":'
DOCUMENT_BYTES = 256_000_000
ARTIFACT_FORMAT = "deltaworks-artifact-1"


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A checkpoint, an artifact or an escrow without a row. ``problem`` says why it cannot have one."""

    kind: JobKind
    digest: str
    output: str  # the digest of the step's output that made it
    data: Json
    base: str = ""  # the base's checkpoint digest; empty for a base, and for an artifact that stands alone
    variant: str = ""
    seed: int = 0
    problem: str = ""

    @property
    def words(self) -> str:
        what = {JobKind.COMPRESS: "artifact", JobKind.ESCROW: "escrow"}.get(self.kind, "checkpoint")
        return f"{what} {self.digest[:12]}"

    @property
    def name(self) -> str:
        """Of a checkpoint: nobody knows any more how it was called."""
        return f"adopted-{self.digest[:12]}"

    def line(self) -> str:
        """What would be done with it."""
        return f"{self.words} has no row: " + (f"not adopted: {self.problem}" if self.problem else "to be adopted")


@dataclass
class Inventory:
    """The outputs in the store that say how a checkpoint, an artifact or an escrow came to be."""

    checkpoints: dict[str, tuple[str, StepOutput]] = field(default_factory=dict)
    artifacts: dict[str, tuple[str, StepOutput]] = field(default_factory=dict)
    escrows: dict[str, tuple[str, StepOutput]] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)  # variant -> base, by checkpoint digest, as artifacts say


def lost_in(store: Store) -> list[Lost]:
    """What of ``store`` has no row: bases, variants, then artifacts and escrows, so that each finds what it stands on.

    Every byte of what is to be adopted is hashed.
    """
    inventory = _inventory(store)
    rows = set(Checkpoint.objects.values_list("digest", flat=True))
    found = [
        _lost_checkpoint(store, inventory, digest) for digest in sorted(inventory.checkpoints) if digest not in rows
    ]
    found.sort(key=lambda lost: (bool(lost.base), lost.digest))
    checkpoints = [_standing(lost, rows, found) for lost in found]
    rows |= {lost.digest for lost in checkpoints if not lost.problem}
    artifacts = set(Artifact.objects.values_list("digest", flat=True))
    made = [
        _lost_artifact(store, inventory, digest) for digest in sorted(inventory.artifacts) if digest not in artifacts
    ]
    made += [lost for digest in sorted(inventory.escrows) if (lost := _lost_escrow(store, inventory, digest))]
    return checkpoints + [_standing(lost, rows, checkpoints) for lost in made]


def _inventory(store: Store) -> Inventory:
    inventory = Inventory()
    for blob in store.blobs():
        digest, output = blob.digest, _output(store, blob)
        manifest = output.blobs.get("manifest.json", "") if output else ""
        if output is None or not manifest:
            continue
        if output.data.get("checkpoint") == manifest:
            inventory.checkpoints.setdefault(manifest, (digest, output))
        elif output.data.get("escrow") == manifest:
            inventory.escrows.setdefault(manifest, (digest, output))
            inventory.bases[output.data["variant"]] = output.data["base"]
        elif output.data.get("artifact") == manifest:
            inventory.artifacts.setdefault(manifest, (digest, output))
            said = _manifest(store, manifest)
            if said and not _stands_alone(said):
                inventory.bases[said["variant"]["checkpoint"]] = said["base"]["checkpoint"]
    return inventory


def _output(store: Store, blob: Blob) -> StepOutput | None:
    """The step output that the blob is, or None for what is something else, or damaged."""
    if blob.size > DOCUMENT_BYTES:
        return None
    with store.open(blob.digest) as file:
        if file.read(len(OUTPUT_START)) != OUTPUT_START:
            return None
    try:
        return StepOutput.from_bytes(store.read_bytes(blob.digest))
    except (CompressionError, ValueError, KeyError, TypeError):
        return None


def _manifest(store: Store, digest: str) -> Json | None:
    """An artifact's manifest; None when it is damaged or of a format that is not known here."""
    try:
        value: Json = json.loads(store.read_bytes(digest))
    except (CompressionError, ValueError):
        return None
    return value if value.get("format") == ARTIFACT_FORMAT else None


def _stands_alone(manifest: Json) -> bool:
    """Whether an artifact holds the whole model. It names its checkpoint as its base, which then says nothing of it."""
    method = METHODS.get(manifest["method"])
    return method is not None and not method.needs_base


def _lost_checkpoint(store: Store, inventory: Inventory, digest: str) -> Lost:
    output, made = inventory.checkpoints[digest]
    known: dict[str, Any] = {"kind": JobKind.IMPORT, "digest": digest, "output": output, "data": made.data}
    if problem := _damage(store, made):
        return Lost(**known, problem=problem)
    imports = Job.objects.filter(kind=JobKind.IMPORT, state__in=ACTIVE_JOB_STATES).order_by("pk")
    if running := imports.first():
        problem = f"{running} is still to be done and may publish it under its name: look again afterwards"
        return Lost(**known, problem=problem)
    base = made.data.get("base", inventory.bases.get(digest))
    if base is None and digest not in inventory.bases.values():
        problem = "nothing says whether it is a base or a variant of one: import its folder again"
        return Lost(**known, problem=problem)
    return Lost(**known, base=base or "")


def _lost_artifact(store: Store, inventory: Inventory, digest: str) -> Lost:
    output, made = inventory.artifacts[digest]
    known: dict[str, Any] = {"kind": JobKind.COMPRESS, "digest": digest, "output": output, "data": made.data}
    if problem := _damage(store, made):
        return Lost(**known, problem=problem)
    manifest = _manifest(store, digest)
    if manifest is None:
        return Lost(**known, problem="its manifest is of a format that this version does not read: upgrade")
    base, variant = manifest["base"]["checkpoint"], manifest["variant"]["checkpoint"]
    if _stands_alone(manifest):
        base = ""
    lost = Lost(**known, base=base, variant=variant, seed=manifest["seed"])
    if running := _job_to_come(lost):
        return Lost(**known, problem=f"{running} is still to be done and makes it again: look again afterwards")
    return lost


def _lost_escrow(store: Store, inventory: Inventory, digest: str) -> Lost | None:
    """None where the variant has an escrow: one is enough, and each proved itself when it was made."""
    output, made = inventory.escrows[digest]
    base, variant = made.data["base"], made.data["variant"]
    if Escrow.objects.filter(variant__digest=variant).exists():
        return None
    known: dict[str, Any] = {"kind": JobKind.ESCROW, "digest": digest, "output": output, "data": made.data}
    to_come = Job.objects.filter(kind=JobKind.ESCROW, state__in=ACTIVE_JOB_STATES, variant__digest=variant)
    problem = _damage(store, made)
    if running := to_come.order_by("pk").first():
        problem = f"{running} is still to be done and makes it again: look again afterwards"
    return Lost(**known, base=base, variant=variant, problem=problem)


def _damage(store: Store, output: StepOutput) -> str:
    """The first of its blobs that is missing or does not match its digest."""
    for name, digest in sorted(output.blobs.items()):
        try:
            store.verify(digest)
        except CompressionError as error:
            return f"'{name}': {error.message}"
    return ""


def _job_to_come(lost: Lost) -> Job | None:
    jobs = Job.objects.filter(kind=JobKind.COMPRESS, state__in=ACTIVE_JOB_STATES, variant__digest=lost.variant)
    same = jobs.filter(method=lost.data["method"], spec__config=lost.data["config"], spec__seed=lost.seed)
    return same.order_by("pk").first()


def _standing(lost: Lost, rows: set[str], before: list[Lost]) -> Lost:
    """``lost``, with a problem when what it stands on has no row and cannot be adopted either."""
    adoptable = rows | {other.digest for other in before if not other.problem}
    for role, digest in (("variant", lost.variant), ("base", lost.base)):
        if not lost.problem and digest and digest not in adoptable:
            problem = f"its {role}, checkpoint {digest[:12]}, has no row: import it again, then look again"
            return Lost(**(vars(lost) | {"problem": problem}))
    return lost


def adopt(lost: Lost) -> str:
    """A row for ``lost``, and what to say of it."""
    if lost.problem:
        return lost.line()
    try:
        name = _adopt(lost)
    except (Refused, KeyError, TypeError, ValueError) as error:
        return f"{lost.words} has no row: not adopted: what its step says does not make a row: {error}"
    return f"{lost.words} is adopted as '{name}'"


@unit_of_work
def _adopt(lost: Lost) -> str:
    with recorded(actor=None, reason=f"adopted from the store: {lost.words} had no row"):
        if lost.kind == JobKind.IMPORT:
            base = Checkpoint.objects.filter(digest=lost.base).first() if lost.base else None
            job = _job(lost, _import_spec(lost, base), variant=None, method="")
            return checkpoint_publish(job=job, step=_step(job, lost)).name
        checkpoints = Checkpoint.objects.filter(digest=lost.variant).order_by("pk")
        variant = (checkpoints.filter(base__digest=lost.base) if lost.base else checkpoints).first()
        if variant is None:
            raise Refused("its variant has another base here")
        if lost.kind == JobKind.ESCROW:
            job = _job(lost, _escrow_spec(lost), variant=variant, method="")
            return str(escrow_publish(job=job, step=_step(job, lost)))
        job = _job(lost, _compression_spec(lost), variant=variant, method=lost.data["method"])
        artifact = artifact_publish(job=job, step=_step(job, lost))
        artifact.name = f"{artifact.name[:190]}-adopted"
        artifact.save(update_fields=["name"])
        return artifact.name


def _import_spec(lost: Lost, base: Checkpoint | None) -> Json:
    licence = lost.data["manifest"].get("licence", "")
    spec = {"name": lost.name, "licence": licence, "base": base.pk if base else None, "root": "", "folder": ""}
    inputs = {"base": base.digest} if base else {}
    first = PlannedStep(name="import", kind="checkpoint.import", group="import", inputs=inputs)
    return spec | {"first": first.to_json()}


def _escrow_spec(lost: Lost) -> Json:
    inputs = {"base": lost.base, "variant": lost.variant}
    return {"first": PlannedStep(name="plan", kind="escrow.plan", group="plan", inputs=inputs).to_json()}


def _compression_spec(lost: Lost) -> Json:
    """Enough for a retry, but for the text that its scales may have been distilled on: nothing names that any more."""
    method, config = lost.data["method"], lost.data["config"]
    inputs = {"base": lost.base} if lost.base else {}
    first = PlannedStep(
        name="plan",
        kind=f"{method}.plan",
        group="plan",
        params={"config": config},
        inputs=inputs | {"variant": lost.variant},
        seed=lost.seed,
    )
    return {"config": config, "calibration": None, "seed": lost.seed, "first": first.to_json()}


def _job(lost: Lost, spec: Json, *, variant: Checkpoint | None, method: str) -> Job:
    now = timezone.now()
    return Job.objects.create(
        kind=lost.kind,
        title=f"adopted: {lost.words}",
        spec=spec | {"adopted": lost.output},
        variant=variant,
        method=method,
        state=JobState.SUCCEEDED,
        created_by=_adopter(),
        started_at=now,
        finished_at=now,
    )


def _step(job: Job, lost: Lost) -> Step:
    """The one step that is known of the job: it keeps what it made from being swept."""
    return Step.objects.create(
        job=job,
        index=0,
        name="adopted",
        kind=job.spec["first"]["kind"],
        state=StepState.DONE,
        output=lost.output,
        data=lost.data,
        reused=True,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def _adopter() -> User:
    found = User.objects.filter(username=ADOPTER).first()
    if found is None:
        found = User(username=ADOPTER, role=Role.VIEWER, is_active=False)
        found.set_unusable_password()
        found.save()
    return found
