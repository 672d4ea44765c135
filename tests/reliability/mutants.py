"""Planted bugs: each is put into a copy of the project, and the test that is named for it has to fail there.

``python -m tests.reliability.mutants`` first runs all named tests on an unchanged copy, which has to be green, then each
bug. They share a Postgres: a bug begins with a copy of the database that the unchanged copy made, but for one in a
migration, which makes its own. Exits 1 when one was not caught. ``--only`` takes parts of names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psycopg

from deploy.postgres import EmbeddedPostgres

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("compression_worker", "dashboard", "kernels", "templates", "deploy", "tests", "manage.py", "pyproject.toml")
SERVER_PASSWORD = "server-of-a-test-database"
OWNER_PASSWORD = "owner-of-copies"
SOUND = "test_sound"
FAILED = 1
"""pytest's exit status when tests ran and some failed; another one means that the copy could not even be tested."""
TOO_LATE = 124
SECONDS = 240
OF_A_TEST_RUN = frozenset(
    {
        "ARTIFACT_ROOT",
        "CELERY_BROKER_URL",
        "DATABASE_URL",
        "DJANGO_SETTINGS_MODULE",
        "IMPORT_ROOTS",
        "PGOPTIONS",
        "PLAIN_STATIC",
        "PYTEST_CURRENT_TEST",
        "SECRET_KEY",
        "STATIC_ROOT",
        "TEST_DATABASE_URL",
        "TRITON_INTERPRET",
    }
)
"""What a test run around us has set for itself: the tests in a copy make their own."""


@dataclass(frozen=True)
class Mutant:
    """One bug: in ``file``, ``old`` becomes ``new``; ``test`` has to see it."""

    name: str
    file: str
    old: str
    new: str
    test: str

    @property
    def is_migration(self) -> bool:
        return "/migrations/" in self.file


STEPS = "tests/dashboard/services/test_steps.py::"
RELEASES = "tests/dashboard/services/test_releases.py::"

