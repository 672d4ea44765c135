"""The group size of least error on calibration text (our reading of the paper's attention error).

Candidates are ``alpha, 2 alpha, 4 alpha ...`` up to the whole row. *Attention error*: query and key projections of the
first block are built for each candidate, and ``E = sum_x |Q K^T - Q_hat K_hat^T|^2`` is taken before the softmax, from
the layer's own inputs and weights without rotation; query heads meet the key head that they share. *Output error*:
``sum_x |x (D_hat - D)^T|^2`` of every linear of the first block. The argmin serves all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from compression_worker.architecture import Linear
from compression_worker.checkpoints import load_model
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput
from compression_worker.deltas.pair import open_pair, whole_delta
from compression_worker.making.calibration import calibration_windows
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.loading import module_path
from compression_worker.making.table import six_digits
from compression_worker.methods.deltadq.config import DeltaDQConfig
from compression_worker.methods.deltadq.quantize import Dropout, delta_tiles, survivors

WINDOWS, LENGTH = 8, 128
"""Calibration text that is looked at."""


def search_step(context: StepContext) -> StepOutput:
    """The group size, and the error of every candidate."""
    params = context.spec.params
    config = DeltaDQConfig(**params["config"])
    linears = [Linear(**linear) for linear in params["linears"]]
    variant = opened(context, "variant")
    windows = calibration_windows(context, variant, length=LENGTH, needed=WINDOWS)
    model = load_model(variant, device=context.device, dtype=torch.float32)
    own = architecture_of(variant).memory
    seen = _inputs(model, linears, [windows.batch(at, 1).tokens.to(context.device) for at in range(WINDOWS)], own)
    error, criterion = _criterion(config, model, linears, seen, context, own)
    sizes = candidates(config.alpha, max(linear.inputs for linear in linears))
    errors: dict[int, float] = {}
    with open_pair(context, []) as (base, theirs):
        deltas = {linear.name: whole_delta(linear, base, theirs) for linear in linears}
    for size in sizes:
        hats = {
            linear.name: _hat(linear, index, deltas[linear.name], config, size, context.spec.seed)
            for index, linear in enumerate(linears)
        }
        errors[size] = error(deltas, hats)
        context.progress(len(errors), len(sizes), "group sizes")
    best = min(sizes, key=lambda size: (errors[size], size))
    context.log(f"group size {best} has the least {criterion.replace('_', ' ')} of {len(sizes)} sizes", "info")
    scores = [{"group_size": size, "error": six_digits(errors[size])} for size in sizes]
    return StepOutput(data={"group_size": best, "criterion": criterion, "scores": scores})


def candidates(alpha: int, inputs: int) -> list[int]:
    """``alpha, 2 alpha, 4 alpha ...`` up to the whole row."""
    sizes = []
    size = alpha
    while size < inputs:
        sizes.append(size)
        size *= 2
    return [*sizes, -(-inputs // alpha) * alpha]


Error = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], float]


def _criterion(
    config: DeltaDQConfig,
    model: Any,
    linears: list[Linear],
    seen: dict[str, torch.Tensor],
    context: StepContext,
    own: Mapping[str, str],
) -> tuple[Error, str]:
    query, key = (next((one for one in linears if one.name.endswith(f"{side}_proj.weight")), None) for side in "qk")
    if config.group_size_by == "attention_error" and query and key:
        width = _head_width(model, key)
        return _attention_error(query, key, width, seen, _full_weights(model, (query, key), own)), "attention_error"
    if config.group_size_by == "attention_error":
        context.log(
            "the first block has no query and key projections of their own: its output error is used", "warning"
        )
    return _output_error(seen), "output_error"


def _attention_error(
    query: Linear, key: Linear, width: int, seen: dict[str, torch.Tensor], full: dict[str, torch.Tensor]
) -> Error:
    """``|Q K^T - Q_hat K_hat^T|^2`` over all windows and heads."""

    def attention_error(deltas: dict[str, torch.Tensor], hats: dict[str, torch.Tensor]) -> float:
        total = 0.0
        for x in seen[query.name]:
            queries, keys = (x @ full[one.name].T for one in (query, key))
            other, others = (x @ (full[one.name] - deltas[one.name] + hats[one.name]).T for one in (query, key))
            error = _products(queries, keys, width) - _products(other, others, width)
            total += float(error.square().sum(dtype=torch.float64))
        return total

    return attention_error


def _products(query: torch.Tensor, key: torch.Tensor, width: int) -> torch.Tensor:
    """``(heads, T, T)`` of queries ``(T, heads * width)`` and keys ``(T, key heads * width)``."""
    heads, shared = query.shape[1] // width, key.shape[1] // width
    keys = key.view(len(key), shared, width).repeat_interleave(heads // shared, dim=1)
    return torch.einsum("thd,shd->hts", query.view(len(query), heads, width), keys)


def _output_error(seen: dict[str, torch.Tensor]) -> Error:
    def error(deltas: dict[str, torch.Tensor], hats: dict[str, torch.Tensor]) -> float:
        return sum(
            float((x @ (hats[name] - deltas[name]).T).square().sum(dtype=torch.float64))
            for name, windows in seen.items()
            for x in windows
        )

    return error


def _hat(linear: Linear, index: int, delta: torch.Tensor, config: DeltaDQConfig, size: int, seed: int) -> torch.Tensor:
    dropout = Dropout(seed=seed, tensor=index, alpha=config.alpha, group_size=size)
    made = survivors(delta, dropout, config.num_bits)
    return torch.cat(list(delta_tiles(made.codes, made.grid, dropout, linear.inputs)))


def _inputs(
    model: Any, linears: list[Linear], windows: list[torch.Tensor], own: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """What goes into each linear, fp32 ``(windows, T, K)`` on the CPU."""
    modules = dict(model.named_modules())
    found: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in linears}
    with contextlib.ExitStack() as stack:
        for linear in linears:
            module = modules.get(module_path(own.get(linear.name, linear.name), modules, model.base_model_prefix))
            if module is None:
                raise CompressionError(
                    "no_inputs",
                    f"the inputs of '{linear.name}' cannot be seen, because the model computes it together with "
                    "others: give a group_size",
                )
            stack.enter_context(_hook(module, found[linear.name]))
        with torch.no_grad():
            for window in windows:
                model(window, use_cache=False)
    return {name: torch.stack(_even(rows)) for name, rows in found.items()}


def _even(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Windows of one length: a shorter one is filled with zeros, which add nothing to an error."""
    longest = max(len(row) for row in rows)
    return [torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows]


@contextlib.contextmanager
def _hook(module: Any, found: list[torch.Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(
        lambda module, inputs, output: found.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).cpu())
    )
    try:
        yield
    finally:
        handle.remove()


def _full_weights(model: Any, linears: tuple[Linear, ...], own: Mapping[str, str]) -> dict[str, torch.Tensor]:
    modules = dict(model.named_modules())
    owners = {
        one.name: modules[module_path(own.get(one.name, one.name), modules, model.base_model_prefix)] for one in linears
    }
    return {name: owner.weight.detach().cpu().to(torch.float32) for name, owner in owners.items()}


def _head_width(model: Any, key: Linear) -> int:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return key.outputs // heads


def group_sizes(found: Json | None, config: DeltaDQConfig) -> int:
    """The size that is used: the one found, or the one given."""
    return int(found["group_size"] if found else config.group_size or config.alpha)
