"""A method that stands on another: it plans, reads and loads its packed base through the catalog.

An artifact of such a method holds every file of the base's artifact that it needs, and its manifest's ``layout`` says
under ``base`` which method made them, with which settings and layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module
from typing import Any

from compression_worker import catalog
from compression_worker.architecture import Architecture, describe
from compression_worker.artifact import Artifact
from compression_worker.contracts import Json, StepContext, StepOutput, StepSpec
from compression_worker.making.table import Weigh


def planned(context: StepContext, method: str, config: Any) -> StepOutput:
    """The plan of the base's method for the same model, text and seed; its last step makes the base's artifact."""
    kind = f"{method}.plan"
    spec = StepSpec(kind=kind, params={"config": asdict(config)}, inputs=context.spec.inputs, seed=context.spec.seed)
    return catalog.step_function(kind)(replace(context, spec=spec))


def packed_base(context: StepContext) -> Artifact:
    """The artifact that the step given as input ``packed`` made."""
    return Artifact.open_store(context.store, context.input("packed").data["artifact"])


def base_of(base: Artifact) -> Json:
    """What the manifest of an artifact on ``base`` says under ``base`` in its layout."""
    return {name: base.manifest[name] for name in ("method", "config", "layout")}


def as_base(artifact: Artifact, tensors: Mapping[str, Json]) -> Artifact:
    """The base of ``artifact`` as an artifact of its own method, with the table ``tensors``, from the same files."""
    return replace(
        artifact, manifest={**artifact.manifest, **artifact.manifest["layout"]["base"], "tensors": dict(tensors)}
    )


def implementation(base: Artifact) -> Any:
    """The module that reads ``base``: it has ``open_merged``, ``load_model`` and ``load_packed``."""
    return import_module(catalog.method(base.manifest["method"]).implementation)


def weigh_of(method: str) -> Weigh:
    """How a line of ``method`` weighs."""
    found: Weigh = catalog.load(f"compression_worker.methods.{method}.layout:weigh")
    return found


def architecture_of_artifact(artifact: Artifact) -> Architecture:
    """What the artifact's config.json promises, under the names of its table."""
    return describe(artifact.config).renamed_for(artifact.manifest["tensors"])