MUTANTS = (
    Mutant(
        "no fence",
        "dashboard/services/steps.py",
        "Step.objects.filter(pk=claim.step_id, attempt=claim.attempt, state=StepState.RUNNING)",
        "Step.objects.filter(pk=claim.step_id, state=StepState.RUNNING)",
        STEPS + "test_an_old_claim_changes_nothing",
    ),
    Mutant(
        "the fence starts at 1 again",
        "dashboard/transitions.py",
        "number = step.attempt + 1",
        "number = 1",
        STEPS + "test_a_lost_worker_is_replaced_and_finished_steps_are_not_redone",
    ),
    Mutant(
        "the fence is the worker's name",
        "dashboard/services/steps.py",
        "Step.objects.filter(pk=claim.step_id, attempt=claim.attempt, state=StepState.RUNNING)",
        "Step.objects.filter(\n        pk=claim.step_id, state=StepState.RUNNING,\n"
        "        owner__in=Attempt.objects.filter(step_id=claim.step_id, number=claim.attempt).values('worker'),\n    )",
        STEPS + "test_a_worker_that_claims_again_does_not_write_under_its_old_number",
    ),
    Mutant(
        "blobs are not verified before they are reused",
        "compression_worker/runner.py",
        "for blob in output.blobs.values():\n            self.store.verify(blob)",
        "return",
        "tests/compression_worker/test_launcher.py::test_an_earlier_output_is_reused_only_while_every_byte_verifies",
    ),
    Mutant(
        "renamed before it is on the disk",
        "compression_worker/store.py",
        "                    if self.durable:\n                        os.fsync(file.fileno())\n",
        "",
        "tests/compression_worker/test_store.py::"
        "test_a_blob_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_counts",
    ),
    Mutant(
        "reported before it is stored",
        "compression_worker/runner.py",
        "digest = self.store.write_bytes(output.to_bytes())",
        "digest = __import__('hashlib').sha256(output.to_bytes()).hexdigest()",
        "tests/compression_worker/test_launcher.py::test_a_done_step_hands_over_its_output_and_its_events",
    ),
    Mutant(
        "no reconciler",
        "dashboard/services/reconciling.py",
        "for part in (_return_leases, _end_cancelled,",
        "for part in (_end_cancelled,",
        "tests/dashboard/services/test_reconciling.py::test_a_lapsed_lease_goes_back_and_wakes_somebody",
    ),
    Mutant(
        "a message that was handled counts as a step that is done",
        "dashboard/execution.py",
        'return Outcome(kind="errored", message=f"the worker could not run the step: {error!r}")',
        'return Outcome(kind="done", output="0" * 64)',
        "tests/dashboard/test_execution.py::test_an_error_in_the_parent_counts_as_an_attempt_with_its_reason",
    ),
    Mutant(
        "the pointer moves without a comparison",
        "dashboard/services/releases.py",
        "if present.generation != seen_generation:",
        "if False:",
        RELEASES + "test_a_rollback_of_what_somebody_else_moved_is_a_conflict",
    ),
    Mutant(
        "an approval is not bound to the artifact's digest",
        "dashboard/selectors/approvals.py",
        "(artifact.digest != approval.artifact_digest,",
        "(False,",
        "tests/dashboard/services/test_approvals.py::test_an_approval_falls_when_what_it_rests_on_changes",
    ),
    Mutant(
        "the role is checked outside of the transaction",
        "dashboard/services/units.py",
        "present = User.objects.select_for_update(no_key=True).filter(pk=actor.pk, is_active=True).first()",
        "present = actor",
        RELEASES + "test_a_role_taken_away_while_the_page_was_open_counts",
    ),
    Mutant(
        "who asks may approve",
        "dashboard/services/approvals.py",
        "if actor.pk == approval.requested_by_id:",
        "if False:",
        "tests/dashboard/services/test_approvals.py::test_who_asked_does_not_decide_even_as_a_manager_now",
    ),
    Mutant(
        "the way back of a deployment is not pinned",
        "dashboard/migrations/0001_initial.py",
        "related_name='deployments', to='dashboard.checkpoint')",
        "related_name='deployments', to='dashboard.checkpoint', db_constraint=False)",
        "tests/dashboard/models/test_constraints.py::"
        "test_the_way_back_of_a_deployment_is_pinned_by_the_deployment_alone",
    ),
    Mutant(
        "a server loads what it has not verified",
        "compression_worker/serving/loading.py",
        'self._store.verified_path(entry["sha256"])',
        "pass",
        "tests/compression_worker/serving/test_loading.py::test_random_damage_to_any_file_is_refused",
    ),
    Mutant(
        "a server goes back a generation",
        "compression_worker/serving/switch.py",
        "load = not self._rewound and (newer or due)",
        "load = True",
        "tests/compression_worker/serving/test_switch.py::"
        "test_a_pointer_that_went_back_is_refused_until_it_passes_what_was_seen",
    ),
    Mutant(
        "a cancel is kept in memory only",
        "dashboard/services/endings.py",
        'changing = ("state", "cancel_requested", ',
        'changing = ("state", ',
        "tests/dashboard/services/test_jobs.py::test_a_kill_is_not_lowered_to_a_stop",
    ),
    Mutant(
        "poison is not counted",
        "dashboard/transitions.py",
        "times = step.causes.get(ending.cause, 0) + 1",
        "times = 1",
        STEPS + "test_causes_are_counted_apart_and_the_third_of_one_is_the_end",
    ),
    Mutant(
        "a lease by the worker's own clock",
        "dashboard/services/steps.py",
        '        now=row["now"],\n        lease=',
        "        now=timezone.now(),\n        lease=",
        STEPS + "test_a_worker_whose_clock_is_wrong_neither_gains_nor_loses",
    ),
    Mutant(
        "history may be emptied",
        "dashboard/migrations/0007_history_is_never_emptied.py",
        "IS DISTINCT FROM 'yes'",
        "= 'never'",
        "tests/dashboard/models/test_constraints.py::test_history_is_never_emptied",
    ),
    Mutant(
        "a route without a rule",
        "dashboard/views/system.py",
        '@rule("page.view")\n@require_GET\ndef workers',
        "@require_GET\ndef workers",
        "tests/dashboard/views/test_pages.py::test_every_route_names_its_rule",
    ),
)


