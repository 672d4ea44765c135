"""``manage.py walk BASE VARIANT``: two folders of the import root ``imports``, through the whole loop, as you watch.

Imports both, compresses the variant with BitDelta, evaluates base, variant and artifact, and asks for approval. Each
part waits for the one before. Whatever is there already under the same name is used as it is.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from dashboard.lifecycle import JobState, Refused, Role
from dashboard.models import Artifact, Checkpoint, Job, SampleSet, User
from dashboard.services.approvals import approval_request
from dashboard.services.evaluations import evaluation_create
from dashboard.services.jobs import compression_create
from dashboard.services.registry import checkpoint_import


class Command(BaseCommand):
    help = "Walk two checkpoint folders through import, BitDelta, evaluation and the request for approval."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("base", help="folder of the base model below the import root 'imports'")
        parser.add_argument("variant", help="folder of its fine-tuned variant there")
        parser.add_argument("--as", dest="username", default="", help="an engineer; default: the demo's")
        parser.add_argument("--demo", action="store_true", help="mark what is made as part of the demo")
        parser.add_argument("--text-set", default="", help="sample set to measure on")
        parser.add_argument("--calibration", default="", help="sample set to distil the scales on")
        parser.add_argument("--distill-steps", type=int, default=200)

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            self._walk(options)
        except Refused as refusal:
            raise CommandError(str(refusal)) from None

    def _walk(self, options: dict[str, Any]) -> None:
        actor = _engineer(options["username"])
        base = self._imported(actor, options["base"], None, options["demo"])
        variant = self._imported(actor, options["variant"], base, options["demo"])
        calibration = _sample_set(options["calibration"])
        config = {"distill_steps": options["distill_steps"]}
        artifact = self._follow(
            compression_create(actor=actor, method="bitdelta", variant=variant, config=config, calibration=calibration)
        ).artifact
        self._tell_size(artifact)
        evaluation = self._follow(
            evaluation_create(
                actor=actor, variant=variant, artifact=artifact, text_set=_sample_set(options["text_set"])
            )
        ).evaluation
        self._tell_figures(evaluation.results)
        approval = approval_request(actor=actor, artifact=artifact, evaluation=evaluation)
        self.stdout.write(f"Approval #{approval.pk} is asked for; a manager decides on its page.")

    def _imported(self, actor: User, folder: str, base: Checkpoint | None, is_demo: bool) -> Checkpoint:
        if not Checkpoint.objects.filter(name=folder).exists():
            self._follow(
                checkpoint_import(actor=actor, root="imports", folder=folder, name=folder, base=base, is_demo=is_demo)
            )
        return Checkpoint.objects.get(name=folder)

    def _follow(self, job: Job) -> Job:
        """Wait until ``job`` has ended, and say what each finished step was."""
        self.stdout.write(f"{job} …")
        started, told = time.monotonic(), 0
        while not job.is_terminal:
            time.sleep(1)
            job.refresh_from_db()
            done = list(job.steps.filter(state="done").values_list("name", flat=True))
            if len(done) > told:
                self.stdout.write(f"  {len(done)} of {job.steps.count()} steps done: {done[-1]}")
                told = len(done)
        seconds = time.monotonic() - started
        if job.state != JobState.SUCCEEDED:
            raise CommandError(f"{job} is {job.get_state_display()} after {seconds:.0f} s: {job.error}")
        self.stdout.write(f"  finished after {seconds:.0f} s")
        return job

    def _tell_size(self, artifact: Artifact) -> None:
        self.stdout.write(
            f"  {artifact.source_bytes:,} bytes became {artifact.artifact_bytes:,}: "
            f"{artifact.true_ratio:.2f} times smaller ({artifact.nominal_ratio:.2f} as the paper counts)"
        )

    def _tell_figures(self, results: dict[str, Any]) -> None:
        for metric in results["metrics"]:
            values = {target: value["value"] for target, value in metric["values"].items() if value}
            words = ", ".join(f"{target} {value:.4g}" for target, value in values.items())
            self.stdout.write(f"  {metric['name']}: {words}")


def _engineer(username: str) -> User:
    people = User.objects.filter(is_active=True, role=Role.ENGINEER)
    person = people.filter(username=username).first() if username else people.filter(is_demo=True).first()
    if person is None:
        raise CommandError("there is no such engineer: name one with --as, or seed the demo first")
    return person


def _sample_set(name: str) -> SampleSet | None:
    if not name:
        return None
    found = SampleSet.objects.filter(name=name).order_by("-version").first()
    if found is None:
        raise CommandError(f"there is no sample set '{name}'")
    return found
