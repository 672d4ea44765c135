"""One chunk of scale distillation as a step: take up the state that the chunk before left, train, leave the state.

The state is a safetensors blob of three fp32 vectors (values, first and second moment). A value is the scale itself, or
its share of the initial scale where the learning rate is relative.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from compression_worker.checkpoints import Checkpoint, load_model
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput
from compression_worker.deltas.rows import RowsReader
from compression_worker.distillation import Adam, Batch, Windows, distill, scheduled
from compression_worker.making.blobs import open_blob, read_blob, write_blob
from compression_worker.making.calibration import calibration_windows
from compression_worker.making.inputs import architecture_of
from compression_worker.making.table import ROWS_FILE, six_digits
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.methods.bitdelta.finish import codes_of, coding_of, initial_scales, parts_of, values_of
from compression_worker.methods.bitdelta.matrices import Matrix
from compression_worker.methods.bitdelta.student import Student
from compression_worker.tensors import TensorFile, TensorFiles, checkpoint_files
from kernels.packing import unpack_signs

SMALL_MODEL = 10_000_000
"""Parameters."""
VECTORS = ("values", "first_moment", "second_moment")


def distill_step(context: StepContext) -> StepOutput:
    """Training steps ``first`` to ``last`` of the scales; the output carries state, scales and the loss curve."""
    params = context.spec.params
    config, first, last = BitDeltaConfig(**params["config"]), params["first"], params["last"]
    previous = context.input("previous") if "previous" in context.spec.inputs else None
    variant = Checkpoint.open(context.store, context.spec.inputs["variant"])
    with variant, _threads_for(variant):
        layers = _layers(context)
        lines = {name: line for layer in layers for name, line in layer.data["linears"].items()}
        initial = initial_scales(context, lines, layers)
        unit = _unit(initial, config).to(context.device)
        adam = _resumed(context, previous) if previous else Adam.start(initial.to(context.device) / unit)
        student = _student(context, variant, lines, layers)
        windows = calibration_windows(
            context, variant, length=config.sequence_length, needed=config.distill_steps * config.batch_size
        )
        if previous is None:
            context.log(f"{len(windows)} windows of calibration text; {config.distill_steps} steps", "info")
        started = time.monotonic()
        losses = distill(
            adam,
            _batches(windows, config, first, context.device),
            lambda values, batch: student.loss(values * unit, batch),
            first=first,
            learning_rates=[
                scheduled(config.learning_rate, config.schedule, step, config.distill_steps)
                for step in range(first, last)
            ],
            watch=lambda done: context.progress(done, last - first, "training steps"),
        )
        context.measure("seconds_per_training_step", (time.monotonic() - started) / (last - first))
    if not (adam.values * unit).isfinite().all():
        raise CompressionError("diverged", "distillation made a scale that is not finite: lower learning_rate")
    plain = all(coding_of(line).plain for line in lines.values())
    return _output(context, adam, unit, losses, previous, len(windows), plain)


@contextlib.contextmanager
def _threads_for(variant: Checkpoint) -> Iterator[None]:
    """One thread for a small model: sharing short operations costs more than it gives, most on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if variant.manifest["parameters"] < SMALL_MODEL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _output(
    context: StepContext,
    adam: Adam,
    unit: torch.Tensor,
    losses: list[float],
    previous: StepOutput | None,
    windows: int,
    plain: bool,
) -> StepOutput:
    vectors = {name: getattr(adam, name).cpu().contiguous() for name in VECTORS}
    blobs = {"state": write_blob(context, vectors)}
    curve = list(previous.data["curve"]["losses"]) if previous else []
    curve += [six_digits(loss) for loss in losses]
    context.log(f"loss {curve[0]:.4g} at first, {curve[-1]:.4g} now", "info")
    data: Json = {"curve": {"losses": curve, "windows": windows}}
    scales = (adam.values * unit).cpu().contiguous()
    if plain:
        data["scales"] = scales.tolist()
    else:
        blobs["scales"] = write_blob(context, {"scales": scales})
    return StepOutput(blobs=blobs, data=data)


def _layers(context: StepContext) -> list[StepOutput]:
    """What the layer steps left, in the order of the artifact's scales."""
    names = sorted((name for name in context.spec.inputs if name.startswith("layer-")), key=_layer_number)
    return [context.input(name) for name in names]


def _layer_number(name: str) -> int:
    return int(name.removeprefix("layer-"))


def _unit(initial: torch.Tensor, config: BitDeltaConfig) -> torch.Tensor:
    """What a value of the state is counted in: 1, or the initial scale (1 again where that is zero)."""
    relative = config.learning_rate_unit == "relative"
    return initial.where(initial > 0, 1.0) if relative else torch.ones_like(initial)


def _resumed(context: StepContext, previous: StepOutput) -> Adam:
    state = read_blob(context, previous.blobs["state"])
    return Adam(*(state[name].to(context.device) for name in VECTORS))


def _student(
    context: StepContext, variant: Checkpoint, lines: Mapping[str, Json], layers: Sequence[StepOutput]
) -> Student:
    base = Checkpoint.open(context.store, context.spec.inputs["base"])
    with checkpoint_files(base) as files:
        matrices = _matrices(context, files, lines, layers)
        rows = _coded_rows(context, files)
    model: Any = load_model(variant, device=context.device, dtype=torch.float32)
    counts = [values_of(line) for line in lines.values()]
    return Student(model, matrices, counts, rows, architecture_of(variant))


def _matrices(
    context: StepContext, base: TensorFiles, lines: Mapping[str, Json], layers: Sequence[StepOutput]
) -> dict[str, Matrix]:
    made = {}
    for layer in layers:
        with open_blob(context, codes_of(layer)) as codes:
            for name in layer.data["linears"]:
                made[name] = _matrix(context.device, codes, base.file(name), name, lines[name])
    return {name: made[name] for name in lines}


def _matrix(device: str, codes: TensorFile, base: TensorFile, name: str, line: Json) -> Matrix:
    coding = coding_of(line)
    packed, left, right = parts_of(codes, name, line)
    signs = [unpack_signs(mask, line["linear"]["inputs"], torch.int8) for mask in packed]
    weight = base.tensor(name)
    weight = weight.T.contiguous() if line["linear"]["transposed"] else weight
    if coding.rank:
        weight = weight.to(torch.float32) + left.float() @ right.float()
    whole = torch.stack(signs) if signs else torch.zeros((0, *weight.shape), dtype=torch.int8)
    return Matrix(weight.to(device), whole.to(device), coding)


def _coded_rows(context: StepContext, base: TensorFiles) -> dict[str, torch.Tensor]:
    """Embeddings and head as they come back from their coded rows; none where they are kept whole."""
    if "rest" not in context.spec.inputs:
        return {}
    rest = context.input("rest")
    if ROWS_FILE not in rest.blobs:
        return {}
    with open_blob(context, rest.blobs[ROWS_FILE]) as file:
        reader = RowsReader(file)
        lines = rest.data["rows"].items()
        return {name: torch.cat(list(reader.tiles(name, line, base.file(name)))) for name, line in lines}


def _batches(windows: Windows, config: BitDeltaConfig, first: int, device: str) -> Iterator[Batch]:
    for step in range(first, config.distill_steps):
        yield windows.batch(step, config.batch_size).to(device)