def copied(folder: Path) -> Path:
    """A copy of the project that may be broken. Compiled files come along: each counts only for a source of its time."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part)
        else:
            shutil.copy2(source, folder / part)
    return folder


def plant(mutant: Mutant, folder: Path) -> None:
    """Put the bug in; the place has to be there exactly once, so that a bug does not vanish with a rewrite."""
    path = folder / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise LookupError(f"'{mutant.name}': its place stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))


def run(folder: Path, tests: list[str], seconds: float, database: str) -> tuple[int, str]:
    """pytest's exit status in the copy, and its last words. A test database that is already there is kept and used."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_TEST_RUN}
    environment["TEST_DATABASE_URL"] = database
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--reuse-db", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return TOO_LATE, f"no answer within {seconds} s: that proves nothing"
    return done.returncode, "\n".join([*done.stdout.splitlines()[-15:], *done.stderr.splitlines()[-5:]])


def attempt(mutant: Mutant, number: int, postgres: EmbeddedPostgres) -> tuple[bool, str]:
    """Whether the bug was caught, and what pytest said."""
    name = f"bug_{number}"
    if not mutant.is_migration:
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE test_{name} TEMPLATE {SOUND} OWNER deltaworks")
    with tempfile.TemporaryDirectory(prefix="deltaworks-mutant-") as scratch:
        folder = copied(Path(scratch))
        plant(mutant, folder)
        status, words = run(folder, [mutant.test], SECONDS, postgres.url("deltaworks", name, OWNER_PASSWORD))
        # A failure of the test itself: a copy that cannot be set up ends as an error, and proves nothing.
        return status == FAILED and " failed" in words.splitlines()[-1], words


def all_caught(chosen: list[Mutant], at_once: int, postgres: EmbeddedPostgres) -> bool:
    """Run the tests without a bug, then with each; prints what came of it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="deltaworks-sound-") as scratch:
        database = postgres.url("deltaworks", SOUND.removeprefix("test_"), OWNER_PASSWORD)
        status, words = run(copied(Path(scratch)), sorted({mutant.test for mutant in chosen}), 600, database)
    if status:
        sys.stdout.write(f"the tests are not green without a bug:\n{words}\n")
        return False
    escaped = []
    with ThreadPoolExecutor(at_once) as pool:
        found = pool.map(attempt, chosen, range(len(chosen)), [postgres] * len(chosen))
        for mutant, (caught, words) in zip(chosen, found, strict=True):
            sys.stdout.write(
                f"{'caught ' if caught else 'ESCAPED'} {mutant.name} ({mutant.test.rpartition('::')[2]})\n"
            )
            sys.stdout.flush()
            if not caught:
                escaped.append(mutant.name)
                sys.stdout.write(words + "\n")
    seconds = time.monotonic() - began
    sys.stdout.write(f"mutants: {len(chosen) - len(escaped)} of {len(chosen)} caught, {seconds:.0f} s\n")
    return not escaped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names, comma separated")
    parser.add_argument("--at-once", type=int, default=max(1, os.cpu_count() or 1))
    args = parser.parse_args()
    parts = [part for part in args.only.split(",") if part]
    chosen = [mutant for mutant in MUTANTS if not parts or any(part in mutant.name for part in parts)]
    with tempfile.TemporaryDirectory(prefix="deltaworks-mutants-") as scratch:
        postgres = EmbeddedPostgres(Path(scratch) / "postgres", password="superuser-of-copies", durable=False)
        postgres.start()
        try:
            # The servers' role belongs to the whole cluster: its password is the one that tests know.
            postgres.ensure(database="unused", owner_password=OWNER_PASSWORD, server_password=SERVER_PASSWORD)
            return 0 if all_caught(chosen, args.at_once, postgres) else 1
        finally:
            postgres.stop()


if __name__ == "__main__":
    sys.exit(main())
