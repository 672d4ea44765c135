"""Linears without weights, for the time in which transformers loads what is stored as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from compression_worker.making.loading import module_path


class Hollow(torch.nn.Module):
    """Stands for a linear that is made from codes afterwards; holds its bias."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.bias = linear.bias
        # No parameter: some models draw the first values of their linears by name.
        self.weight = torch.empty(0)
        # In a tuple it is no child: its weight is not looked for in the files.
        self.stands_for = (linear,)


def owners(model: Any, weights: Iterable[str]) -> dict[str, Any]:
    """Path -> module of the owner of each weight, in their order."""
    modules = dict(model.named_modules())
    paths = [module_path(weight, modules, model.base_model_prefix) for weight in weights]
    return {path: modules[path] for path in paths}


def hollow_out(model: Any, weights: Iterable[str]) -> None:
    """Put a :class:`Hollow` in the place of the owner of each weight."""
    for path, linear in owners(model, weights).items():
        put_at(model, path, Hollow(linear))


def put_at(model: Any, path: str, module: torch.nn.Module) -> None:
    """Put ``module`` at ``path`` of the model."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
