"""How much an error of each weight costs, from one forward and one backward pass over windows of calibration text.

With ``g`` the gradient by a linear's output of the log-probability of tokens drawn from the model's own distribution,
the KL divergence that an error ``E`` of its weight makes over a window is about ``1/2 E[(sum_t g_t E x_t)^2]`` (the
Fisher matrix of the weight). Samples of ``x`` and ``g`` are kept, because a delta is aligned with both: an estimate
from their second moments alone is hundreds of times too small for what is left out of a fine-tune, though right for
noise.

Embeddings and head, whose errors are noise, use second moments: an output head costs ``1/2 sum_vj o_v h_j E_vj^2`` with
``o_v = p_v (1 - p_v)`` and ``h_j = E[x_j^2]``, an embedding ``1/2 sum_vj f_v o_j E_vj^2`` with ``f_v`` the frequency of
token ``v``. Estimates add up over matrices, so that bytes can be spent where they save most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from compression_worker.contracts import CompressionError
from compression_worker.deltas.moments import Moments, Samples
from compression_worker.distillation import Batch
from compression_worker.making.loading import module_path

WINDOWS, LENGTH, BATCH = 32, 24, 8
"""Windows of calibration text that are looked at, their tokens, and how many windows at a time."""
NO_NAMES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Sensed:
    """By name: samples of linears, and moments of embeddings and head (a tied head as ``name#head``)."""

    moments: dict[str, Moments]
    samples: dict[str, Samples]
    tokens: int


def sense(
    model: Any,
    names: Sequence[str],
    batches: Iterator[Batch],
    watch: Callable[[int], None],
    memory: Mapping[str, str] = NO_NAMES,
) -> Sensed:
    """What linears ``names``, embeddings and head see; ``model`` in fp32 without gradients of its own.

    ``memory`` maps a checkpoint's names to those of the model in memory where they differ. Raises
    :class:`CompressionError` (``no_inputs``) where a weight is no linear of its own.
    """
    collector = _Collector(model, names, memory)
    tokens = 0
    generator = torch.Generator().manual_seed(0)
    with collector.hooked():
        for done, batch in enumerate(batches, start=1):
            tokens += int(batch.real.sum())
            collector.real = batch.real
            logits = model(batch.tokens, use_cache=False).logits
            flat = logits[batch.real]
            chances = flat.detach().softmax(dim=-1)
            drawn = torch.multinomial(chances.cpu(), 1, generator=generator).to(flat.device)
            flat.log_softmax(dim=-1).gather(1, drawn).sum().backward()
            collector.see_head(chances)
            watch(done)
    return collector.found(tokens)


class _Collector:
    """Sums of squares, gathered by hooks on the modules that own the weights."""

    def __init__(self, model: Any, names: Sequence[str], memory: Mapping[str, str]) -> None:
        model.requires_grad_(False)
        modules = dict(model.named_modules())
        self._linears: dict[str, Any] = {
            name: modules.get(module_path(memory.get(name, name), modules, model.base_model_prefix)) for name in names
        }
        for name, module in self._linears.items():
            if module is None or not hasattr(module, "weight"):
                raise CompressionError(
                    "no_inputs",
                    f"the inputs of '{name}' cannot be seen, because the model computes it together with others: "
                    "use scale_fit=mean and no target",
                )
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        shown = {own: name for name, own in memory.items()}
        self._names = {id(tensor): shown.get(name, name) for name, tensor in model.named_parameters()}
        self._sums: dict[str, Moments] = {}
        self._pairs: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in names}
        self._head_input = torch.zeros(0)
        self.real = torch.zeros(0, dtype=torch.bool)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [self._embedding.register_forward_hook(self._see_embedding)]
        for name, module in self._linears.items():
            handles.append(module.register_forward_hook(self._see_linear(name)))
        if self._head is not None:
            handles.append(self._head.register_forward_hook(self._see_head_input))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def see_head(self, chances: torch.Tensor) -> None:
        """The Fisher diagonal of logits is ``p (1 - p)``."""
        if self._head is not None:
            name = self._names[id(self._head.weight)]
            key = name if self._head.weight is not self._embedding.weight else f"{name}#head"
            self._add(key, (chances * (1 - chances)).sum(dim=0), self._head_input)

    def found(self, tokens: int) -> Sensed:
        count = max(tokens, 1)
        moments = {name: Moments(one.outputs / count, one.inputs / count) for name, one in self._sums.items()}
        samples = {
            name: Samples(_stacked(pairs, 0), _stacked(pairs, 1), count) for name, pairs in self._pairs.items() if pairs
        }
        return Sensed(moments, samples, tokens)

    def _see_linear(self, name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: self._keep(name, x, gradient))

        return hook

    def _keep(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Samples of one linear; some families run a linear on flat ``(B * T, K)``."""
        shape = (*self.real.shape, -1)
        real = self.real[..., None]
        pair = ((side.reshape(shape) * real).to(torch.bfloat16).cpu() for side in (x, gradient))
        self._pairs[name].append(tuple(pair))

    def _see_embedding(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        tokens = inputs[0].reshape(-1)[self.real.reshape(-1)]
        often = torch.bincount(tokens, minlength=module.weight.shape[0]).to(torch.float32)
        name = self._names[id(module.weight)]
        output = output.detach().requires_grad_(True)
        output.register_hook(lambda gradient: self._add(name, often, self._rows(gradient).square().sum(dim=0)))
        return output

    def _see_head_input(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._head_input = self._rows(inputs[0].detach()).square().sum(dim=0)

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        return values.detach().reshape(-1, values.shape[-1])[self.real.reshape(-1)]

    def _add(self, name: str, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        if name in self._sums:
            self._sums[name].outputs += outputs
            self._sums[name].inputs += inputs
        else:
            self._sums[name] = Moments(outputs.clone(), inputs.clone())


def _stacked(pairs: list[tuple[torch.Tensor, ...]], side: int) -> torch.Tensor:
    """One side of all batches as ``(W, T, ...)``; a shorter batch is filled with zeros, which cost nothing."""
    longest = max(pair[side].shape[1] for pair in pairs)
    filled = [torch.nn.functional.pad(pair[side], (0, 0, 0, longest - pair[side].shape[1])) for pair in pairs]
    return torch.cat(filled)
