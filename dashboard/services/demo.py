"""The demo: people, sample sets and environments at once, then jobs one after another as their results arrive.

Nothing remembers how far the demo has come: ``demo_advance`` looks at the rows and queues what is missing next. It
may be called at any time, by anybody and twice at once, so a restart loses nothing.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import ObjectDoesNotExist, PermissionDenied
from django.db import connection
from django.db.models import QuerySet
from django.utils.translation import gettext as _

from dashboard.lifecycle import JobKind, Refused, Role
from dashboard.models import Approval, Artifact, Checkpoint, Environment, Evaluation, Job, Policy, SampleSet, User
from dashboard.services.accounts import user_create
from dashboard.services.approvals import approval_request, policy_create
from dashboard.services.evaluations import evaluation_create, sample_set_create
from dashboard.services.jobs import compression_create
from dashboard.services.registry import checkpoint_import
from dashboard.services.releases import deployment_full_precision, environment_create
from dashboard.services.units import unit_of_work

log = logging.getLogger(__name__)

SETS = Path(settings.ROOT) / "deploy" / "demo" / "sets"
PEOPLE = {
    "erin": Role.ENGINEER,
    "mona": Role.MANAGER,
    "oscar": Role.OPS,
    "ada": Role.ADMIN,
    "vera": Role.VIEWER,
}
ENVIRONMENTS = {"staging": "shakespeare-staging", "production": "shakespeare"}
TEXT_SET, CHOICE_SET, CALIBRATION_SET = "shakespeare-heldout", "shakespeare-next-line", "shakespeare-calibration"
SAMPLE_SETS = {
    TEXT_SET: ("text", "Tiny Shakespeare, the last tenth"),
    "word-problems-heldout": ("text", "Grade School Math, test rows"),
    CALIBRATION_SET: ("text", "Tiny Shakespeare, from the training text"),
    "word-problems-calibration": ("text", "Grade School Math, training rows"),
    CHOICE_SET: ("choice", "Tiny Shakespeare, the last tenth"),
}
BASE, VARIANT = "demo-base", "demo-shakespeare"
LICENCE = "Apache-2.0"
SHORT_STEPS, LONG_STEPS = 50, 4000
"""Of distillation: the first ends within a minute or two, the second is there to be watched, stopped or killed."""
LEARNING_RATE = 3e-4
"""Three times the published one: it suits a model this small."""
LONG_PRIORITY = -10
"""Whatever a newcomer queues goes first."""
PROMPTS = "My lord, the king\nWhat, wilt thou\nO gentle lady, do not\nTom has 3 apples and buys"
RULES: list[dict[str, Any]] = [
    {"check": "perplexity_increase", "limit": 0.25, "severity": "block"},
    {"check": "kl_divergence", "limit": 0.3, "severity": "block"},
    {"check": "top1_agreement", "limit": 0.7, "severity": "warn"},
    {"check": "choice_accuracy_drop", "limit": 0.1, "severity": "warn"},
    {"check": "true_ratio", "limit": 3, "severity": "block"},
]
ADVISORY_LOCK = 0x64656D6F


@unit_of_work
def demo_seed() -> dict[str, str]:
    """Make what is missing of the demo, and queue its first job. Returns the passwords of the people just made."""
    passwords = _people_create()
    if not Policy.objects.exists():
        policy_create(actor=None, rules=RULES)
    for name, alias in ENVIRONMENTS.items():
        if not Environment.objects.filter(name=name).exists():
            environment_create(actor=None, name=name, alias=alias)
    engineer = _person(Role.ENGINEER)
    for name, (kind, origin) in SAMPLE_SETS.items():
        if not SampleSet.objects.filter(name=name).exists():
            data = (SETS / f"{name}.jsonl").read_bytes()
            sample_set_create(actor=engineer, name=name, kind=kind, data=data, origin=origin, bundled=True)
    _advance()
    return passwords


def _people_create() -> dict[str, str]:
    passwords = {}
    for wanted, role in PEOPLE.items():
        if _people(role).exists():
            continue
        # The name may be a real person's, or of one whom an earlier removal had to keep.
        name = f"demo-{wanted}-{secrets.token_hex(2)}" if User.objects.filter(username=wanted).exists() else wanted
        passwords[name] = secrets.token_urlsafe(12)
        user_create(actor=None, username=name, password=passwords[name], role=role, is_demo=True)
    return passwords


@unit_of_work
def demo_new_passwords() -> dict[str, str]:
    """Other passwords for the demo's people, for when the first ones are lost."""
    passwords = {}
    for user in User.objects.filter(is_demo=True, is_active=True):
        passwords[user.username] = secrets.token_urlsafe(12)
        user.set_password(passwords[user.username])
        user.save(update_fields=["password"])
    return passwords


