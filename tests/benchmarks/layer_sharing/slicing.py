"""Directions deleted from the residual stream (SliceGPT, arXiv:2401.15024), for models of the Llama family in fp32.

A norm that only divides by the root mean square commutes with every rotation ``Q (D, D)``, so that a stream can lie in
the basis of its own principal components, and lose the last ones. With ``Q_l (D, d)`` the ``d`` that are kept where
norm ``l`` reads, and the norm's weight ``g_l`` in the linears behind it:

    in:  W diag(g_l) Q_l (N, d)        out:  Q_(l+1)^T W (d, K)        residual:  x Q_l^T Q_(l+1) (d, d)

``Q_l`` holds the first eigenvectors of the second moment of what the norm gives without its weight, on text that went
through the blocks before as they are by then; attention and MLP have one each. The mean of a norm is over ``D`` as it
was, also where ``d`` are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Batches = list[tuple[torch.Tensor, dict[str, Any]]]
"""Residual streams ``(B, T, d)``, and what else the blocks are given."""


class Norm(torch.nn.Module):
    """``x / sqrt(sum x^2 / D + eps)`` of ``x (..., d)``, without a weight: that is in the linears behind it."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        (self._size,), self._eps = norm.weight.shape, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / self._size + self._eps)


class Block(torch.nn.Module):
    """A block whose residual stream turns into the next basis at each sublayer: ``adapters (d, d)`` of both."""

    def __init__(self, layer: Any, size: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = Norm(layer.input_layernorm)
        self.post_attention_layernorm = Norm(layer.post_attention_layernorm)
        self.adapters = torch.nn.ParameterList([torch.eye(size), torch.eye(size)])

    def forward(self, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        return self.past_mlp(self.past_attention(hidden_states, **more))

    def past_attention(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
        added: torch.Tensor = self.self_attn(hidden_states=self.input_layernorm(x), **more)[0]
        return x @ self.adapters[0] + added

    def past_mlp(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.mlp(self.post_attention_layernorm(x))
        return x @ self.adapters[1] + added


class Turned(torch.nn.Module):
    """Embeddings ``(V, D)`` that are the head's too, each turned as it is read: ``turn (D, d)``."""

    def __init__(self, embeddings: Any, turn: torch.Tensor) -> None:
        super().__init__()
        self.embeddings, self.turn = embeddings, torch.nn.Parameter(turn)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.embeddings(ids) @ self.turn
        return found


class TurnedHead(torch.nn.Module):
    """The head of embeddings ``(V, D)``, behind a turn back: ``turn (D, d)``."""

    def __init__(self, head: Any, turn: torch.Tensor) -> None:
        super().__init__()
        self.head, self.turn = head, torch.nn.Parameter(turn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(x @ self.turn.T)
        return logits


def is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def stays_tied(model: Any, size: int) -> bool:
    """Whether embeddings of full width and two turns weigh less than embeddings and a head of ``size`` each."""
    vocabulary, full = model.model.embed_tokens.weight.shape
    return bool(is_tied(model) and vocabulary * full + 2 * full * size < 2 * vocabulary * size)


def sliced_parameters(model: Any, size: int) -> int:
    """Parameters that :func:`cut` leaves at width ``size``: linears, adapters, embeddings and head; norms have none."""
    vocabulary, full = model.model.embed_tokens.weight.shape
    count = vocabulary * full + 2 * full * size if stays_tied(model, size) else 2 * vocabulary * size
    for layer in model.model.layers:
        for name, linear in _linears(layer):
            outputs, inputs = linear.weight.shape
            biases = 0 if linear.bias is None else size if _writes(name) else outputs
            count += size * (inputs if _writes(name) else outputs) + biases
        count += 2 * size * size
    return int(count)


def cut(model: Any, windows: torch.Tensor, size: int) -> None:
    """Keep ``size`` directions of the residual stream of ``model``, read from ``windows (n, T)``.

    Embeddings that are tied stay so where that weighs less (:func:`stays_tied`); else the model has a head of its own.
    """
    with torch.no_grad():
        batches = _entering(model, windows)
        turn = _turn([x for x, _ in batches], Norm(model.model.layers[0].input_layernorm), size)
        entry, batches = turn, [(x @ turn, more) for x, more in batches]
        norms = [one for layer in model.model.layers for one in (layer.input_layernorm, layer.post_attention_layernorm)]
        norms.append(model.model.norm)
        for at, layer in enumerate(model.model.layers):
            block = Block(layer, size)
            for half, sublayer in enumerate((block.self_attn, block.mlp)):
                here, behind = norms[2 * at + half : 2 * at + half + 2]
                batches, turn = _cut_sublayer(block, half, sublayer, here, behind, batches, turn)
            model.model.layers[at] = block
        _cut_ends(model, entry, turn, size)


def _cut_sublayer(
    block: Block, half: int, sublayer: Any, here: Any, behind: Any, batches: Batches, turn: torch.Tensor
) -> tuple[Batches, torch.Tensor]:
    """One sublayer reads with ``turn (D, d)`` and writes with the turn that the norm ``behind`` it asks for."""
    for name, linear in _linears(sublayer):
        if not _writes(name):
            _put(sublayer, name, linear.weight * here.weight @ turn, linear.bias)
    block.adapters[half] = torch.nn.Parameter(turn.T.clone())  # out into the full width, until the next turn is known
    whole = [block.past_mlp(x) if half else block.past_attention(x, **more) for x, more in batches]
    after = _turn(whole, Norm(behind), turn.shape[1])
    for name, linear in _linears(sublayer):
        if _writes(name):
            _put(sublayer, name, after.T @ linear.weight, None if linear.bias is None else after.T @ linear.bias)
    block.adapters[half] = torch.nn.Parameter(turn.T @ after)
    return [(x @ after, more) for x, (_, more) in zip(whole, batches, strict=True)], after


def _cut_ends(model: Any, entry: torch.Tensor, turn: torch.Tensor, size: int) -> None:
    """Embeddings turn with ``entry (D, d)``, the head with ``turn (D, d)`` and the weight of the last norm."""
    embeddings, head, norm = model.model.embed_tokens, model.lm_head, model.model.norm
    back = norm.weight[:, None] * turn
    if stays_tied(model, size):
        model.model.embed_tokens, model.lm_head = Turned(embeddings, entry), TurnedHead(head, back)
    else:
        vocabulary = len(embeddings.weight)
        model.lm_head = _linear(head.weight @ back, head.bias)
        model.model.embed_tokens = torch.nn.Embedding(
            vocabulary, size, embeddings.padding_idx, _weight=embeddings.weight @ entry
        )
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # the two ends turn apart, also where they are of one matrix
    model.model.norm = Norm(norm)


def _turn(streams: list[torch.Tensor], norm: Norm, size: int) -> torch.Tensor:
    """``(D, size)``: the first eigenvectors of the second moment of ``norm(x)``, over all tokens, in fp64."""
    moment = sum(rows.T @ rows for rows in (norm(x).flatten(0, -2).double() for x in streams))
    assert isinstance(moment, torch.Tensor)
    _, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1)[:, :size].float()


def _entering(model: Any, windows: torch.Tensor) -> Batches:
    """What the first block is given, two windows at a time."""
    found: Batches = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        more = dict(kwargs)
        found.append((args[0] if args else more.pop("hidden_states"), more))

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for window in windows.split(2):
            model(window, use_cache=False)
    finally:
        handle.remove()
    return found


def _linears(module: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    return ((name, one) for name, one in list(module.named_modules()) if isinstance(one, torch.nn.Linear))


def _writes(name: str) -> bool:
    """Whether a linear of a block adds to the residual stream; the others read it."""
    return name.rpartition(".")[2] in ("o_proj", "down_proj")


def _put(parent: Any, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    setattr(parent, name, _linear(weight, bias))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    outputs, inputs = weight.shape
    made = torch.nn.Linear(inputs, outputs, bias=bias is not None)
    made.weight = torch.nn.Parameter(weight.detach().clone())
    made.bias = None if bias is None else torch.nn.Parameter(bias.detach().clone())
    return made
