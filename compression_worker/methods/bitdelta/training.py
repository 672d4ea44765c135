"""One chunk of scale distillation as a step: take up the state that the chunk before left, train, leave the state.

The state is a safetensors blob of three fp32 vectors (values, first and second moment). A value is the scale itself, or
its share of the initial scale where the learning rate is relative.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from compression_worker.architecture import describe
from compression_worker.checkpoints import Checkpoint, load_model, load_tokenizer
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput
from compression_worker.distillation import Adam, Batch, Windows, distill, scheduled
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.methods.bitdelta.layout import six_digits
from compression_worker.methods.bitdelta.student import Student
from compression_worker.samples import read_samples
from compression_worker.tensors import Spec, TensorFile, checkpoint_files, raw_bytes, write_file
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
        lines = _lines(context)
        unit = _unit(lines, config).to(context.device)
        adam = _resumed(context, previous) if previous else Adam.start(_initial(lines).to(context.device) / unit)
        student = _student(context, variant, lines)
        windows = _windows(context, variant, config)
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
    return _output(context, adam, unit, losses, previous, len(windows))


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
    context: StepContext, adam: Adam, unit: torch.Tensor, losses: list[float], previous: StepOutput | None, windows: int
) -> StepOutput:
    vectors = {name: getattr(adam, name).cpu().contiguous() for name in VECTORS}
    with context.store.writer() as blob:
        write_file(blob, {name: (Spec("F32", (len(v),)), [raw_bytes(v)]) for name, v in vectors.items()})
    curve = list(previous.data["curve"]["losses"]) if previous else []
    curve += [six_digits(loss) for loss in losses]
    context.log(f"loss {curve[0]:.4g} at first, {curve[-1]:.4g} now", "info")
    scales = (adam.values * unit).tolist()
    return StepOutput(
        blobs={"state": blob.digest}, data={"scales": scales, "curve": {"losses": curve, "windows": windows}}
    )


def _lines(context: StepContext) -> dict[str, Json]:
    """What the layer steps said of each linear, in the order of the artifact's scales."""
    names = sorted((name for name in context.spec.inputs if name.startswith("layer-")), key=_layer_number)
    return {name: line for layer in names for name, line in context.input(layer).data["linears"].items()}


def _layer_number(name: str) -> int:
    return int(name.removeprefix("layer-"))


def _initial(lines: dict[str, Json]) -> torch.Tensor:
    return torch.tensor([line["scale"] for line in lines.values()], dtype=torch.float32)


def _unit(lines: dict[str, Json], config: BitDeltaConfig) -> torch.Tensor:
    """What a value of the state is counted in: 1, or the initial scale (1 again where that is zero)."""
    initial = _initial(lines)
    relative = config.learning_rate_unit == "relative"
    return initial.where(initial > 0, 1.0) if relative else torch.ones_like(initial)


def _resumed(context: StepContext, previous: StepOutput) -> Adam:
    context.store.verify(previous.blobs["state"])
    with TensorFile(context.store.path(previous.blobs["state"])) as file:
        return Adam(*(file.tensor(name).to(context.device) for name in VECTORS))


def _student(context: StepContext, variant: Checkpoint, lines: dict[str, Json]) -> Student:
    base = Checkpoint.open(context.store, context.spec.inputs["base"])
    pairs = {}
    with checkpoint_files(base) as files:
        for layer in (name for name in context.spec.inputs if name.startswith("layer-")):
            (digest,) = context.input(layer).blobs.values()
            with TensorFile(context.store.path(digest)) as codes:
                for name in codes.entries:
                    linear = lines[name]["linear"]
                    signs = unpack_signs(codes.tensor(name), linear["inputs"], torch.int8)
                    weight = files.file(name).tensor(name)
                    weight = weight.T.contiguous() if linear["transposed"] else weight
                    pairs[name] = weight.to(context.device), signs.to(context.device)
    model: Any = load_model(variant, device=context.device, dtype=torch.float32)
    architecture = describe(variant.manifest["config"]).renamed_for(variant.manifest["tensors"])
    return Student(model, list(lines), pairs, architecture)


def _windows(context: StepContext, variant: Checkpoint, config: BitDeltaConfig) -> Windows:
    samples = read_samples(context.store.read_bytes(context.spec.inputs["calibration"]))
    texts = [sample["text"] for sample in samples if "text" in sample]
    if not texts:
        raise CompressionError("no_text", "the calibration set has no texts: distillation needs a text set")
    tokenizer = load_tokenizer(variant)
    return Windows(
        texts,
        lambda text: tokenizer(text, add_special_tokens=True, truncation=False, verbose=False)["input_ids"],
        length=config.sequence_length,
        needed=config.distill_steps * config.batch_size,
        seed=context.spec.seed,
    )


def _batches(windows: Windows, config: BitDeltaConfig, first: int, device: str) -> Iterator[Batch]:
    for step in range(first, config.distill_steps):
        batch = windows.batch(step, config.batch_size)
        yield Batch(batch.tokens.to(device), batch.real.to(device))
