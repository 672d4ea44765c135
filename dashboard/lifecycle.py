"""The words for every state, each with its meaning, and which state may follow which.

What an event makes of a job and its steps is decided in ``dashboard.transitions``. Nothing here reads a clock or a
database.
"""

from __future__ import annotations

from django.db.models import TextChoices
from django.utils.translation import gettext_lazy as _


class Refused(Exception):
    """A request that the present state, the rules or the facts do not allow. The message is shown to the person."""


class Conflict(Refused):
    """Somebody else was faster: what the person saw is no longer so."""


class JobKind(TextChoices):
    IMPORT = "import", _("Import")  # copy a checkpoint folder into the store, by digest
    COMPRESS = "compress", _("Compression")  # make an artifact from a variant and its base, or from one checkpoint
    EVALUATE = "evaluate", _("Evaluation")  # measure base, variant and artifact on sample sets
    REHEARSE = "rehearse", _("Rollback rehearsal")  # restore full precision for real, verify it, time it
    ESCROW = "escrow", _("Escrow")  # keep a variant bit for bit as its difference from the base
    RESTORE = "restore", _("Restore of full precision")  # put a variant's own weights back, out of its escrow


class JobState(TextChoices):
    DRAFT = "draft", _("Draft")  # written down, not yet asked for
    QUEUED = "queued", _("Queued")  # accepted: the row is the promise, no message is needed
    RUNNING = "running", _("Running")  # at least one step was claimed
    VERIFYING = "verifying", _("Verifying")  # all steps are done; the result is being checked before it is published
    SUCCEEDED = "succeeded", _("Succeeded")  # the result is published
    FAILED = "failed", _("Failed")  # the job says no: bad input, or a target that cannot be met
    CANCELLED = "cancelled", _("Cancelled")  # a person stopped it
    DEAD = "dead", _("Dead")  # attempts used up: the code broke, was killed or was lost each time
    BLOCKED = "blocked", _("Blocked")  # waits for disk, base, gpu or quota, and goes on by itself


TERMINAL_JOB_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD})
ACTIVE_JOB_STATES = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.VERIFYING, JobState.BLOCKED})


class BlockedReason(TextChoices):
    DISK = "disk", _("no room on the disk")
    BASE = "base", _("the base model is missing")
    GPU = "gpu", _("waits for a GPU")
    QUOTA = "quota", _("the quota is used up")


class CancelRequest(TextChoices):
    STOP = "stop", _("Stop after this layer")  # the running step ends and is kept
    KILL = "kill", _("Kill now")  # the child process is killed; the running step is lost


class StepState(TextChoices):
    WAITING = "waiting", _("Waiting")  # its inputs are not there yet, or nobody has claimed it
    RUNNING = "running", _("Running")  # claimed: a lease and a fence number are held
    DONE = "done", _("Done")  # its output is in the store
    FAILED = "failed", _("Failed")  # the job says no
    CANCELLED = "cancelled", _("Cancelled")
    DEAD = "dead", _("Dead")


OPEN_STEP_STATES = frozenset({StepState.WAITING, StepState.RUNNING})


class AttemptOutcome(TextChoices):
    RUNNING = "running", _("Running")
    DONE = "done", _("Done")
    FAILED = "failed", _("Failed")  # the job said no
    ERRORED = "errored", _("Errored")  # the code broke
    KILLED = "killed", _("Killed")  # a signal ended the child
    LOST = "lost", _("Lost")  # the lease ran out: worker, machine or network went away
    CANCELLED = "cancelled", _("Cancelled")
    BLOCKED = "blocked", _("Blocked")  # no room: given back without counting


class ArtifactState(TextChoices):
    STAGED = "staged", _("Staged")  # its bytes are in the store, its job is not yet finished
    PUBLISHED = "published", _("Published")  # verified; may be evaluated, approved, deployed
    RETIRED = "retired", _("Retired")  # a person withdrew it
    CORRUPT = "corrupt", _("Corrupt")  # its bytes no longer match their digests


class DeploymentState(TextChoices):
    REQUESTED = "requested", _("Requested")  # the pointer moved; no server has reported yet
    LOADING = "loading", _("Loading")  # a server verifies and loads it beside the one that answers
    LIVE = "live", _("Live")  # a server confirmed that it answers from it
    SUPERSEDED = "superseded", _("Superseded")  # a later deployment took its place
    ROLLED_BACK = "rolled_back", _("Rolled back")  # a rollback took its place
    REFUSED = "refused", _("Refused")  # a server would not load it: digests, shapes or numbers are wrong


class DeploymentKind(TextChoices):
    FULL_PRECISION = "full_precision", _("Full precision")  # the uncompressed variant, by an ordinary deployment
    COMPRESSED = "compressed", _("Compressed")  # an approved artifact on its base
    ROLLBACK = "rollback", _("Rollback to full precision")


