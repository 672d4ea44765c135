"""The steps of an escrow: plan, encode a group of tensors, assemble and prove it; and the way back, restore.

Each is pure and reads and writes the store by digest. Encoding holds one chunk of a tensor with its base; codes wait in
a file without a name until their sizes are known. The last step decodes everything again and compares each file's
digest before it says that there is an escrow.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, BinaryIO

from compression_worker.checkpoints import MANIFEST, Checkpoint
from compression_worker.contracts import (
    CODE_VERSION,
    CompressionError,
    Json,
    PlannedStep,
    StepContext,
    StepOutput,
)
from compression_worker.escrow import coding, layout
from compression_worker.escrow.estimate import GROUP_BYTES
from compression_worker.escrow.files import WeightFiles, tensor_file, write_codes
from compression_worker.escrow.rebuilding import Rebuilder
from compression_worker.faults import failpoint
from compression_worker.store import Store


def plan_step(context: StepContext) -> StepOutput:
    """Say how each tensor is to be stored, and list the steps. Reads no weight."""
    inputs = {name: context.spec.inputs[name] for name in ("base", "variant")}
    base, variant = (Checkpoint.open(context.store, inputs[name]) for name in ("base", "variant"))
    lines = tensor_lines(base.manifest, variant.manifest)
    _say_what_differs(context, lines)
    coded = [name for name, line in lines.items() if line["kind"] in (layout.DIFFERENCE, layout.PLAIN)]
    steps = [
        PlannedStep(
            name=f"tensors {first + 1} to {first + len(names)}",
            kind="escrow.encode",
            group="encode",
            params={
                "file": f"codes-{at:05d}.safetensors",
                "tensors": {name: lines[name] for name in names},
                "weights": sum(layout.elements(variant.manifest["tensors"][name]) for name in names),
                "chunk_elements": coding.CHUNK_ELEMENTS,
            },
            inputs=inputs,
        )
        for at, (first, names) in enumerate(_groups(coded, variant.manifest["tensors"]))
    ]
    groups = {f"group-{at}": f"@{at}" for at in range(len(steps))}
    others = {name: line for name, line in lines.items() if name not in set(coded)}
    last = PlannedStep(
        name="assemble",
        kind="escrow.assemble",
        group="assemble",
        params={"groups": list(groups), "tensors": others, "chunk_elements": coding.CHUNK_ELEMENTS},
        inputs=inputs | groups,
    )
    return StepOutput(data={"tensors": len(lines), "coded": len(coded)}, steps=(*steps, last))


def encode_step(context: StepContext) -> StepOutput:
    """Code a group of tensors into one file; each is compared with its digest while it is read."""
    params = context.spec.params
    base, variant = (Checkpoint.open(context.store, context.spec.inputs[name]) for name in ("base", "variant"))
    sizes, done = dict[str, int](), 0
    with WeightFiles() as files, _spool(context.store) as spool:
        for name, line in params["tensors"].items():
            sizes[name] = 0
            for code, count in _codes(files, base, variant, name, line, params["chunk_elements"]):
                spool.write(code)
                sizes[name] += len(code)
                done += count
                context.progress(done, params["weights"], "weights")
        spool.seek(0)
        with context.store.writer() as blob:
            header = write_codes(blob, sizes, spool)
    lines = {name: line | {"file": params["file"]} for name, line in params["tensors"].items()}
    return StepOutput(blobs={params["file"]: blob.digest}, data={"tensors": lines, "header_bytes": header})


def assemble_step(context: StepContext) -> StepOutput:
    """Put the escrow together, then rebuild every file from it and compare digests: only then is it one."""
    base, variant = (Checkpoint.open(context.store, context.spec.inputs[name]) for name in ("base", "variant"))
    groups = [context.input(name) for name in context.spec.params["groups"]]
    blobs = {name: digest for group in groups for name, digest in group.blobs.items()}
    blobs |= {name: e["sha256"] for name, e in variant.manifest["files"].items() if not layout.is_weights(name)}
    blobs |= {layout.CHECKPOINT: variant.digest, layout.HEADERS: _headers(context.store, variant)}
    tensors = dict(context.spec.params["tensors"])
    for group in groups:
        tensors |= group.data["tensors"]
    raw = layout.make_manifest(
        base=base,
        variant=variant,
        files={name: {"sha256": digest, "size": context.store.size(digest)} for name, digest in blobs.items()},
        tensors=tensors,
        chunk_elements=context.spec.params["chunk_elements"],
        header_bytes=sum(group.data["header_bytes"] for group in groups),
        code_version=CODE_VERSION,
        libraries={name: version(name) for name in ("constriction", "numpy")},
    )
    failpoint("escrow.manifest")
    digest = context.store.write_bytes(raw)
    escrow = layout.Escrow.open_store(context.store, digest)
    _prove(context, escrow, base)
    summary = escrow.summary()
    context.log(f"{summary['true_ratio']:.2f} times smaller; every file was rebuilt and has its digest", "info")
    data = {"escrow": digest, "variant": variant.digest, "base": base.digest, **summary}
    return StepOutput(blobs={**blobs, layout.MANIFEST: digest}, data=data)


def restore_step(context: StepContext) -> StepOutput:
    """Put the weights of the checkpoint back into the store, out of the inputs ``escrow`` and ``base``.

    The small files and the checkpoint's manifest are files of the escrow, so they are there. A weight file that is
    there and whole stays, which is how a second attempt goes on where the first was killed.
    """
    escrow = layout.Escrow.open_store(context.store, context.spec.inputs["escrow"])
    base = Checkpoint.open(context.store, context.spec.inputs["base"])
    files = escrow.checkpoint["files"]
    advance = _counter(context, escrow.checkpoint["weight_bytes"])
    with Rebuilder(escrow, base, advance) as rebuilder:
        for name in escrow.weight_files:
            if _is_there(context.store, files[name]["sha256"]):
                advance(files[name]["size"])
                continue
            with context.store.writer() as blob:
                rebuilder.write(name, blob)
            failpoint("escrow.restored")
    checkpoint = escrow.manifest["variant"]["checkpoint"]
    blobs = {name: entry["sha256"] for name, entry in files.items()} | {MANIFEST: checkpoint}
    data = {"restored": checkpoint, "files": len(files), "bytes": escrow.checkpoint["size_bytes"]}
    return StepOutput(blobs=blobs, data=data)


def tensor_lines(base: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Json]:
    """How each tensor of the variant is to be stored, in the order of their names."""
    lines: dict[str, Json] = {}
    first_of: dict[tuple[str, str], str] = {}
    for name, tensor in sorted(variant["tensors"].items()):
        layout.check_dtype(name, tensor["dtype"])
        same = first_of.setdefault((tensor["sha256"], tensor["dtype"]), name)
        lines[name] = {"kind": layout.COPY, "of": same} if same != name else _line(base, name, tensor)
    return lines


def _line(base: Mapping[str, Any], name: str, tensor: Json) -> Json:
    source = name if name in base["tensors"] else dict(base["aliases"]).get(name, "")
    other = base["tensors"].get(source)
    if other is None or other["dtype"] != tensor["dtype"]:
        return {"kind": layout.PLAIN}
    if (other["sha256"], layout.elements(other)) == (tensor["sha256"], layout.elements(tensor)):
        return {"kind": layout.BASE, "of": source}
    if other["shape"][1:] != tensor["shape"][1:]:
        return {"kind": layout.PLAIN}
    # Rows that were added, as for a larger vocabulary, come last and are the only ones without a base.
    shared = min(layout.elements(other), layout.elements(tensor))
    return {"kind": layout.DIFFERENCE, "of": source, "shared": shared}


def _groups(names: list[str], tensors: Mapping[str, Json]) -> Iterator[tuple[int, list[str]]]:
    """First index and names of groups of at most :data:`GROUP_BYTES` (more only for a tensor that is larger itself)."""
    group: list[str] = []
    room = GROUP_BYTES
    for at, name in enumerate(names):
        size = layout.elements(tensors[name]) * coding.LAYOUTS[tensors[name]["dtype"]].width
        if group and size > room:
            yield at - len(group), group
            group, room = [], GROUP_BYTES
        group.append(name)
        room -= size
    if group:
        yield len(names) - len(group), group


def _say_what_differs(context: StepContext, lines: Mapping[str, Json]) -> None:
    plain = [name for name, line in lines.items() if line["kind"] == layout.PLAIN]
    same = sum(line["kind"] in (layout.BASE, layout.COPY) for line in lines.values())
    context.log(f"{len(lines):,} tensors, {same:,} of them equal to one that is kept already", "info")
    if plain:
        context.log(
            f"{len(plain)} tensors have none of their name, shape and dtype in the base and are coded without it: "
            f"{plain[0]} …",
            "warning",
        )


def _codes(
    files: WeightFiles, base: Checkpoint, variant: Checkpoint, name: str, line: Json, chunk_elements: int
) -> Iterator[tuple[bytes, int]]:
    """The codes of a tensor's chunks, each with how many weights it holds."""
    facts, hasher = variant.manifest["tensors"][name], hashlib.sha256()
    dtype, source = facts["dtype"], tensor_file(files, variant, name)
    width = coding.LAYOUTS[dtype].width
    for start, count, has_base in layout.pieces(layout.elements(facts), line.get("shared", 0), chunk_elements):
        weights, other = source.read(name, start * width, count * width), None
        hasher.update(weights)
        if has_base:
            other = tensor_file(files, base, line["of"]).read(line["of"], start * width, count * width)
        ours = coding.patterns(other, dtype) if other is not None else None
        yield coding.encode(coding.patterns(weights, dtype), ours, dtype), count
    if hasher.hexdigest() != facts["sha256"]:
        raise CompressionError("damaged_tensor", f"tensor '{name}' does not match its digest: import it again")


