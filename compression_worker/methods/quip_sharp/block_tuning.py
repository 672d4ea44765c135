"""Fine-tuning of one block: what is not coded yet makes up for what is. QuIP#, arXiv 2402.04396, appendix D.1.

The inputs and outputs of the block in the full-precision model are its lesson, so that blocks do not depend on each
other. Stacks are coded in the order of their use; after each but the last, Adam lowers the mean squared error of the
block's output in the linears that are left, the norms, and the sign vectors of the stacks that are coded. A third of
the windows is left out and chooses the best epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from compression_worker.architecture import Architecture, Linear
from compression_worker.contracts import CompressionError
from compression_worker.methods.quip_sharp.config import QuipSharpConfig
from compression_worker.methods.quip_sharp.quantize import Coded, quantize
from compression_worker.methods.quip_sharp.rotation import Rotation
from compression_worker.methods.quip_sharp.stacks import Stack
from compression_worker.methods.quip_sharp.student import Student, named_parameters
from compression_worker.quantization.blocks import Block, window_batches
from compression_worker.quantization.calibration import BATCH_TOKENS, HiddenStates

PATIENCE = 3
"""Epochs that are worse than the best, one after another, before it is enough."""

HessianOf = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class TunedStack:
    """A coded stack with its trained sign vectors ``s_in (K,)``, ``s_out (N,)``, in fp16 as they are stored."""

    stack: Stack
    rotation: Rotation
    coded: Coded
    signs: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TunedBlock:
    """``norms`` by name in fp32; ``losses``: after each stack but the last, the error of the epochs on the windows left
    out, the first before any training."""

    stacks: tuple[TunedStack, ...]
    norms: dict[str, torch.Tensor]
    losses: tuple[tuple[float, ...], ...]


class BlockTuning:
    """Codes and tunes one block. ``states`` hold its inputs, ``outputs`` what it makes of them in full precision."""

    def __init__(
        self,
        block: Block,
        architecture: Architecture,
        states: HiddenStates,
        outputs: HiddenStates,
        config: QuipSharpConfig,
        *,
        seed: int,
        device: str,
    ) -> None:
        self._block, self._states, self._outputs, self._config = block, states, outputs, config
        self._seed, self._device = seed, device
        self._student = Student(block.model, architecture, block.linears)
        inside = f"{block.path}."
        own = {id(parameter) for name, parameter in block.model.named_parameters() if name.startswith(inside)}
        norms = named_parameters(block.model, architecture, "norms")
        self._norms = {name: one.requires_grad_() for name, one in norms.items() if id(one) in own}
        windows = states.shape[0]
        learnt = max(1, min(windows - 1, math.ceil(windows * 2 / 3)))
        self._lesson, self._exam = range(learnt), range(learnt, windows) if windows > 1 else range(1)

    def run(self, stacks: Sequence[Stack], hessian_of: HessianOf, watch: Callable[[], None]) -> TunedBlock:
        """Code all ``stacks``, which come in the order of their use."""
        coded: list[tuple[Stack, Rotation, Coded]] = []
        losses = []
        left = [linear for stack in stacks for linear in stack.linears]
        for number, stack in enumerate(stacks):
            rotation = stack.rotation(self._seed)
            weights = [self._weight(linear) for linear in stack.linears]
            made = quantize(weights, hessian_of(stack.name).to(self._device), rotation, self._config)
            self._student.put(stack, made.turned, made.scales, rotation.signs())
            coded.append((stack, rotation, made))
            left = [linear for linear in left if linear not in stack.linears]
            if left:
                losses.append(self._tune(left, number))
            watch()
        kept = {name: one.detach().cpu() for name, one in self._norms.items()}
        return TunedBlock(tuple(self._tuned(*one) for one in coded), kept, tuple(losses))

    def _weight(self, linear: Linear) -> torch.Tensor:
        weight = self._student.weight(linear).detach()
        return weight.T.contiguous() if linear.transposed else weight.clone()

    def _tuned(self, stack: Stack, rotation: Rotation, coded: Coded) -> TunedStack:
        trained = self._student.stacks[stack.name]
        s_in, s_out = (sign.detach().cpu().to(torch.float16) for sign in (trained.s_in, trained.s_out))
        return TunedStack(stack, rotation, coded, (s_in, s_out))

    def _tune(self, left: Iterable[Linear], turn: int) -> tuple[float, ...]:
        """Train until the epochs are over or nothing is gained; the best epoch stays. Its losses."""
        rest = [*(self._student.weight(linear).requires_grad_() for linear in left), *self._norms.values()]
        signs = list(self._student.signs().values())
        adam = torch.optim.Adam(
            [{"params": rest, "lr": self._config.learning_rate}, {"params": signs, "lr": self._config.sign_rate}]
        )
        losses = [self._loss()]
        best, worse = _copied([*rest, *signs]), 0
        for epoch in range(self._config.block_epochs):
            self._epoch(adam, turn * self._config.block_epochs + epoch)
            losses.append(self._loss())
            if losses[-1] < min(losses[:-1]):
                best, worse = _copied([*rest, *signs]), 0
            elif (worse := worse + 1) == PATIENCE:
                break
        for parameter, value in zip([*rest, *signs], best, strict=True):
            parameter.data.copy_(value)
        return tuple(losses)

    def _epoch(self, adam: torch.optim.Adam, number: int) -> None:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % (1 << 63))
        order = torch.randperm(len(self._lesson), generator=generator).tolist()
        for start in range(0, len(order), self._config.batch_size):
            batch = order[start : start + self._config.batch_size]
            adam.zero_grad()
            for part in window_batches(len(batch), self._states.shape[1], BATCH_TOKENS):
                error = self._error([batch[at] for at in part])
                (error * (len(part) / len(batch))).backward()
            adam.step()

    def _loss(self) -> float:
        """The mean squared error on the windows left out."""
        total = 0.0
        with torch.no_grad():
            for part in window_batches(len(self._exam), self._states.shape[1], BATCH_TOKENS):
                total += float(self._error([self._exam[at] for at in part])) * len(part)
        found = total / len(self._exam)
        if not math.isfinite(found):
            raise CompressionError(
                "diverged", f"fine-tuning of block {self._block.index} is not finite: lower learning_rate"
            )
        return found

    def _error(self, windows: Sequence[int]) -> torch.Tensor:
        x, y = (
            torch.cat([states.read(range(at, at + 1), self._device) for at in windows])
            for states in (self._states, self._outputs)
        )
        return torch.nn.functional.mse_loss(self._block(x), y)


def _copied(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
