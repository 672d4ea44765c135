"""One transformer block at a time: the model's skeleton has no weights, and a block gets its own while it runs.

The whole of transformers' model is built on the meta device. What stands before the blocks (embeddings, positions) and
what a model computes for all of them (masks, rotary angles) runs as transformers wrote it, so that any family runs; the
blocks themselves are called with the arguments that the model would give them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from compression_worker.architecture import Linear, blocks_of, build
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError
from compression_worker.making.inputs import architecture_of
from compression_worker.making.loading import module_path
from compression_worker.tensors import checkpoint_files

GATE_UP = "gate_up_proj"
"""What transformers calls the stack of the matrices that read the input of the experts."""


class _Reached(Exception):
    """The forward pass came as far as it was wanted."""


class BlockRunner:
    """Runs single blocks of ``checkpoint`` in fp32. A context manager: it holds the checkpoint's files open."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.architecture = architecture_of(checkpoint)
        self.device = device
        self._files = checkpoint_files(checkpoint)
        self._model = build(checkpoint.manifest["config"]).eval().requires_grad_(False)
        _make_buffers(self._model, device)
        self._blocks = blocks_of(self._model)
        self._stored = {own: name for name, own in self.architecture.memory.items()}
        known = checkpoint.manifest["tensors"]
        self._aliases = {name: target for name, target in checkpoint.manifest["aliases"] if name not in known}
        self._fill_around()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def width(self) -> int:
        """``H``, the size of a hidden state."""
        return int(self._embedding.weight.shape[1])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens (B, T)`` -> what goes into the first block, fp32 ``(B, T, H)``. Reads only the rows it needs."""
        rows, places = tokens.unique(return_inverse=True)
        name = self._name(self._embedding_name)
        whole = self._files.file(name).tensor(name)
        with self._with_table(whole[rows].to(self.device, torch.float32)):
            hidden, _, _ = self._called_with(0, places.to(self.device))
        return hidden.clone()

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Block ``index`` with its weights in memory, in fp32."""
        path, module = self._blocks[index]
        for own, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if parameter.is_meta:
                _put(module, own, self._read(f"{path}.{own}", parameter.shape))
        try:
            yield Block(self, index, module)
        finally:
            module.to("meta")

    def arguments(self, index: int, batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model gives block ``index`` beside the hidden state, for ``batch`` full windows."""
        with self._with_table(torch.zeros(1, self.width, device=self.device)):
            tokens = torch.zeros((batch, length), dtype=torch.int64, device=self.device)
            _, args, kwargs = self._called_with(index, tokens)
        return args, kwargs

    def _called_with(self, index: int, tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _Reached

        before = [module for _, module in self._blocks[:index]]
        handle = self._blocks[index][1].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for module in before:
                module.forward = _pass_on
            with torch.no_grad(), contextlib.suppress(_Reached):
                self._model(tokens, use_cache=False)
        finally:
            handle.remove()
            for module in before:
                del module.forward
        args, kwargs = seen[0]
        return (args[0], args[1:], kwargs) if args else (kwargs.pop("hidden_states"), (), kwargs)

    def _fill_around(self) -> None:
        """Weights of what is no block; embeddings and head, the large ones, stay away."""
        self._embedding = self._model.get_input_embeddings()
        head = self._model.get_output_embeddings()
        inside = tuple(f"{path}." for path, _ in self._blocks)
        self._embedding_name = ""
        for own, parameter in self._model.named_parameters():
            if parameter is self._embedding.weight:
                self._embedding_name = own
            elif not own.startswith(inside) and (head is None or parameter is not head.weight):
                _put(self._model, own, self._read(own, parameter.shape))

    @contextlib.contextmanager
    def _with_table(self, table: torch.Tensor) -> Iterator[None]:
        """The embedding with ``table`` in the place of all rows."""
        empty = self._embedding.weight
        self._embedding.weight = torch.nn.Parameter(table, requires_grad=False)
        padding, self._embedding.padding_idx = self._embedding.padding_idx, None
        try:
            yield
        finally:
            self._embedding.weight, self._embedding.padding_idx = empty, padding

    def _read(self, own: str, shape: torch.Size) -> torch.Tensor:
        if own in self.architecture.stacks:
            rows = [self._weight(one.name) for one in self.architecture.stacks[own]]
            return torch.cat(rows).view(shape)
        return self._weight(self._name(own))

    def _name(self, own: str) -> str:
        name = self._stored.get(own, own)
        return self._aliases.get(name, name)

    def _weight(self, name: str) -> torch.Tensor:
        return self._files.file(name).tensor(name).to(self.device, torch.float32)


@dataclass(frozen=True)
class Group:
    """Linears of one block that read the same input.

    Groups of one ``stage`` can be seen in one pass, and stages follow each other as the block runs. An expert's
    matrices are two groups: those that read the ``input`` of the experts, and the one that reads what is ``between``.
    """

    linears: tuple[Linear, ...]
    stage: int
    expert: int = -1
    side: str = ""
    owner: str = ""

    @property
    def name(self) -> str:
        """How the group's Hessian is called."""
        return self.linears[0].name

    @property
    def inputs(self) -> int:
        """``K``"""
        return self.linears[0].inputs


class Block:
    """A block that has its weights. ``(B, T, H)`` in, ``(B, T, H)`` out.

    ``path`` is its name in ``model``, whose other blocks have none.
    """

    def __init__(self, runner: BlockRunner, index: int, module: Any) -> None:
        self._runner = runner
        self.index = index
        self.path = runner._blocks[index][0]
        self.module = module
        self.model = runner._model
        self.linears = runner.architecture.blocks[index]
        self._modules = dict(runner._model.named_modules())
        self._arguments: dict[tuple[int, int], Any] = {}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._given(hidden)
        found = self.module(hidden, *args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    def owner(self, linear: Linear) -> Any:
        """The module whose weight ``linear`` is."""
        own = self._runner.architecture.memory.get(linear.name, linear.name)
        return self._modules[module_path(own, self._modules, self._runner._model.base_model_prefix)]

    def weight(self, linear: Linear) -> torch.Tensor:
        """``W (N, K)`` in fp32, as it stands now."""
        place = self._place(linear)
        if place is not None:
            return place.clone()
        weight = self.owner(linear).weight
        return (weight.T if linear.transposed else weight).detach().clone()

    def set_weight(self, linear: Linear, weight: torch.Tensor) -> None:
        """Put ``weight (N, K)`` in the place of the linear's."""
        place = self._place(linear)
        if place is None:
            place = self.owner(linear).weight.detach()
            place = place.T if linear.transposed else place
        place.copy_(weight)

    def groups(self, hidden: torch.Tensor) -> list[Group]:
        """The linears by distinct input, in the order of their first use; ``hidden (B, T, H)`` is one small batch."""
        seen: dict[int, list[Linear]] = {}
        kept: list[torch.Tensor] = []

        def hook(linear: Linear, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            kept.append(inputs[0])  # so that no later tensor gets its address
            seen.setdefault(id(inputs[0]), []).append(linear)

        plain = [linear for linear in self.linears if self._place(linear) is None]
        with self._hooked((self.owner(one), partial(hook, one)) for one in plain):
            self(hidden)
        used = {linear for group in seen.values() for linear in group}
        if unused := [linear.name for linear in plain if linear not in used]:
            raise CompressionError("unused_linear", f"'{unused[0]}' is not used when its block runs: it has no inputs")
        found = [Group(tuple(group), stage) for stage, group in enumerate(seen.values())]
        return found + self._experts(len(found))

    def see(
        self, groups: Sequence[Group], hidden: torch.Tensor, take: Callable[[Group, torch.Tensor], None], *, stop: bool
    ) -> torch.Tensor | None:
        """Run the block on ``hidden`` and give the inputs ``(tokens, K)`` of each of ``groups`` to ``take``.

        ``stop``: what comes after the last of them is left out, and there is no output.
        """
        waiting = len({group.owner or group.name for group in groups})

        def done() -> None:
            nonlocal waiting
            waiting -= 1
            if stop and not waiting:
                raise _Reached

        def plain(group: Group, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            take(group, inputs[0].detach().flatten(0, -2))
            done()

        def mixture(owner: str, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            for group in groups:
                if group.owner == owner:
                    take(group, _of_expert(module, group, *inputs[:2]))
            done()

        hooks = [(self.owner(one.linears[0]), partial(plain, one)) for one in groups if not one.owner]
        owners = dict.fromkeys(one.owner for one in groups if one.owner)
        hooks += [(self._modules[owner], partial(mixture, owner)) for owner in owners]
        with self._hooked(hooks), contextlib.suppress(_Reached):
            return self(hidden)
        return None

    @contextlib.contextmanager
    def _hooked(self, hooks: Iterable[tuple[Any, Callable[..., None]]]) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _experts(self, stage: int) -> list[Group]:
        """Two groups an expert: gate and up, then down."""
        mine = {linear.name: linear for linear in self.linears}
        found: dict[tuple[str, int, int], list[Linear]] = {}
        for own, slices in self._runner.architecture.stacks.items():
            owner, _, child = own.rpartition(".")
            for one in slices:
                if one.name in mine:
                    stack = getattr(self._modules[owner], child)
                    late = int(child != GATE_UP)
                    found.setdefault((owner, late, one.first // stack.shape[1]), []).append(mine[one.name])
        return [
            Group(tuple(linears), stage + late, expert, "between" if late else "input", owner)
            for (owner, late, expert), linears in sorted(found.items(), key=lambda item: item[0])
        ]

    def _given(self, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._arguments:
            self._arguments[shape] = self._runner.arguments(self.index, *shape)
        args, kwargs = self._arguments[shape]
        return args, dict(kwargs)

    def _place(self, linear: Linear) -> torch.Tensor | None:
        """The expert's rows inside its stack; None for a linear that is a module of its own."""
        for own, slices in self._runner.architecture.stacks.items():
            for one in slices:
                if one.name == linear.name:
                    parent, _, child = own.rpartition(".")
                    stack = getattr(self._modules[parent], child).detach()
                    return stack.view(-1, stack.shape[-1])[one.first : one.first + one.rows]
        return None


def _of_expert(module: Any, group: Group, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The rows that an expert gets: ``hidden (tokens, H)`` of those that chose it, or what its first matrices make.

    None where the family's experts are not built of a stacked gate and up and an activation.
    """
    routed = hidden[(chosen == group.expert).any(dim=-1)].detach()
    if group.side == "input":
        return routed
    if not (hasattr(module, GATE_UP) and hasattr(module, "act_fn")):
        return hidden.new_zeros((0, group.inputs))
    gate, up = torch.nn.functional.linear(routed, getattr(module, GATE_UP)[group.expert]).chunk(2, dim=-1)
    return (module.act_fn(gate) * up).detach()


def split(count: int, most: int) -> list[range]:
    """``range(count)`` in at most ``most`` runs of nearly equal length."""
    parts = min(count, most)
    edges = [count * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def _make_buffers(model: Any, device: str) -> None:
    """Buffers in memory, computed as the model's family does it; parameters stay on the meta device."""
    for module in model.modules():
        if own := [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]:
            for name in own:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
            model._init_weights(module)


def _put(root: Any, name: str, tensor: torch.Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = root.get_submodule(path)
    if own in module._parameters:
        module._parameters[own] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[own] = tensor


def _pass_on(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return hidden_states


def window_batches(windows: int, length: int, tokens: int) -> Sequence[range]:
    """Windows by batches of about ``tokens`` tokens."""
    size = max(1, tokens // length)
    return [range(start, min(windows, start + size)) for start in range(0, windows, size)]