def _spool(store: Store) -> BinaryIO:
    """A file without a name on the store's file system: it is gone with this process, however that ends."""
    folder = store.root / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def _headers(store: Store, variant: Checkpoint) -> str:
    """The first bytes of each weight file, as they are; the digest of the file that holds them."""
    sizes: dict[str, int] = {}
    with WeightFiles() as files, _spool(store) as spool:
        for name, entry in variant.manifest["files"].items():
            if layout.is_weights(name):
                header = files.at(store.path(entry["sha256"])).header
                sizes[name] = spool.write(header)
        spool.seek(0)
        with store.writer() as blob:
            write_codes(blob, sizes, spool)
    return blob.digest


class _Nowhere:
    def write(self, data: bytes | memoryview, /) -> int:
        return len(data)


def _prove(context: StepContext, escrow: layout.Escrow, base: Checkpoint) -> None:
    """Hash every file of the escrow and rebuild every weight file; raises where one is not as it was."""
    advance = _counter(context, escrow.checkpoint["weight_bytes"])
    with Rebuilder(escrow, base, advance) as rebuilder:
        for name in escrow.weight_files:
            rebuilder.write(name, _Nowhere())


def _counter(context: StepContext, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        context.progress(done, total, "bytes")

    return advance


def _is_there(store: Store, digest: str) -> bool:
    try:
        store.verify(digest)
    except CompressionError:
        return False
    return True
