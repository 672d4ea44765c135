"""Rows of ours: artifacts that the project's own command line makes, as ``rows.toml`` lists them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compression_worker import catalog
from compression_worker.artifact import MANIFEST, Artifact, load_model
from compression_worker.contracts import CODE_VERSION, canonical_json, sha256
from tests.benchmarks.delta_peers.pair import Pair, words_for_parts

PROJECT = Path(__file__).parents[3]
ROWS = Path(__file__).with_name("rows.toml")
WHOLE = 0.9
"""The share of its source bytes from which a part counts as kept as it is."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One artifact to make: a method of the catalogue and its settings. ``calibrated`` rows get the calibration text.

    ``peers``: whether peers are made as large as it; a row without them is measured and gets no verdict, unless its
    size is about that of a row with them.
    """

    name: str
    method: str
    set: tuple[str, ...]
    calibrated: bool = False
    peers: bool = True


class Refused(Exception):
    """The command line would not make the artifact of a row; the message is its own."""


def listed(path: Path, steps: int) -> list[Row]:
    """The rows of a file; ``{steps}`` in a setting becomes ``steps``."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["rows"]
    return [Row(**row | {"set": tuple(one.format(steps=steps) for one in row["set"])}) for row in rows]


def known(row: Row) -> bool:
    """Whether this version has the method."""
    return row.method in catalog.METHODS


def folder_name(row: Row, pair: Pair, text: Path) -> str:
    """A name for all that decides a row's artifact: the pair, the method and its settings, the calibration text."""
    calibration = sha256(text.read_bytes()) if row.calibrated else ""
    parts = [pair.base.fingerprint, pair.variant.fingerprint, row.method, *row.set, calibration]
    return f"{row.method}-{sha256(canonical_json(parts))[:16]}"


def made_before(out: Path) -> bool:
    """Whether ``out`` has the artifact of an earlier run. Refuses one of another version of the code."""
    if not (out / MANIFEST).is_file():
        return False
    if Artifact.open_folder(out).manifest["code_version"] != CODE_VERSION:
        raise Refused(f"'{out}' was made by another version of the code: remove it")
    return True


def make(row: Row, base: Path, variant: Path, text: Path, out: Path) -> Artifact:
    """Run ``compress`` for a row, unless ``out`` has its artifact; the artifact, which is as large as it says."""
    if not made_before(out):
        compress(row, base, variant, text, out)
    artifact = Artifact.open_folder(out)
    said, found = artifact.summary()["artifact_bytes"], sum(path.stat().st_size for path in out.iterdir())
    if found != said:
        raise Refused(f"the artifact says {said:,} bytes and has {found:,}")
    return artifact


def compress(row: Row, base: Path, variant: Path, text: Path, out: Path) -> None:
    command = [sys.executable, "-m", "compression_worker", "compress", row.method, "--json", "--device", "cpu"]
    command += ["--base", str(base.absolute()), "--model", str(variant.absolute()), "--out", str(out.absolute())]
    command += ["--data", str(text.absolute())] if row.calibrated else []
    command += [part for setting in row.set for part in ("--set", setting)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")


def model(artifact: Artifact, pair: Pair) -> Any:
    """The model that the artifact stands for, in fp32."""
    return load_model(pair.base, artifact, "cpu", torch.float32)


def part_bytes(artifact: Artifact, *names: str) -> int:
    """Bytes of the named parts of the artifact's ledger."""
    return int(sum(part["bytes"] for part in artifact.parts if part["name"] in names))


def kept_words(artifact: Artifact, pair: Pair) -> str:
    """Which parts the artifact stores as they are, as its ledger shows it."""
    kept = set()
    for part in ("embeddings", "head", "norms", "biases"):
        source = pair.part_bytes(frozenset({part}))
        if source and part_bytes(artifact, part) >= WHOLE * source:
            kept.add(part)
    return words_for_parts(kept)


def side_bytes(artifacts: list[Artifact], pair: Pair) -> int:
    """What config, tokenizer and the like cost every peer: the least that any artifact of ours pays for them."""
    return min([pair.side_bytes, *(part_bytes(artifact, "side files") for artifact in artifacts)])
