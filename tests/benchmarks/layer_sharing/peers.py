"""The peers, on models of the Llama family in fp32: each changes a model in place and says how many parameters went.

A peer may remove fewer parameters than asked for, where its steps are coarse, and never more: it is then the larger
model of the two that are compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.benchmarks.layer_sharing.slicing import cut, is_tied, sliced_parameters


class Impossible(Exception):
    """The smallest step of a peer is larger than what may go."""


class Absent(torch.nn.Module):
    """Stands where a sublayer was dropped: adds nothing to the residual stream."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self._pair = pair

    def forward(self, hidden_states: torch.Tensor, **ignored: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self._pair else nothing


class Thin(torch.nn.Module):
    """``y = (x A^T) B^T``: a linear of rank r. ``A (r, K)``, ``B (N, r)``."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, self.a), self.b)


def parameters(model: Any) -> int:
    return sum(one.numel() for one in model.parameters())


def dropped_blocks(model: Any, windows: torch.Tensor, most: int) -> None:
    """ShortGPT: the blocks with the least influence, ``1 - cos(input, output)`` over all tokens, are left out."""
    layers = model.model.layers
    count = _blocks_in(model, most)
    influence = [0.0] * len(layers)

    def watch(at: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            influence[at] += float(1 - torch.cosine_similarity(before, after, dim=-1).mean())

        return hook

    _read(model, windows, [(layer, watch(at)) for at, layer in enumerate(layers)])
    gone = set(sorted(range(len(layers)), key=lambda at: influence[at])[:count])
    _keep(model, [layer for at, layer in enumerate(layers) if at not in gone])


def dropped_sublayers(model: Any, windows: torch.Tensor, most: int) -> None:
    """Attention and MLP ranked together by ``1 - cos(x, x + f(x))``; each goes, with its norm, while there is room."""
    layers = model.model.layers
    kinds = (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm"))
    stream: dict[tuple[int, str], torch.Tensor] = {}
    influence: dict[tuple[int, str], float] = {}
    watched = []
    for at, layer in enumerate(layers):
        for kind, norm in kinds:

            def entered(module: Any, args: Any, kwargs: Any, output: Any, key: tuple[int, str] = (at, kind)) -> None:
                stream[key] = args[0] if args else kwargs["hidden_states"]

            def left(module: Any, args: Any, kwargs: Any, output: Any, key: tuple[int, str] = (at, kind)) -> None:
                before, added = stream.pop(key), output[0] if isinstance(output, tuple) else output
                likeness = torch.cosine_similarity(before, before + added, dim=-1).mean()
                influence[key] = influence.get(key, 0.0) + float(1 - likeness)

            watched += [(getattr(layer, norm), entered), (getattr(layer, kind), left)]
    _read(model, windows, watched)
    removed = 0
    norms = dict(kinds)
    for at, kind in sorted(influence, key=lambda key: influence[key]):
        size = parameters(getattr(layers[at], kind)) + parameters(getattr(layers[at], norms[kind]))
        if removed + size <= most:
            removed += size
            setattr(layers[at], kind, Absent(kind == "self_attn"))
            setattr(layers[at], norms[kind], torch.nn.Identity())
    if not removed:
        raise Impossible("one sublayer is more than may go")


def merged_blocks(model: Any, windows: torch.Tensor, most: int) -> None:
    """As LaCo: blocks ``l + 1 ... l + m`` merge into block ``l``, ``W_l + sum (W_(l+k) - W_l)``, where it changes least.

    One block at a time joins the run before it: the one after which the last hidden states are most like the full
    model's.
    """
    count = _blocks_in(model, most)
    originals = list(model.model.layers)
    runs = [[at] for at in range(len(originals))]
    with torch.no_grad():
        wanted = _hidden(model, windows)
        for _ in range(count):
            likeness = []
            for at in range(len(runs) - 1):
                _keep(model, [_merged(originals, run) for run in _joined(runs, at)])
                likeness.append(float(torch.cosine_similarity(_hidden(model, windows), wanted, dim=-1).mean()))
            runs = _joined(runs, likeness.index(max(likeness)))
        _keep(model, [_merged(originals, run) for run in runs])


def _joined(runs: list[list[int]], at: int) -> list[list[int]]:
    return [*runs[:at], runs[at] + runs[at + 1], *runs[at + 2 :]]


def _merged(originals: list[Any], run: list[int]) -> Any:
    if len(run) == 1:
        return originals[run[0]]
    made = copy.deepcopy(originals[run[0]])
    first = originals[run[0]].state_dict()
    for name, tensor in made.state_dict().items():
        for at in run[1:]:
            tensor.add_(originals[at].state_dict()[name] - first[name])
    return made


def thin(model: Any, windows: torch.Tensor, most: int, *, by_input: bool) -> None:
    """Every block linear at the same share of its rank, so that ``most`` parameters go in all.

    ``by_input``: the best product for the inputs of the text, from singular values of ``W S``, ``S S^T`` their second
    moment.
    """
    names = {linear: name for name, linear in linears_of(model)}
    share = _share(model, most)
    moments = _moments(model, windows) if by_input else {}
    for linear, name in names.items():
        rows, columns = linear.weight.shape
        rank = math.ceil(share * rows * columns / (rows + columns))
        if rank >= min(rows, columns):
            continue
        weight = linear.weight.detach().double().cpu()
        root = torch.linalg.cholesky(moments[name]) if by_input else torch.eye(columns, dtype=torch.float64)
        u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
        half = s[:rank].sqrt()
        back = torch.linalg.solve_triangular(root, (half[:, None] * v[:rank]), upper=False, left=False)
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            Thin(back.float(), (u[:, :rank] * half).float()).to(linear.weight.device),
        )


def thin_by_input(model: Any, windows: torch.Tensor, most: int) -> None:
    thin(model, windows, most, by_input=True)


def thin_by_weight(model: Any, windows: torch.Tensor, most: int) -> None:
    thin(model, windows, most, by_input=False)


def deleted_directions(model: Any, windows: torch.Tensor, most: int) -> None:
    """SliceGPT: the least principal directions of the residual stream go, as many everywhere; adapters are counted.

    A tied model gains a head, or keeps its embeddings at full width and gains a turn at each end: whichever is smaller
    at that width, so that most directions stay.
    """
    whole, (_, full) = parameters(model), model.model.embed_tokens.weight.shape
    fitting = (size for size in range(1, full + 1) if whole - sliced_parameters(model, size) <= most)
    size = next(fitting, full)
    if (left := sliced_parameters(model, size)) >= whole:
        gained = "adapters, and ends that are no longer tied," if is_tied(model) else "adapters"
        raise Impossible(
            f"with {size} of {full} directions a model of {whole:,} parameters has {left:,}, because {gained} weigh "
            f"more than goes; with one less more than {most:,} go"
        )
    cut(model, windows, size)


PEERS: dict[str, Callable[[Any, torch.Tensor, int], None]] = {
    "blocks dropped (ShortGPT)": dropped_blocks,
    "sublayers dropped (JointDrop)": dropped_sublayers,
    "blocks merged (LaCo)": merged_blocks,
    "directions deleted (SliceGPT)": deleted_directions,
    "SVD of each matrix": thin_by_weight,
    "SVD by inputs of each matrix": thin_by_input,
}


def _blocks_in(model: Any, most: int) -> int:
    size = parameters(model.model.layers[0])
    count = most // size
    if not count:
        raise Impossible(f"a block is {size:,} parameters, and {most:,} may go")
    return int(count)


def _keep(model: Any, layers: list[Any]) -> None:
    for at, layer in enumerate(layers):
        layer.self_attn.layer_idx = at
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)


def _hidden(model: Any, windows: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.model(windows, use_cache=False).last_hidden_state
    return found


def linears_of(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linears of all blocks by path."""
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            yield name, module


def _share(model: Any, most: int) -> float:
    """Share ``s`` of a matrix's parameters that its two factors have, so that all of them together lose ``most``."""
    whole = sum(linear.weight.numel() for _, linear in linears_of(model))
    if most >= whole:
        raise Impossible("more may go than the blocks have")
    return 1 - most / whole


def _moments(model: Any, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moment ``(K, K)`` of the inputs of each linear, fp64, with a hundredth of its mean diagonal added."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            found[name] = found.get(name, 0) + (x.T @ x).double().cpu()

        return hook

    _read(model, windows, [(linear, watch(name)) for name, linear in linears_of(model)])
    for moment in found.values():
        moment.diagonal().add_(0.01 * moment.diagonal().mean())
    return found


def _read(model: Any, windows: torch.Tensor, watched: list[tuple[Any, Callable[..., None]]]) -> None:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in watched]
    try:
        with torch.no_grad():
            for window in windows.split(2):
                model(window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
