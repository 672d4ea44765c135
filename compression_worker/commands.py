"""``compress``, ``escrow``, ``inspect``, ``verify``, ``restore`` of the command line: folders in, folders and JSON out.

A compression runs the same steps as a job does, against a store of its own that disappears afterwards.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from compression_worker import artifact as artifacts
from compression_worker.artifact import Artifact
from compression_worker.catalog import method
from compression_worker.checkpoints import Checkpoint, attach_folder
from compression_worker.contracts import CompressionError, Json, StepSpec
from compression_worker.escrow.layout import Escrow, is_escrow
from compression_worker.escrow.rebuilding import restore_folder
from compression_worker.runner import prepare_torch, run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import NoRoom, Store

Watch = Callable[[Json], None]


def compress(
    name: str,
    *,
    base: Path | None,
    model: Path,
    out: Path,
    config: Json,
    data: Path | None,
    seed: int,
    device: str,
    watch: Watch,
) -> Json:
    """Compress ``model`` into the new folder ``out``, against ``base`` where the method takes a difference.

    What ``inspect`` says of it. An adapter in ``model`` is merged into ``base`` first, whatever the method.
    """
    method(name).config_class()(**config)
    if base is None and method(name).needs_base:
        raise CompressionError(
            "missing_base", f"{method(name).label} compresses the difference from a base: name it with --base"
        )
    artifacts.require_new(out)
    with _workspace(out) as store, _plain_disk_error(out):
        under = {"base": _attached(store, base, watch)} if base else {}
        inputs = {"variant": _attached(store, model, watch, base=under.get("base", ""))}
        inputs |= under if method(name).needs_base else {}
        if data:
            inputs["calibration"] = store.write_bytes(_calibration(data))
        prepare_torch()
        plan = StepSpec(kind=f"{name}.plan", params={"config": config}, inputs=inputs, seed=seed)
        output = run_plan(store, plan, watch, device=device)
        artifacts.write_folder(out, store, output.blobs)
    return inspect(out)


def escrow(*, base: Path, model: Path, out: Path, watch: Watch) -> Json:
    """Keep the fine-tune in ``model`` bit for bit against ``base`` in the new folder ``out``; what ``inspect`` says."""
    artifacts.require_new(out)
    with _workspace(out) as store, _plain_disk_error(out):
        inputs = {"base": _attached(store, base, watch), "variant": _attached(store, model, watch)}
        output = run_plan(store, StepSpec(kind="escrow.plan", inputs=inputs), watch, device="cpu")
        artifacts.write_folder(out, store, output.blobs)
    return inspect(out)


def inspect(folder: Path) -> Json:
    """Method, sizes, ratios and fingerprints of an artifact or an escrow; reads its manifest alone."""
    return _opened(folder).summary()


def verify(folder: Path, base: Path | None) -> Json:
    """Whether every byte of the artifact is as it was written, and whether ``base`` is the base it was made against."""
    try:
        found = _opened(folder)
    except CompressionError as error:
        return {"ok": False, "problems": [error.message]}
    problems = found.problems() + _strangers(found, folder)
    if base:
        with _workspace(folder) as store:
            try:
                found.require_base(Checkpoint.open(store, attach_folder(store, base)))
            except CompressionError as error:
                problems.append(error.message)
    return {"ok": not problems, "problems": problems}


def restore(folder: Path, *, base: Path | None, out: Path, watch: Watch) -> Json:
    """Write the compressed model as a Hugging Face folder to ``out``; how many tensors and bytes it has.

    From an escrow it is the very checkpoint: each file has the digest that it had.
    """
    found = _opened(folder)
    artifacts.require_new(out)
    with _workspace(out) as store, _plain_disk_error(out):
        checkpoint = Checkpoint.open(store, _attached(store, base, watch)) if base else None
        if isinstance(found, Escrow):
            if checkpoint is None:
                raise CompressionError("missing_base", "an escrow is a difference from its base: name it with --base")
            restore_folder(found, checkpoint, out, _progress(watch))
        else:
            artifacts.restore(checkpoint, found, out, _progress(watch))
    size = sum(file.stat().st_size for file in out.iterdir())
    return {"out": str(out), "tensors": len(found.manifest["tensors"]), "bytes": size}


@contextlib.contextmanager
def _workspace(beside: Path) -> Iterator[Store]:
    """A store of this run, on the file system of ``beside``; it is gone afterwards, whatever happened."""
    parent = beside.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".deltaworks-", dir=parent)
    except OSError:
        folder = tempfile.mkdtemp(prefix="deltaworks-")
    try:
        yield Store(folder, durable=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _plain_disk_error(out: Path) -> Iterator[None]:
    try:
        yield
    except NoRoom as error:
        raise CompressionError(
            "disk_full", f"no room left beside '{out}' ({error}): free some and run again; nothing was left behind"
        ) from error


def _attached(store: Store, folder: Path, watch: Watch, *, base: str = "") -> str:
    watch({"type": "step", "name": f"reading {folder.name}", "group": "read", "index": 0, "total": 1})
    try:
        return attach_folder(store, folder, base=base, progress=_progress(watch))
    except CompressionError as error:
        raise CompressionError(error.code, f"'{folder}': {error.message}") from error


def _calibration(path: Path) -> bytes:
    try:
        return parse_samples(path.read_bytes(), TEXT).data
    except OSError as error:
        raise CompressionError("unreadable_file", f"'{path}' cannot be read: {error.strerror}") from error
    except CompressionError as error:
        raise CompressionError(error.code, f"'{path}': {error.message}") from error


def _progress(watch: Watch) -> Callable[[int, int, str], None]:
    return lambda done, total, unit: watch({"type": "progress", "done": done, "total": total, "unit": unit})


def _opened(folder: Path) -> Artifact | Escrow:
    return Escrow.open_folder(folder) if is_escrow(folder) else Artifact.open_folder(folder)


def _strangers(artifact: Artifact | Escrow, folder: Path) -> list[str]:
    known = {artifacts.MANIFEST, *artifact.manifest["files"]}
    return [f"'{path.name}' is no file of this artifact" for path in sorted(folder.iterdir()) if path.name not in known]
