"""How much an error of each weight costs: second moments of what goes into a linear and of what its output costs.

For a linear ``y = W x`` and an error ``E`` of its weight, the KL divergence of the model from itself without the error
is about ``1/2 sum_ij o_i h_j E_ij^2`` a token, with ``h_j = E[x_j^2]`` and ``o_i = E[g_i^2]``; ``g`` is the gradient by
``y`` of the log-probability of a token drawn from the model's own distribution (the diagonal of a Kronecker-factored
Fisher matrix). The estimate adds up over matrices, so that bytes can be spent where they save most.

An output head is a linear as well; an embedding costs ``1/2 sum_vj f_v o_j E_vj^2`` with ``f_v`` the frequency of token
``v``. One forward and one backward pass over calibration windows give all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from compression_worker.contracts import CompressionError
from compression_worker.deltas.loading import module_path
from compression_worker.deltas.moments import Moments
from compression_worker.distillation import Batch

WINDOWS, BATCH = 16, 2
"""Windows of calibration text that are looked at, and how many at a time."""


def sense(
    model: Any, names: Sequence[str], batches: Iterator[Batch], watch: Callable[[int], None]
) -> dict[str, Moments]:
    """Moments of the linears ``names``, of embeddings and head; ``model`` in fp32 without gradients of its own.

    A tied head adds its cost to that of the embedding under the embedding's name, as two entries ``name`` and
    ``name#head``. Raises :class:`CompressionError` (``no_inputs``) where a weight is no linear of its own.
    """
    collector = _Collector(model, names)
    tokens = 0
    generator = torch.Generator().manual_seed(0)
    with collector.hooked():
        for done, batch in enumerate(batches, start=1):
            tokens += int(batch.real.sum())
            collector.real = batch.real.reshape(-1)
            logits = model(batch.tokens, use_cache=False).logits
            flat = logits.reshape(-1, logits.shape[-1])[collector.real]
            chances = flat.detach().softmax(dim=-1)
            drawn = torch.multinomial(chances.cpu(), 1, generator=generator).to(flat.device)
            flat.log_softmax(dim=-1).gather(1, drawn).sum().backward()
            collector.see_head(chances)
            watch(done)
    return collector.means(tokens)


class _Collector:
    """Sums of squares, gathered by hooks on the modules that own the weights."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        model.requires_grad_(False)
        modules = dict(model.named_modules())
        self._linears: dict[str, Any] = {
            name: modules.get(module_path(name, modules, model.base_model_prefix)) for name in names
        }
        for name, module in self._linears.items():
            if module is None or not hasattr(module, "weight"):
                raise CompressionError(
                    "no_inputs",
                    f"the inputs of '{name}' cannot be seen, because the model computes it together with others: "
                    "use scale_fit=mean and no target",
                )
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._names = {id(tensor): name for name, tensor in model.named_parameters()}
        self._sums: dict[str, Moments] = {}
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

    def means(self, tokens: int) -> dict[str, Moments]:
        count = max(tokens, 1)
        return {name: Moments(one.outputs / count, one.inputs / count) for name, one in self._sums.items()}

    def _see_linear(self, name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen = self._rows(inputs[0]).square().sum(dim=0)
            output.register_hook(lambda gradient: self._add(name, self._rows(gradient).square().sum(dim=0), seen))

        return hook

    def _see_embedding(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        tokens = inputs[0].reshape(-1)[self.real]
        often = torch.bincount(tokens, minlength=module.weight.shape[0]).to(torch.float32)
        name = self._names[id(module.weight)]
        output = output.detach().requires_grad_(True)
        output.register_hook(lambda gradient: self._add(name, often, self._rows(gradient).square().sum(dim=0)))
        return output

    def _see_head_input(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._head_input = self._rows(inputs[0].detach()).square().sum(dim=0)

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        return values.detach().reshape(-1, values.shape[-1])[self.real]

    def _add(self, name: str, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        if name in self._sums:
            self._sums[name].outputs += outputs
            self._sums[name].inputs += inputs
        else:
            self._sums[name] = Moments(outputs.clone(), inputs.clone())