def demo_advance() -> None:
    """Queue what comes next in the demo; nothing where there is no demo, or no more to come."""
    try:
        _advance()
    except (Refused, PermissionDenied, ObjectDoesNotExist) as refusal:
        log.info("the demo does not go on: %s", refusal)


@unit_of_work
def _advance() -> None:
    if not User.objects.filter(is_demo=True, is_active=True).exists() or not _only_one():
        return
    for stage in STAGES:
        if not stage():
            return


def _only_one() -> bool:
    """Whether nobody else advances the demo right now; held until the transaction ends."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [ADVISORY_LOCK])
        row = cursor.fetchone()
    return bool(row and row[0])


def _base_imported() -> bool:
    return _imported(BASE, "base", None)


def _variant_imported() -> bool:
    return _imported(VARIANT, "variant", Checkpoint.objects.get(name=BASE))


def _imported(name: str, folder: str, base: Checkpoint | None) -> bool:
    if Checkpoint.objects.filter(name=name).exists():
        return True
    if not _asked(JobKind.IMPORT, spec__name=name):
        engineer = _person(Role.ENGINEER)
        checkpoint_import(actor=engineer, root="demo", folder=folder, name=name, base=base, licence=LICENCE)
    return False


def _full_precision_deployed() -> bool:
    production = Environment.objects.get(name="production")
    if production.generation == 0:
        deployment_full_precision(
            actor=_person(Role.OPS),
            environment=production,
            variant=Checkpoint.objects.get(name=VARIANT),
            reason="First release of the Shakespeare model, uncompressed until a compressed one is approved.",
            seen_generation=0,
        )
    return True


def _compressed() -> bool:
    if _artifact() is None and not _asked(JobKind.COMPRESS, spec__config__distill_steps=SHORT_STEPS):
        _compress(SHORT_STEPS, priority=0)
    return _artifact() is not None


def _evaluated() -> bool:
    artifact = _artifact()
    assert artifact is not None
    if Evaluation.objects.filter(artifact=artifact).exists():
        return True
    if not _asked(JobKind.EVALUATE):
        evaluation_create(
            actor=_person(Role.ENGINEER),
            variant=artifact.variant,
            artifact=artifact,
            text_set=_newest_set(TEXT_SET),
            choice_set=_newest_set(CHOICE_SET),
            config={"prompts": PROMPTS},
        )
    return False


def _approval_requested() -> bool:
    artifact = _artifact()
    assert artifact is not None
    if not Approval.objects.filter(artifact=artifact).exists():
        approval_request(
            actor=_person(Role.ENGINEER),
            artifact=artifact,
            evaluation=Evaluation.objects.filter(artifact=artifact).earliest("created_at"),
            note="A fifth of the size, and the verse still scans. Please look at the generations.",
        )
    return True


def _long_job_queued() -> bool:
    if not _asked(JobKind.COMPRESS, spec__config__distill_steps=LONG_STEPS):
        _compress(LONG_STEPS, priority=LONG_PRIORITY)
    return True


STAGES: tuple[Callable[[], bool], ...] = (
    _base_imported,
    _variant_imported,
    _full_precision_deployed,
    _compressed,
    _evaluated,
    _approval_requested,
    _long_job_queued,
)
"""Each says whether the next may begin, after having asked for what is missing."""


def _compress(distill_steps: int, *, priority: int) -> Job:
    return compression_create(
        actor=_person(Role.ENGINEER),
        method="bitdelta",
        variant=Checkpoint.objects.get(name=VARIANT),
        config={"distill_steps": distill_steps, "learning_rate": LEARNING_RATE},
        calibration=_newest_set(CALIBRATION_SET),
        priority=priority,
    )


def _artifact() -> Artifact | None:
    """The first that the short job published."""
    return (
        Artifact.objects.filter(variant__name=VARIANT, is_demo=True, config__distill_steps=SHORT_STEPS)
        .order_by("created_at")
        .first()
    )


def _asked(kind: JobKind, **spec: Any) -> bool:
    return Job.objects.filter(is_demo=True, kind=kind, **spec).exists()


def _newest_set(name: str) -> SampleSet:
    return SampleSet.objects.filter(name=name).latest("version")


def _person(role: Role) -> User:
    person = _people(role).first()
    if person is None:
        raise Refused(_("the demo has nobody in the role %(role)s any more") % {"role": role.label})
    return person


def _people(role: Role) -> QuerySet[User]:
    return User.objects.filter(is_demo=True, is_active=True, role=role).order_by("pk")
