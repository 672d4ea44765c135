"""The last step of every method: every file hashed once more, the manifest, and what a job records of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from compression_worker import gate
from compression_worker.artifact import MANIFEST, Artifact, make_manifest
from compression_worker.checkpoints import VOCABULARY_FILES, Checkpoint
from compression_worker.contracts import CODE_VERSION, Json, StepContext, StepOutput
from compression_worker.faults import failpoint
from compression_worker.making.inputs import opened
from compression_worker.making.table import Weigh, base_entry, book, raw_entry
from compression_worker.making.threads import each
from compression_worker.tensors import Spec


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What a method hands over: its name and layout, table lines of its linears, figures, and how a line weighs.

    ``blobs`` are its own files, those of the rest step among them. ``libraries`` beside torch and safetensors decided
    the bytes. ``nominal_ratio`` is as the paper counts, where that is not by bytes. ``name_hint`` is what an artifact
    is called until a person says otherwise. ``own_side`` are files of the method's own (by digest) that stand in the
    place of the checkpoint's, or beside the weights as an index does.
    """

    method: str
    layout: Json
    lines: Mapping[str, Json]
    rest: StepOutput
    blobs: Mapping[str, str]
    figures: Json
    weigh: Weigh
    name_hint: str
    libraries: tuple[str, ...] = ()
    nominal_ratio: float | None = None
    own_side: Mapping[str, str] = field(default_factory=dict)


def assemble(context: StepContext, parcel: Parcel) -> StepOutput:
    """Hash every file of the artifact again, write its manifest, and say what a job records."""
    variant = opened(context, "variant")
    base = opened(context, "base") if "base" in context.spec.inputs else None
    side, shared = side_files(base, variant)
    blobs = {**parcel.blobs, **side, **parcel.own_side}
    for done, _ in enumerate(each()(context.store.verify, blobs.values()), start=1):
        context.progress(done, len(blobs), "files")
    files = {name: {"sha256": digest, "size": context.store.size(digest)} for name, digest in blobs.items()}
    raw = _manifest(context, parcel, base, variant, files, side, shared)
    failpoint("artifact.manifest")
    digest = context.store.write_bytes(raw)
    return StepOutput(blobs={**blobs, MANIFEST: digest}, data=_result(context, digest, parcel.name_hint))


def side_files(base: Checkpoint | None, variant: Checkpoint) -> tuple[dict[str, str], dict[str, Json]]:
    """The variant's files beside its weights: those to store, by digest, and vocabularies that are the base's own."""
    ours, theirs = base.manifest["files"] if base else {}, variant.manifest["files"]
    names = [name for name in theirs if not name.endswith(".safetensors") and name not in (gate.INDEX_FILE, MANIFEST)]
    shared = {name: theirs[name] for name in names if name in VOCABULARY_FILES and ours.get(name) == theirs[name]}
    return {name: theirs[name]["sha256"] for name in names if name not in shared}, shared


def _manifest(
    context: StepContext,
    parcel: Parcel,
    base: Checkpoint | None,
    variant: Checkpoint,
    files: Mapping[str, Json],
    side: Collection[str],
    shared: Mapping[str, Json],
) -> bytes:
    theirs = variant.manifest["tensors"]
    tensors = dict(parcel.lines) | dict(parcel.rest.data.get("rows", {}))
    for name, part in parcel.rest.data["raw"].items():
        tensors[name] = raw_entry(_spec(theirs[name]), part, theirs[name]["sha256"])
    for name in parcel.rest.data.get("base", []):
        tensors[name] = base_entry(_spec(theirs[name]), theirs[name]["sha256"])
    source = {"source_bytes": variant.manifest["weight_bytes"], "parameters": variant.manifest["parameters"]}
    return make_manifest(
        method=parcel.method,
        config=context.spec.params["config"],
        seed=context.spec.seed,
        base=_identity(base or variant),
        variant=_identity(variant),
        files=files,
        tensors=tensors,
        aliases=variant.manifest["aliases"],
        layout=parcel.layout,
        book=book(tensors, files, side, source, parcel.weigh, parcel.nominal_ratio),
        figures=parcel.figures,
        side_files=[*side, *shared],
        shared=shared,
        code_version=CODE_VERSION,
        libraries={name: version(name) for name in sorted({"safetensors", "torch", *parcel.libraries})},
    )


def _identity(checkpoint: Checkpoint) -> Json:
    """Which checkpoint is meant. An artifact that stands alone names the same one twice."""
    return {"fingerprint": checkpoint.fingerprint, "checkpoint": checkpoint.digest}


def _result(context: StepContext, digest: str, name_hint: str) -> Json:
    """What the dashboard records of the artifact."""
    artifact = Artifact.open_store(context.store, digest)
    summary = artifact.summary()
    return {
        "artifact": digest,
        "name_hint": name_hint,
        "ledger": summary.pop("parts"),
        "figures": artifact.manifest["figures"],
        **summary,
    }


def _spec(tensor: Json) -> Spec:
    return Spec(tensor["dtype"], tuple(tensor["shape"]))
