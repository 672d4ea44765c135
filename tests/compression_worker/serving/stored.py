"""A base, a variant and an artifact in a store, made through the steps of a job, and what each answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from compression_worker.contracts import PlannedStep, StepOutput, StepSpec
from compression_worker.runner import run_plan
from compression_worker.serving.generation import Sampling, generate
from compression_worker.serving.loading import Loader
from compression_worker.serving.variants import Resident
from compression_worker.store import Store
from tests.tiny import make_tiny_pair

PROMPTS = ["The quick", "A delta is", "one bit of it", "very little", "the lazy dog"]
GREEDY = Sampling(max_tokens=24, temperature=0.0)


@dataclass(frozen=True)
class Models:
    """What lies in the store, and what each digest says to the prompt on which the two differ."""

    store: Store
    base: StepOutput
    variant: StepOutput
    artifact: StepOutput
    prompt: str
    answers: dict[str, str]

    @property
    def variant_digest(self) -> str:
        return str(self.variant.data["checkpoint"])

    @property
    def base_digest(self) -> str:
        return str(self.base.data["checkpoint"])

    @property
    def artifact_digest(self) -> str:
        return str(self.artifact.data["artifact"])


def make_models(folder: Path) -> Models:
    """Import a tiny pair and compress it, through the same steps as a job."""
    make_tiny_pair(folder / "imports", hidden=64)
    store = Store(folder / "store")
    roots = {"imports": folder / "imports"}
    base = run_plan(store, _import("base", {}), import_roots=roots, device="cpu")
    inputs = {"base": base.data["checkpoint"]}
    variant = run_plan(store, _import("variant", inputs), import_roots=roots, device="cpu")
    plan = StepSpec(
        kind="bitdelta.plan",
        params={"config": {"distill_steps": 0}},
        inputs=inputs | {"variant": variant.data["checkpoint"]},
    )
    artifact = run_plan(store, plan, device="cpu")
    torch.use_deterministic_algorithms(False)
    return _with_answers(Models(store, base, variant, artifact, "", {}))


def _import(name: str, inputs: dict[str, str]) -> PlannedStep:
    params = {"root": "imports", "folder": name, "licence": "Apache-2.0"}
    return PlannedStep(name=name, kind="checkpoint.import", params=params, inputs=inputs)


def _with_answers(models: Models) -> Models:
    """Choose a prompt on which full precision and the artifact part, and keep both answers."""
    loader = Loader(models.store)
    residents = [
        loader.full_precision(models.variant_digest, lambda: False),
        loader.compressed(models.artifact_digest, models.base_digest, lambda: False),
    ]
    for prompt in PROMPTS:
        answers = {resident.digest: greedy(resident, prompt) for resident in residents}
        if len(set(answers.values())) == 2:
            return Models(models.store, models.base, models.variant, models.artifact, prompt, answers)
    raise AssertionError("the compressed model answers every prompt as the variant does: choose others")


def greedy(resident: Resident, prompt: str) -> str:
    ids = resident.tokenizer.encode(prompt)
    return "".join(piece.text for piece in generate(resident.model, resident.tokenizer, ids, GREEDY))
