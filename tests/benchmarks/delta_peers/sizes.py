"""Peers on disk: written as real files, counted, made as large as an artifact of ours, and read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from tests.benchmarks.delta_peers.pair import Pair
from tests.benchmarks.delta_peers.peers import Peer

CLOSE = 0.003
"""How near the wanted size the search stops, of that size."""
EQUAL = 0.02
"""How near two sizes have to be to count as equal."""
ATTEMPTS = 24


@dataclass(frozen=True)
class Match:
    """A dial and the size that it gives."""

    dial: float
    size: int


def encode_files(peer: Peer, pair: Pair, dial: float) -> dict[str, bytes]:
    """The files of a peer's form, by name."""
    stored = peer.encode(pair, dial)
    kept = {peer.kept_key(name): pair.variant.tensor(name).contiguous() for name in pair.kept(peer.scope)}
    return {peer.weights_file: save(stored | kept), **peer.extra_files(pair, dial)}


def write_files(files: dict[str, bytes], folder: Path) -> int:
    """The bytes that lie in ``folder`` afterwards, as the file system counts them."""
    folder.mkdir(parents=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return sum(path.stat().st_size for path in folder.iterdir())


def read_weights(peer: Peer, pair: Pair, folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model in fp32, from the files in ``folder`` and the base alone."""
    stored = load_file(folder / peer.weights_file)
    weights = {name: pair.base.tensor(name).float() for name in pair.names if name not in pair.changed}
    weights |= {name: stored[peer.kept_key(name)].float() for name in pair.kept(peer.scope)}
    return weights | {name: peer.weight(pair, stored, name) for name in pair.compressed(peer.scope)}


def nominal_ratio(peer: Peer, pair: Pair, folder: Path) -> float:
    """As papers count: the compressed matrices in the variant's dtype over their values, positions not counted."""
    kept = {peer.kept_key(name) for name in pair.kept(peer.scope)}
    stored = load_file(folder / peer.weights_file).items()
    counted = [tensor for key, tensor in stored if key not in kept and not peer.is_position(key)]
    source = [pair.variant.tensor(name) for name in pair.compressed(peer.scope)]
    return sum(map(_size, source)) / sum(map(_size, counted))


def match_size(peer: Peer, pair: Pair, wanted: int, sizes: dict[float, int]) -> Match | None:
    """The dial whose form has ``wanted`` bytes; the largest form where all are smaller, None where all are larger.

    ``sizes`` remembers what each dial gave, for the next search with the same peer.
    """
    dials = peer.dials(pair)
    if dials is None:
        raise ValueError(f"'{peer.label}' has no dial")

    def size(dial: float) -> int:
        if dial not in sizes:
            sizes[dial] = sum(len(raw) for raw in encode_files(peer, pair, dial).values())
        return sizes[dial]

    found = search(size, dials, wanted, whole=peer.whole_dial)
    return None if found.size > wanted * (1 + EQUAL) else found


def search(size: Callable[[float], int], dials: tuple[float, float], wanted: int, *, whole: bool) -> Match:
    """The dial between two whose size is nearest to ``wanted``, by halving and interpolating in turn."""
    low, high = (Match(dial, size(dial)) for dial in dials)
    best = min(low, high, key=lambda match: abs(match.size - wanted))
    for attempt in range(ATTEMPTS):
        if abs(best.size - wanted) <= CLOSE * wanted or not low.size < wanted < high.size:
            break
        # Size grows about linearly with the dial; halving gets unstuck where it does not.
        share = 0.5 if attempt % 3 == 2 else (wanted - low.size) / (high.size - low.size)
        dial = low.dial + share * (high.dial - low.dial)
        dial = float(min(max(round(dial), low.dial + 1), high.dial - 1)) if whole else dial
        if not low.dial < dial < high.dial:
            break
        found = Match(dial, size(dial))
        best = min(best, found, key=lambda match: abs(match.size - wanted))
        low, high = (found, high) if found.size < wanted else (low, found)
    return best


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