class ApprovalState(TextChoices):
    PENDING = "pending", _("Waiting for approval")
    APPROVED = "approved", _("Approved")
    REJECTED = "rejected", _("Rejected")
    REVOKED = "revoked", _("Revoked")  # a manager took the approval back
    EXPIRED = "expired", _("Expired")  # nobody decided in time: it may be asked again


class SweepState(TextChoices):
    LOOKING = "looking", _("Looking")  # a worker has been asked to look through the store
    PREVIEWED = "previewed", _("Preview")  # what could be freed is written down; nobody has asked to free it
    REQUESTED = "requested", _("Requested")  # a person asked to free exactly that
    RUNNING = "running", _("Running")  # a worker frees it, part by part
    DONE = "done", _("Done")  # and says how much really went


class SweepKind(TextChoices):
    LEFTOVER = "leftover", _("Leftovers of broken attempts")  # nothing in the database leads to it
    INTERMEDIATE = "intermediate", _("Intermediate results of old jobs")  # computed again if ever needed
    RETIRED = "retired", _("Withdrawn artifacts")  # and no environment stands on one of them
    RELEASED = "released", _("Weights kept as escrow")  # a person gave them up; the escrow brings them back


class DamageKind(TextChoices):
    DAMAGED = "damaged", _("Damaged")  # the bytes do not match their digest
    MISSING = "missing", _("Missing")  # a row needs it and the store has it not


class Role(TextChoices):
    VIEWER = "viewer", _("Viewer")  # sees everything, changes nothing
    ENGINEER = "engineer", _("Engineer")  # imports, queues jobs, evaluates, asks for approval
    MANAGER = "manager", _("Manager")  # approves or rejects what others ask for
    OPS = "ops", _("Operations")  # deploys what is approved, rolls back
    ADMIN = "admin", _("Administrator")  # users, policy, clean-up


ATTEMPTS_PER_CAUSE = 3
"""An attempt that errored, was killed or was lost is repeated until one cause has struck this often."""

JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.DRAFT: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.BLOCKED, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.VERIFYING, JobState.QUEUED, JobState.BLOCKED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD}
    ),
    JobState.VERIFYING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.DEAD, JobState.CANCELLED}),
    JobState.BLOCKED: frozenset(
        {JobState.QUEUED, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED, JobState.DEAD}
    ),
}

DEPLOYMENT_TRANSITIONS: dict[DeploymentState, frozenset[DeploymentState]] = {
    DeploymentState.REQUESTED: frozenset(set(DeploymentState) - {DeploymentState.REQUESTED}),
    DeploymentState.LOADING: frozenset(
        {DeploymentState.LIVE, DeploymentState.REFUSED, DeploymentState.SUPERSEDED, DeploymentState.ROLLED_BACK}
    ),
    DeploymentState.LIVE: frozenset({DeploymentState.SUPERSEDED, DeploymentState.ROLLED_BACK, DeploymentState.REFUSED}),
    # A server that refused may load it after all, once its disk or its memory is put right.
    DeploymentState.REFUSED: frozenset({DeploymentState.LIVE, DeploymentState.SUPERSEDED, DeploymentState.ROLLED_BACK}),
}


SWEEP_TRANSITIONS: dict[SweepState, frozenset[SweepState]] = {
    SweepState.LOOKING: frozenset({SweepState.PREVIEWED}),
    SweepState.PREVIEWED: frozenset({SweepState.REQUESTED}),
    SweepState.REQUESTED: frozenset({SweepState.RUNNING}),
    SweepState.RUNNING: frozenset({SweepState.DONE}),
}


def sweep_next(state: SweepState | str, target: SweepState) -> SweepState:
    """``target`` when a clean-up in ``state`` may go there; raises :class:`Refused` otherwise."""
    present = SweepState(state)
    if target not in SWEEP_TRANSITIONS.get(present, frozenset()):
        raise Refused(f"a clean-up that is {present.value} cannot become {target.value}")
    return target


def job_next(state: JobState | str, target: JobState) -> JobState:
    """``target`` when a job in ``state`` may go there; raises :class:`Refused` otherwise."""
    present = JobState(state)
    if target not in JOB_TRANSITIONS.get(present, frozenset()):
        raise Refused(f"a job that is {present.value} cannot become {target.value}")
    return target


def deployment_next(state: DeploymentState | str, target: DeploymentState) -> DeploymentState:
    """``target`` when a deployment in ``state`` may go there; raises :class:`Refused` otherwise."""
    present = DeploymentState(state)
    if target not in DEPLOYMENT_TRANSITIONS.get(present, frozenset()):
        raise Refused(f"a deployment that is {present.value} cannot become {target.value}")
    return target
