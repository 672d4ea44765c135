"""A coding for each matrix: the least loss that a size allows, or the smallest size that a divergence allows.

Three steps: :func:`sense_step` sees what errors cost (:mod:`compression_worker.deltas.sensitivity`),
:func:`measure_step` tries every option on every matrix of a block, :func:`choose_step` spends the bytes
(:mod:`compression_worker.deltas.budget`). For a target KL divergence the models that the budget proposes are built and
measured on calibration text, so that the figure reached is a measured one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from compression_worker.architecture import Linear
from compression_worker.checkpoints import load_model
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput
from compression_worker.deltas.budget import Choice, Option, cheapest, cost, moves, within
from compression_worker.deltas.kept import BY_ROW
from compression_worker.deltas.moments import (
    Samples,
    moments_tensors,
    read_moments,
    read_samples_of,
    samples_tensors,
)
from compression_worker.deltas.pair import open_pair, whole_delta
from compression_worker.deltas.rows import CODINGS, rows_losses
from compression_worker.deltas.sensitivity import BATCH, LENGTH, WINDOWS, sense
from compression_worker.making.blobs import open_blob, write_blob
from compression_worker.making.calibration import calibration_windows
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.methods.bitdelta.coding import Coding, encode
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.methods.bitdelta.foretell import foretold_bytes
from compression_worker.methods.bitdelta.options import OPTIONS, fitted
from compression_worker.methods.bitdelta.trial import Trial
from compression_worker.tensors import ITEM_SIZES, TensorFile, TensorFiles

TOLERANCE = 0.02
"""How near a target counts as met."""
SEARCHES, ROUNDS = 24, 4
"""Models that a target KL divergence costs about, and how often single changes are looked for at the end."""


def sense_step(context: StepContext) -> StepOutput:
    """What errors of each linear, of the embeddings and of the head cost, from one pass over calibration text.

    Its blobs: ``moments`` of everything, and the samples of each block as ``block-<number>``.
    """
    blocks = context.spec.params["blocks"]
    with opened(context, "variant") as variant:
        windows = calibration_windows(context, variant, length=LENGTH, needed=WINDOWS)
        model = load_model(variant, device=context.device, dtype=torch.float32)
        batches = (windows.batch(at, BATCH).to(context.device) for at in range(WINDOWS // BATCH))
        memory = architecture_of(variant).memory
        sensed = sense(model, [name for block in blocks for name in block], batches, _watching(context), memory)
    blobs = {"moments": write_blob(context, moments_tensors(sensed.moments))}
    for number, block in enumerate(blocks):
        own = {name: sensed.samples[name] for name in block}
        blobs[f"block-{number}"] = write_blob(context, samples_tensors(own))
    return StepOutput(blobs=blobs, data={"windows": WINDOWS, "length": LENGTH, "tokens": sensed.tokens})


def measure_step(context: StepContext) -> StepOutput:
    """Bytes and loss of every option of every matrix of a block; of embeddings and head where ``linears`` is empty."""
    linears = [Linear(**linear) for linear in context.spec.params["linears"]]
    sensed = context.input("sensitivity")
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(open_blob(context, sensed.blobs["moments"]))
        base, variant = stack.enter_context(open_pair(context, []))
        if not linears:
            return StepOutput(data={"rows": _measured_rows(context, seen, base, variant)})
        drawn = stack.enter_context(open_blob(context, sensed.blobs[f"block-{linears[0].block}"]))
        options: dict[str, list[list[float]]] = {}
        for linear in linears:
            samples = read_samples_of(drawn, linear.name, sensed.data["tokens"])
            options[linear.name] = _measured(linear, samples, base, variant)
            context.progress(len(options), len(linears), "matrices")
    return StepOutput(data={"linears": options})


def choose_step(context: StepContext) -> StepOutput:
    """The coding of each matrix.

    Raises :class:`CompressionError` (``target_unreachable``), which names the nearest that can be had.
    """
    params = context.spec.params
    config = BitDeltaConfig(**params["config"])
    linears = {linear["name"]: Linear(**linear) for linear in params["linears"]}
    options, rows = _options(context)
    if config.target_ratio is not None:
        choice, target = _for_ratio(context, config.target_ratio, options, rows, linears)
    else:
        choice, target = _for_divergence(context, config, options, rows, linears)
    codings = {name: fitted(linears[name], choice[name]).to_json() for name in linears}
    chosen_rows = {name: rows[name][choice[name]] for name in rows}
    context.log(_words(codings, chosen_rows, target), "info")
    return StepOutput(data={"codings": codings, "rows": chosen_rows, "target": target})


def _measured(linear: Linear, samples: Samples, base: TensorFiles, variant: TensorFiles) -> list[list[float]]:
    delta = whole_delta(linear, base, variant)
    found = []
    for at in range(len(OPTIONS)):
        coding = fitted(linear, at)
        coded = encode(delta, coding, samples.rows, samples.cost)
        found.append([sum(coding.sizes(linear.outputs, linear.inputs).values()), coded.loss])
    return found


def _measured_rows(
    context: StepContext, seen: TensorFile, base: TensorFiles, variant: TensorFiles
) -> dict[str, list[list[float]]]:
    """Options of the tensors that may be coded by row: those of :data:`CODINGS`, by name."""
    parts = context.spec.params["parts"]
    ours, theirs = (opened(context, side).manifest["tensors"] for side in ("base", "variant"))
    found = {}
    for name, part in parts.items():
        mine, other = theirs.get(name), ours.get(name)
        if part not in BY_ROW or not mine or not other or mine["sha256"] == other["sha256"]:
            continue
        moments = [one for key in (name, f"{name}#head") if (one := read_moments(seen, key))]
        if mine["shape"][1:] != other["shape"][1:] or not moments:
            continue
        raw = [mine["shape"][0] * mine["shape"][1] * ITEM_SIZES[mine["dtype"]], 0.0]
        coded = rows_losses(CODINGS[1:], base.file(name), variant.file(name), name, moments)
        found[name] = [raw, *([size, lost / 2] for size, lost in coded)]
    return found


def _options(context: StepContext) -> tuple[dict[str, list[Option]], dict[str, list[str]]]:
    """Options of every matrix and tensor, and what those of the tensors by row are called."""
    options: dict[str, list[Option]] = {}
    rows: dict[str, list[str]] = {}
    for name in sorted((name for name in context.spec.inputs if name.startswith("measure-")), key=_number):
        data = context.input(name).data
        for tensor, ways in (data.get("linears") or data["rows"]).items():
            options[tensor] = [Option(int(size), lost) for size, lost in ways]
            if "rows" in data:
                rows[tensor] = list(CODINGS)
    return options, rows


def _number(name: str) -> int:
    tail = name.removeprefix("measure-")
    return int(tail) if tail.isdigit() else 1 << 30


def _for_ratio(
    context: StepContext,
    wanted: float,
    options: dict[str, list[Option]],
    rows: dict[str, list[str]],
    linears: dict[str, Linear],
) -> tuple[Choice, Json]:
    """The least loss at which the whole artifact has the ratio; headers and manifest depend a little on the choice."""
    variant = opened(context, "variant")
    source = int(variant.manifest["weight_bytes"])
    aim = int(source / wanted)

    def total(choice: Choice) -> int:
        return foretold_bytes(
            context, {name: fitted(linears[name], choice[name]) for name in linears}, _rows(rows, choice, options)
        )

    smallest = cheapest(options)
    if (least := total(smallest)) > aim:
        raise CompressionError(
            "target_unreachable",
            f"target_ratio is {wanted:g}, and the smallest artifact of this variant has {least:,} bytes, a ratio of "
            f"{source / least:.2f}: ask for that or less. What is no block linear, embedding or head, and the "
            "tokenizer, is kept whole",
        )
    budget = aim - (least - cost(options, smallest))
    choice = smallest
    for _ in range(4):
        choice = within(options, budget)
        spare = aim - total(choice)
        if 0 <= spare <= aim * TOLERANCE / 8:
            break
        budget += spare
    reached = source / total(choice)
    if reached > wanted * (1 + TOLERANCE):
        context.log(
            f"the richest coding there is has a ratio of {reached:.2f} already; {wanted:g} asks for more bytes than "
            "it can use",
            "warning",
        )
    return choice, {"ratio": wanted, "expected": float(f"{reached:.6g}")}


def _rows(rows: dict[str, list[str]], choice: Choice, options: dict[str, list[Option]]) -> dict[str, tuple[str, int]]:
    return {name: (rows[name][choice[name]], options[name][choice[name]].bytes) for name in rows}


def _for_divergence(
    context: StepContext,
    config: BitDeltaConfig,
    options: dict[str, list[Option]],
    rows: dict[str, list[str]],
    linears: dict[str, Linear],
) -> tuple[Choice, Json]:
    """Go along the moves that save most a byte until the measured divergence is the target; then look around."""
    wanted = float(config.target_kl or 0)
    with Trial(context, config, rows, linears) as trial:
        path = moves(options)
        tried: dict[int, float] = {}

        def at(count: int) -> float:
            if count not in tried:
                tried[count] = trial.divergence(_after(options, path, count))
                context.progress(len(tried), SEARCHES, "models measured")
            return tried[count]

        if at(len(path)) > wanted * (1 + TOLERANCE):
            raise CompressionError(
                "target_unreachable",
                f"target_kl is {wanted:g}, and the richest coding there is reaches {at(len(path)):.4g} on the "
                "calibration text: ask for that or more",
            )
        low, high = 0, len(path)
        if at(0) <= wanted:
            high = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle) <= wanted else (middle, high)
        choice, reached = _after(options, path, high), at(high)
        if reached < wanted * (1 - TOLERANCE) and high:
            choice, reached = _nearer(trial, options, choice, reached, wanted)
        return choice, {"kl": wanted, "reached": float(f"{reached:.6g}"), "windows": trial.windows}


def _after(options: Mapping[str, list[Option]], path: list[Any], count: int) -> Choice:
    choice = cheapest(options)
    for move in path[:count]:
        choice[move.name] = move.to
    return choice


def _nearer(
    trial: Trial, options: Mapping[str, list[Option]], choice: Choice, reached: float, wanted: float
) -> tuple[Choice, float]:
    """Make single matrices smaller, those first that cost least, while the divergence stays within the target."""
    banned: set[str] = set()
    for _ in range(ROUNDS):
        steps = _smaller(options, choice, banned)
        tried = {0: reached}
        low, high = 0, len(steps) + 1
        while high - low > 1:
            middle = (low + high) // 2
            tried[middle] = trial.divergence(choice | dict(steps[:middle]))
            low, high = (middle, high) if tried[middle] <= wanted * (1 + TOLERANCE / 2) else (low, middle)
        choice, reached = choice | dict(steps[:low]), tried[low]
        if reached >= wanted * (1 - TOLERANCE) or low == len(steps):
            break
        banned.add(steps[low][0])
    return choice, reached


def _smaller(options: Mapping[str, list[Option]], choice: Choice, banned: set[str]) -> list[tuple[str, int]]:
    """For each matrix the smaller option that costs least more, the cheapest changes first."""
    found = []
    for name, at in choice.items():
        now = options[name][at]
        ways = [
            (way.loss - now.loss, other)
            for other, way in enumerate(options[name])
            if way.bytes < now.bytes and way.loss > now.loss
        ]
        if ways and name not in banned:
            more, other = min(ways)
            found.append((more, name, other))
    return [(name, other) for _, name, other in sorted(found)]


def _words(codings: Mapping[str, Json], rows: Mapping[str, str], target: Json) -> str:
    """What was chosen, in one line."""
    counts: dict[str, int] = {}
    for coding in codings.values():
        label = Coding(**coding).label
        counts[label] = counts.get(label, 0) + 1
    shown = ", ".join(f"{label}: {count}" for label, count in sorted(counts.items(), key=lambda item: -item[1]))
    tail = "; ".join(f"{name}: {coding}" for name, coding in rows.items())
    reached = target.get("reached", target.get("expected"))
    return f"{shown}{'; ' + tail if tail else ''}; target {reached}"


def _watching(context: StepContext) -> Callable[[int], None]:
    return lambda done: context.progress(done, WINDOWS // BATCH, "batches")
