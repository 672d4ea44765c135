"""Rows whose bytes really lie in a store: checkpoints, artifacts and jobs of a few bytes each, as old as a test wants."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from django.utils import timezone

from compression_worker.contracts import StepOutput, canonical_json, sha256
from compression_worker.store import Store
from dashboard.lifecycle import ArtifactState, JobKind, JobState, StepState
from dashboard.models import Artifact, Checkpoint, Job, Step
from tests.factories import digest, make_artifact, make_checkpoint, make_job

OLD = timedelta(days=60)


class Shelf:
    """One store and what is put on it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def blob(self, words: str = "") -> str:
        return self.store.write_bytes(f"weights {words or digest()}".encode())

    def checkpoint(self, name: str, base: Checkpoint | None = None) -> Checkpoint:
        files = {file: {"sha256": self.blob(f"{name} {file}"), "size": 9} for file in ("model.safetensors", "config")}
        manifest = self.store.write_bytes(canonical_json({"name": name, "files": files}))
        return make_checkpoint(name, base, digest=manifest, manifest={"files": files})

    def artifact(self, variant: Checkpoint, name: str = "small", **fields: Any) -> Artifact:
        """Published by a job that made a layer and put the artifact together, long ago."""
        files = {file: {"sha256": self.blob(f"{name} {file}"), "size": 9} for file in ("codes", "raw")}
        manifest = self.store.write_bytes(canonical_json({"artifact": name, "files": files}))
        blobs = {"manifest.json": manifest, **{file: entry["sha256"] for file, entry in files.items()}}
        job = self.job([{"layer": self.blob(f"layer of {name}")}, blobs], variant=variant)
        return make_artifact(variant, job, name=name, digest=manifest, **{"state": ArtifactState.PUBLISHED, **fields})

    def job(
        self, outputs: list[dict[str, str]], state: JobState = JobState.SUCCEEDED, ago: timedelta = OLD, **fields: Any
    ) -> Job:
        """A job with one finished step for each of ``outputs``, all of them ``ago``."""
        ended = None if state in (JobState.RUNNING, JobState.QUEUED) else timezone.now() - ago
        job = make_job(JobKind.COMPRESS, state, finished_at=ended, **fields)
        for index, blobs in enumerate(outputs):
            self.step(job, index, blobs)
        return job

    def step(self, job: Job, index: int, blobs: dict[str, str], **fields: Any) -> Step:
        output = self.store.write_bytes(StepOutput(blobs=blobs, data={"step": index}).to_bytes())
        values = {"state": StepState.DONE, "key": sha256(f"{job.pk} {index}".encode()), "output": output}
        return Step.objects.create(job=job, index=index, name=f"step {index}", kind="k", **values | fields)

    def age(self, *digests: str, days: float = 30) -> None:
        """Make blobs look as if they were written ``days`` ago; without arguments, all of them."""
        then = timezone.now().timestamp() - 86_400 * days
        for one in digests or [blob.digest for blob in self.store.blobs()]:
            os.utime(self.store.path(one), (then, then))

    def files(self, thing: Artifact | Checkpoint) -> set[str]:
        """Every blob of an artifact or a checkpoint, its manifest included."""
        import json

        manifest = json.loads(self.store.read_bytes(thing.digest))
        return {thing.digest, *(entry["sha256"] for entry in manifest["files"].values())}

    def present(self) -> set[str]:
        return {blob.digest for blob in self.store.blobs()}

    def damage(self, digest: str) -> None:
        path = self.store.path(digest)
        path.chmod(0o644)
        with path.open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]))
