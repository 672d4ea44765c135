"""The step that codes a run of blocks: stack by stack, or with fine-tuning of each block between its stacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial

import torch

from compression_worker.architecture import Architecture
from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import codes_file, six_digits
from compression_worker.making.threads import each, one_thread_per_operation
from compression_worker.methods.quip_sharp import layout
from compression_worker.methods.quip_sharp.block_tuning import BlockTuning, TunedStack
from compression_worker.methods.quip_sharp.config import QuipSharpConfig
from compression_worker.methods.quip_sharp.quantize import Coded, Piece, compared, quantize
from compression_worker.methods.quip_sharp.rotation import Rotation
from compression_worker.methods.quip_sharp.stacks import Stack, stack_line, stacks_of
from compression_worker.quantization.blocks import Block, BlockRunner
from compression_worker.quantization.calibration import Hessians, HiddenStates, hidden_input
from compression_worker.quantization.rest import TRANSFORMERS
from compression_worker.tensors import TensorFiles, checkpoint_files, whole, write_file

NORMS = "norms"
"""The blob that holds the norms that fine-tuning of blocks has changed."""


def layers_step(context: StepContext) -> StepOutput:
    """The code words of the blocks ``first`` to ``first + count``.

    The output's data: ``stacks`` (a line each, in the order of the blocks) and, where blocks are tuned, ``curves``.
    """
    params = context.spec.params
    config, run = QuipSharpConfig(**params["config"]), range(params["first"], params["first"] + params["count"])
    checkpoint = opened(context, "variant")
    hessians = Hessians(context, checkpoint.fingerprint)
    architecture = architecture_of(checkpoint)
    stacks = list(stacks_of(architecture, run, lambda name: hessians.line(name)["hessian"], fuse=config.fuse))
    with checkpoint_files(checkpoint) as files:
        for stack in stacks:
            files.file(stack.name)  # so that threads find the files open
        work = _Work(context, files, hessians, config)
        output = work.tuned(architecture, run, stacks) if config.tunes_blocks else work.coded(run, stacks)
    _report(context, output.data["stacks"])
    return output


def store_tensors(context: StepContext, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a file that transformers can read; its digest."""
    with context.store.writer() as blob:
        write_file(blob, {name: whole(tensor) for name, tensor in tensors.items()}, TRANSFORMERS)
    return blob.digest


