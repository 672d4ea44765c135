"""What training holds at once, from shapes alone: the packed base, adapters, what the backward pass needs. No torch.

    static  = packed codes and scales + all other weights + 16 bytes an adapter parameter (fp32, gradient, moments)
    kept    = the input of each block for each token of a pass (all that a block keeps, without checkpointing)
    peak    = static + kept + the larger of: two rows of the vocabulary a token, or what one block keeps, and gradients

Beside it stand three ways to train the same model on the same pass that keep dense weights: each is named, because a
ratio without its baseline says nothing. (The paper's 5.6 times has no stated baseline; by size it is LoRA on fp32
weights: our reading.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compression_worker.preflight import FLOAT, Shapes

STATES = 4
"""A parameter that is trained: itself, its gradient, and AdamW's two moments."""
LOSS_ROWS = 128
"""Rows of the vocabulary that :mod:`compression_worker.quantization.divergence` has in work at a time."""
LOSS_COPIES = 3
TILE_WEIGHTS, TILE_COPIES = 1 << 20, 2
"""What a packed product opens at a time, in fp32: the codes of a tile, and their values."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """``tokens`` that go through the model together, activations of ``item_bytes``; ``rank`` of the adapters."""

    tokens: int
    item_bytes: int
    rank: int
    checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes of tensors at the peak: of this method, and of three that keep dense weights."""

    packed: int
    lora_fp16: int
    lora_fp32: int
    full_finetune: int


def adapter_parameters(shapes: Shapes, rank: int) -> int:
    """``r (N + K)`` of every block linear."""
    return rank * shapes.layers * sum(one.inputs + one.outputs for one in shapes.block)


def peaks(shapes: Shapes, packed_bytes: int, one: Pass) -> Peaks:
    """``packed_bytes``: codes and scales of all block linears."""
    others = shapes.embeddings + shapes.head + shapes.norms + shapes.other
    everything = shapes.linears + others
    trained = STATES * FLOAT * adapter_parameters(shapes, one.rank)
    tile = TILE_COPIES * FLOAT * min(TILE_WEIGHTS, max(matrix.elements for matrix in shapes.block))
    half, whole = replace(one, item_bytes=2), replace(one, item_bytes=FLOAT)
    return Peaks(
        packed=packed_bytes + one.item_bytes * others + trained + passing(shapes, one, tile),
        lora_fp16=2 * everything + trained + passing(shapes, half),
        lora_fp32=FLOAT * everything + trained + passing(shapes, whole),
        full_finetune=STATES * FLOAT * everything + passing(shapes, replace(whole, rank=0)),
    )


def passing(shapes: Shapes, one: Pass, tile: int = 0) -> int:
    """What a pass forward and backward needs beside weights; ``tile`` is what a product opens of a packed one."""
    block, gradients = _block_items(shapes, one.rank)
    inputs = shapes.layers * shapes.hidden
    kept = inputs if one.checkpointing else inputs + (shapes.layers - 1) * block
    head = 2 * one.tokens * shapes.vocabulary * one.item_bytes
    head += LOSS_COPIES * FLOAT * min(LOSS_ROWS, one.tokens) * shapes.vocabulary
    inner = one.tokens * one.item_bytes * (block + gradients) + tile
    if not one.checkpointing:
        head += one.tokens * one.item_bytes * block
    return one.tokens * one.item_bytes * kept + max(head, inner)


def _block_items(shapes: Shapes, rank: int) -> tuple[int, int]:
    """Numbers a token that a block keeps for its backward pass, and those of the gradients at its widest place.

    Kept: three of the hidden state (behind both norms and between the halves), query, key and value as attention reads
    them with its output, four of the inner width, and what the adapters' first factors make.
    """
    hidden, inner = shapes.hidden, shapes.inner
    apart = len(shapes.block) > 4
    query, key = (shapes.block[0].outputs, shapes.block[1].outputs) if apart else (hidden, hidden)
    kept = 3 * hidden + 2 * query + 2 * key + 4 * inner + rank * len(shapes.block)
    return kept, 2 * inner + 2 * hidden
