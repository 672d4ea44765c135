"""Lets transformers load our artifacts by ``from_pretrained``: formats that are registered when transformers comes.

Registering needs transformers, which needs torch, and the web process imports this package and stays without both. So
nothing is imported here: where transformers' table of quantizers is there already, the formats are entered at once;
otherwise one finder waits for that module, lets Python import it as ever, enters the formats and is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLE = "transformers.quantizers.auto"
"""The module of transformers that knows quantizers by name."""
FORMATS = (
    "compression_worker.methods.deltallm.pretrained",
    "compression_worker.methods.quip_sharp.pretrained",
)
"""Modules that enter a format into the table when they are imported."""


def register_with_transformers() -> None:
    """Enter our formats now, or as soon as transformers is imported. May be called again."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    for name in FORMATS:
        import_module(name)


class _Waiting(MetaPathFinder):
    """Finds one module, once, and adds to what happens when it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Another loader's work, and then the registration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