class _Work:
    """What the stacks of one step share."""

    def __init__(self, context: StepContext, files: TensorFiles, hessians: Hessians, config: QuipSharpConfig) -> None:
        self._context, self._files, self._hessians, self._config = context, files, hessians, config
        self._device = context.device

    def coded(self, run: range, stacks: list[Stack]) -> StepOutput:
        """Each stack by itself."""
        lines: list[Json] = []
        blobs: dict[str, str] = {}
        with one_thread_per_operation():
            made = (map if self._device.startswith("cuda") else each())(self._code, stacks)
            for block in run:
                tensors: dict[str, torch.Tensor] = {}
                for _ in range(sum(stack.block == block for stack in stacks)):
                    line, own = next(made)
                    lines.append(line)
                    tensors |= own
                    self._context.progress(len(lines), len(stacks), "stacks")
                if tensors:
                    blobs[codes_file(block)] = store_tensors(self._context, tensors)
        return StepOutput(blobs=blobs, data={"stacks": lines})

    def tuned(self, architecture: Architecture, run: range, stacks: list[Stack]) -> StepOutput:
        """Block after block, each tuned on what goes into it and comes out of it in the full-precision model."""
        lines: list[Json] = []
        blobs: dict[str, str] = {}
        norms: dict[str, torch.Tensor] = {}
        curves: Json = {}
        done = iter(range(1, len(stacks) + 1))
        checkpoint = opened(self._context, "variant")
        with BlockRunner(checkpoint, self._device) as runner, hidden_input(self._context) as states:
            for index in run:
                own = [stack for stack in stacks if stack.block == index]
                with runner.block(index) as block, HiddenStates(*states.shape) as outputs:
                    _run(block, states, outputs, self._device)
                    if own:
                        ordered = _in_order(block, own, states, self._device)
                        tuning = BlockTuning(
                            block,
                            architecture,
                            states,
                            outputs,
                            self._config,
                            seed=self._context.spec.seed,
                            device=self._device,
                        )
                        watch = partial(self._watched, done, len(stacks))
                        made = tuning.run(ordered, self._hessians.of, watch)
                        found = [self._described(one) for one in made.stacks]
                        lines += [line for line, _ in found]
                        tensors = {name: tensor for _, tensors in found for name, tensor in tensors.items()}
                        blobs[codes_file(index)] = store_tensors(self._context, tensors)
                        norms |= made.norms
                        curves[str(index)] = [[six_digits(loss) for loss in losses] for losses in made.losses]
                    for windows in outputs.batches():
                        states.write(windows, outputs.read(windows))
        blobs[NORMS] = store_tensors(self._context, dict(sorted(norms.items())))
        return StepOutput(blobs=blobs, data={"stacks": lines, "curves": curves, "tuned": sorted(norms)})

    def _code(self, stack: Stack) -> tuple[Json, dict[str, torch.Tensor]]:
        """What is recorded of a stack, and its tensors as they are stored."""
        rotation = stack.rotation(self._context.spec.seed)
        weights = [weight.to(self._device) for weight in stack.weights(self._files)]
        hessian = self._hessians.of(stack.name)
        coded = quantize(weights, hessian.to(self._device), rotation, self._config)
        line = self._line(stack, rotation, coded, coded.pieces, hessian)
        return line, layout.stack_tensors(stack.name, coded.planes, coded.scales)

    def _described(self, tuned: TunedStack) -> tuple[Json, dict[str, torch.Tensor]]:
        """As :meth:`_code`, of a stack that was tuned: compared with the weights of the checkpoint."""
        stack, coded = tuned.stack, tuned.coded
        weights = [weight.to(self._device) for weight in stack.weights(self._files)]
        hessian = self._hessians.of(stack.name)
        signs = tuple(sign.to(self._device, torch.float32) for sign in tuned.signs)
        scales = coded.scales.to(self._device)
        pieces = compared(weights, coded.turned, scales, (signs[0], signs[1]), hessian.to(self._device))
        line = self._line(stack, tuned.rotation, coded, pieces, hessian)
        return line, layout.stack_tensors(stack.name, coded.planes, coded.scales, tuned.signs)

    def _line(
        self, stack: Stack, rotation: Rotation, coded: Coded, pieces: Iterable[Piece], hessian: torch.Tensor
    ) -> Json:
        found = self._hessians.line(stack.name)
        return stack_line(
            stack,
            rotation,
            rows=found["rows"],
            origin=found["origin"],
            rho=coded.rho,
            damping=coded.damping,
            feedback=coded.feedback,
            dead=int((hessian.diagonal() <= 0).sum()),
            pieces=[asdict(piece) for piece in pieces],
        )

    def _watched(self, done: Iterator[int], total: int) -> None:
        self._context.progress(next(done), total, "stacks")


def _run(block: Block, states: HiddenStates, outputs: HiddenStates, device: str) -> None:
    """What ``block`` makes of all ``states``, into ``outputs``."""
    with torch.no_grad():
        for windows in states.batches():
            outputs.write(windows, block(states.read(windows, device)))


def _in_order(block: Block, stacks: list[Stack], states: HiddenStates, device: str) -> list[Stack]:
    """``stacks`` in the order in which the block uses them."""
    groups = block.groups(states.read(range(1), device))
    places = {linear.name: place for place, group in enumerate(groups) for linear in group.linears}
    return sorted(stacks, key=lambda stack: places[stack.name])


def _report(context: StepContext, lines: Iterable[Json]) -> None:
    """Say what a person should know of the Hessians and of what was rounded without them."""
    for line in lines:
        name = line["linears"][0]["name"]
        if line["origin"] != "own":
            context.log(
                f"'{name}' saw {line['rows']} tokens of its own: rounded on the {line['origin']} Hessian", "warning"
            )
        if line["dead"]:
            context.log(f"{line['dead']} of {line['rotation']['inputs']} inputs of '{name}' are always zero", "info")
        if not line["feedback"]:
            context.log(f"the Hessian of '{name}' has no Cholesky factor: rounded without feedback", "warning")
