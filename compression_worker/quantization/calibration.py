"""Streamed calibration: what goes into each linear, as Hessians ``H = 2/n sum x^T x`` kept by distinct input.

The model is run block by block on windows of text, and between blocks the hidden states lie in a file, so that memory
holds one block, one batch of windows and the Hessians of one block. A step's key carries the checkpoint and the text by
digest: Hessians of another model or text cannot be taken for these, and every job on the same two finds them again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput
from compression_worker.making.inputs import opened
from compression_worker.quantization.blocks import Block, BlockRunner, Group, split, window_batches
from compression_worker.quantization.windows import calibration_tokens
from compression_worker.tensors import Spec, TensorFile, raw_bytes, write_file

TOKENS_FILE, HIDDEN_FILE = "tokens.safetensors", "hidden.safetensors"
TOKENS, HIDDEN = "tokens", "hidden"
BATCH_TOKENS = 2048
"""Tokens that go through a block at a time."""
PRODUCT_ROWS = 1024
"""Rows of one product in fp32; the sum over products is kept in fp64."""
STEPS = 8
"""A job's blocks are shared out over so many steps at most: between two of them the hidden states are stored."""


class SecondMoment:
    """``sum x^T x`` of one input, fp64 ``(K, K)``, and how many rows it has seen."""

    def __init__(self, inputs: int, device: str = "cpu") -> None:
        self.total = torch.zeros((inputs, inputs), dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """``x (rows, K)`` in fp32."""
        for part in x.split(PRODUCT_ROWS):
            self.total += part.T @ part
        self.rows += len(x)

    def hessian(self) -> torch.Tensor:
        """``2/n sum x^T x`` in fp32."""
        return (self.total * (2 / max(self.rows, 1))).to(torch.float32)


class Moments:
    """Second moments of the groups of one block."""

    def __init__(self, groups: Sequence[Group], device: str) -> None:
        self._moments = {group.name: SecondMoment(group.inputs, device) for group in groups}
        self._groups = {group.name: group for group in groups}

    def take(self, group: Group, x: torch.Tensor) -> None:
        """Add the rows ``x``. Raises :class:`CompressionError` (``not_finite``) where they hold a NaN or infinity."""
        moment = self._moments[group.name]
        moment.add(x)
        if not bool(moment.total.diagonal().isfinite().all()):
            raise CompressionError(
                "not_finite",
                f"the inputs of '{group.name}' are not finite on the calibration text: the weights before it are "
                "damaged, or the text makes the model overflow",
            )

    def hessian(self, group: Group) -> tuple[torch.Tensor, int, str]:
        """``H (K, K)`` in fp32, the rows it was made from, and where it comes from: ``own``, ``pooled``, ``identity``.

        An expert that saw fewer rows than it has inputs shares the rows of all experts of its layer.
        """
        own = self._moments[group.name]
        if own.rows >= group.inputs or group.expert < 0:
            return own.hessian(), own.rows, "own"
        kin = [name for name, one in self._groups.items() if (one.owner, one.side) == (group.owner, group.side)]
        pooled = SecondMoment(group.inputs, str(own.total.device))
        for name in kin:
            pooled.total += self._moments[name].total
            pooled.rows += self._moments[name].rows
        if pooled.rows:
            return pooled.hessian(), pooled.rows, "pooled"
        return torch.eye(group.inputs, device=own.total.device), 0, "identity"


class HiddenStates:
    """Hidden states ``(W, T, H)`` in fp32 that lie in a file without a name: a batch of windows is in memory."""

    def __init__(self, windows: int, length: int, width: int) -> None:
        self.shape = (windows, length, width)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._stride = length * width * 4

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @classmethod
    def stored(cls, file: TensorFile) -> HiddenStates:
        """What :meth:`data` wrote, copied out of ``file``."""
        states = cls(*file.entries[HIDDEN].spec.shape)
        for chunk in file.chunks(HIDDEN):
            states._file.write(chunk)
        return states

    def batches(self) -> Sequence[range]:
        """The windows, a batch at a time."""
        return window_batches(self.shape[0], self.shape[1], BATCH_TOKENS)

    def read(self, windows: range, device: str = "cpu") -> torch.Tensor:
        batch = torch.empty((len(windows), *self.shape[1:]))
        self._file.seek(windows.start * self._stride)
        self._file.readinto(raw_bytes(batch))
        return batch.to(device)

    def write(self, windows: range, batch: torch.Tensor) -> None:
        self._file.seek(windows.start * self._stride)
        self._file.write(raw_bytes(batch.to("cpu", torch.float32).contiguous()))

    def data(self) -> tuple[Spec, Iterator[memoryview]]:
        """For a safetensors file, under the name :data:`HIDDEN`."""
        return Spec("F32", self.shape), (raw_bytes(self.read(windows)) for windows in self.batches())


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How much calibration text is read: ``samples`` windows of ``length`` tokens."""

    samples: int
    length: int


def planned(
    sampling: Sampling, source: Mapping[str, str], at: int, seed: int, blocks: int, *, hessians: bool
) -> list[PlannedStep]:
    """The steps that read the text, of which the first is number ``at`` of the plan.

    ``source`` holds the digests ``variant`` and ``calibration``. With ``hessians`` the full-precision model is run and
    a step for each run of blocks gives their Hessians; without, a method runs the blocks itself.
    """
    inputs = {name: source[name] for name in ("variant", "calibration") if name in source}
    params = {"samples": sampling.samples, "length": sampling.length}
    steps = [
        PlannedStep(
            name="calibration text",
            kind="calibration.tokens",
            group="calibrate",
            params=params,
            inputs=inputs,
            seed=seed,
        )
    ]
    runs = split(blocks, STEPS) if hessians else []
    for number, run in enumerate(runs):
        steps.append(
            PlannedStep(
                name=f"Hessians of blocks {run.start} to {run.stop - 1}",
                kind="calibration.hessians",
                group="calibrate",
                params={"first": run.start, "count": len(run)},
                inputs={"variant": source["variant"], "hidden": f"@{at + number}"},
                seed=0,
            )
        )
    return steps


def tokens_step(context: StepContext) -> StepOutput:
    """Windows of the calibration text, and what the embedding makes of them."""
    params = context.spec.params
    checkpoint = opened(context, "variant")
    tokens = calibration_tokens(context, checkpoint, samples=params["samples"], length=params["length"])
    with (
        BlockRunner(checkpoint, context.device) as runner,
        HiddenStates(len(tokens), tokens.shape[1], runner.width) as states,
    ):
        for batch in states.batches():
            states.write(batch, runner.embed(tokens[batch.start : batch.stop]))
        hidden = keep_hidden(context, states)
    with context.store.writer() as blob:
        flat = tokens.to(torch.int32).contiguous()
        write_file(blob, {TOKENS: (Spec("I32", tuple(flat.shape)), [raw_bytes(flat)])})
    data = {"windows": tokens.shape[0], "length": tokens.shape[1], "tokens": tokens.numel()}
    return StepOutput(blobs={TOKENS_FILE: blob.digest, HIDDEN_FILE: hidden}, data=data)


def hessians_step(context: StepContext) -> StepOutput:
    """Hessians of some blocks of the full-precision model, and the hidden states behind the last of them."""
    params = context.spec.params
    first, count = params["first"], params["count"]
    blobs: dict[str, str] = {}
    lines: dict[str, Json] = {}
    checkpoint = opened(context, "variant")
    with BlockRunner(checkpoint, context.device) as runner, hidden_input(context) as states:
        for index in range(first, first + count):
            with runner.block(index) as block:
                groups, moments = observed(block, states, context.device)
            found = {group.name: moments.hessian(group) for group in groups}
            with context.store.writer() as blob:
                write_file(blob, {name: packed_triangle(one[0]) for name, one in found.items()})
            blobs[hessians_file(index)] = blob.digest
            for group in groups:
                _, rows, origin = found[group.name]
                line = {"hessian": group.name, "block": index, "rows": rows, "origin": origin}
                lines |= {linear.name: line for linear in group.linears}
            context.progress(index - first + 1, count, "blocks")
        if first + count < len(runner):
            blobs[HIDDEN_FILE] = keep_hidden(context, states)
    return StepOutput(blobs=blobs, data={"linears": lines, "fingerprint": checkpoint.fingerprint})


def observed(block: Block, states: HiddenStates, device: str) -> tuple[list[Group], Moments]:
    """Second moments of all inputs of ``block``; ``states`` are what comes out of it afterwards."""
    groups = block.groups(states.read(range(1), device))
    moments = Moments(groups, device)
    for windows in states.batches():
        out = block.see(groups, states.read(windows, device), moments.take, stop=False)
        assert out is not None
        states.write(windows, out)
    return groups, moments


def hidden_input(context: StepContext) -> HiddenStates:
    """The hidden states that the step named ``hidden`` left behind, verified."""
    blob = context.input("hidden").blobs[HIDDEN_FILE]
    with TensorFile(context.store.verified_path(blob)) as file:
        return HiddenStates.stored(file)


def read_tokens(context: StepContext, name: str) -> torch.Tensor:
    """The windows ``(W, T)``, int64, that the step given as input ``name`` chose."""
    with TensorFile(context.store.verified_path(context.input(name).blobs[TOKENS_FILE])) as file:
        return file.tensor(TOKENS).to(torch.int64)


class Hessians:
    """What the steps given as inputs whose names begin with ``hessians`` found, of the checkpoint that is quantized."""

    def __init__(self, context: StepContext, fingerprint: str) -> None:
        self._context = context
        self._lines: dict[str, Json] = {}
        self._blobs: dict[str, str] = {}
        for name in context.spec.inputs:
            if name.startswith("hessians"):
                output = context.input(name)
                if output.data["fingerprint"] != fingerprint:
                    raise CompressionError(
                        "wrong_hessians", "the Hessians were made from another model: calibrate again"
                    )
                self._lines |= output.data["linears"]
                self._blobs |= output.blobs

    def line(self, name: str) -> Json:
        """What is known of the Hessian of linear ``name``: ``rows`` and ``origin``."""
        return self._lines[name]

    def of(self, name: str) -> torch.Tensor:
        """``H (K, K)`` in fp32 of linear ``name``."""
        line = self._lines[name]
        blob = self._blobs[hessians_file(line["block"])]
        with TensorFile(self._context.store.verified_path(blob)) as file:
            return unpacked_triangle(file.tensor(line["hessian"]))


def hessians_file(block: int) -> str:
    return f"hessians-{block:05d}.safetensors"


def packed_triangle(hessian: torch.Tensor) -> tuple[Spec, list[memoryview]]:
    """The lower triangle, row by row, as a vector of ``K (K + 1) / 2``."""
    count = len(hessian)
    rows, columns = torch.tril_indices(count, count)
    flat = hessian.cpu()[rows, columns].contiguous()
    return Spec("F32", (len(flat),)), [raw_bytes(flat)]


def unpacked_triangle(flat: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix that :func:`packed_triangle` took apart."""
    count = int((8 * len(flat) + 1) ** 0.5 - 1) // 2
    rows, columns = torch.tril_indices(count, count)
    whole = torch.empty((count, count))
    whole[rows, columns] = flat
    whole[columns, rows] = flat
    return whole


def keep_hidden(context: StepContext, states: HiddenStates) -> str:
    """Store hidden states for the next step, as :data:`HIDDEN_FILE`; the digest."""
    with context.store.writer() as blob:
        write_file(blob, {HIDDEN: states.data()})
    return blob.digest
