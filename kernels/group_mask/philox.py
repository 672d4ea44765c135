"""Philox4x32-10 in numpy: the generator as published, and all words of a grid of counters with few passes over memory.

Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter has four 32-bit words, a key two.
A round multiplies words 0 and 2 by constants to 64 bits and gives, with ``(h, l)`` the halves of a product,

    c0', c1', c2', c3' = h2 ^ c1 ^ k0, l2, h0 ^ c3 ^ k1, l0

and the key moves on by a constant a round. Words lie in the low halves of uint64. There are whole numbers only, so that
every processor makes the same.
"""

from __future__ import annotations

import numpy as np

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Key = tuple[int, int]

LOW = np.array(0xFFFFFFFF, dtype=np.uint64)
HALF = np.array(32, dtype=np.uint64)
MULTIPLIERS = np.array(0xD2511F53, dtype=np.uint64), np.array(0xCD9E8D57, dtype=np.uint64)
INCREMENTS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MIXED = 3
"""Rounds after which all words but the last depend on a grid's block, group and row at once."""


def philox(counter: Words, key: Key) -> Words:
    """The four words of each counter: four uint64 arrays of 32-bit words that broadcast; so do the four it returns."""
    for keys in round_keys(key):
        counter = philox_round(counter, keys)
    return counter


def round_keys(key: Key) -> list[Key]:
    """The key of each round."""
    return [
        ((key[0] + at * INCREMENTS[0]) & 0xFFFFFFFF, (key[1] + at * INCREMENTS[1]) & 0xFFFFFFFF) for at in range(ROUNDS)
    ]


def philox_round(counter: Words, key: Key) -> Words:
    """One round. Arrays that do not depend on each other stay as small as they are."""
    c0, c1, c2, c3 = counter
    first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
    k0, k1 = (np.uint64(word) for word in key)
    return (second >> HALF) ^ (c1 ^ k0), second & LOW, (first >> HALF) ^ (c3 ^ k1), first & LOW


def grid_words(blocks: np.ndarray, groups: np.ndarray, rows: np.ndarray, tensor: int, key: Key) -> np.ndarray:
    """The words of counters (block, group, row, tensor) as uint32 ``(rows, groups, 4 * blocks)``, word by word.

    The first rounds work on small arrays. The others reuse memory, and meet the key every other round: an even round
    puts its own key on the high half of a product and the next round's on the low half, which that round uses as it is.
    """
    keys = round_keys(key)
    words: Words = (blocks, groups[:, None], rows[:, None, None], np.array(tensor, dtype=np.uint64))
    for own in keys[:MIXED]:
        words = philox_round(words, own)
    c0, c1, c2, c3 = words
    c1, c3 = c1 ^ np.uint64(keys[MIXED][0]), np.broadcast_to(c3 ^ np.uint64(keys[MIXED][1]), c0.shape)
    free0, free2 = np.empty_like(c0), np.empty_like(c0)
    for at in range(MIXED, ROUNDS - 1):
        first, second = np.multiply(c0, MULTIPLIERS[0], out=c0), np.multiply(c2, MULTIPLIERS[1], out=c2)
        if at % 2 == 0:
            first ^= np.uint64(keys[at][1] << 32 | keys[at + 1][1])
            second ^= np.uint64(keys[at][0] << 32 | keys[at + 1][0])
        c0, c2 = _mixed(second, c1, free0), _mixed(first, c3, free2)
        free0, free2 = c1, c3 if c3.flags.writeable else np.empty_like(c0)
        second &= LOW
        first &= LOW
        c1, c3 = second, first
    return _last_round(c0, c1, c2, c3)


def _mixed(product: np.ndarray, word: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The high half of a product with a word."""
    np.right_shift(product, HALF, out=out)
    return np.bitwise_xor(out, word, out=out)


def _last_round(c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray) -> np.ndarray:
    """The words of the last round beside each other, as uint32; its key is in words 1 and 3 already."""
    first, second = np.multiply(c0, MULTIPLIERS[0], out=c0), np.multiply(c2, MULTIPLIERS[1], out=c2)
    found = np.empty((*c0.shape, 4), dtype=np.uint32)
    found[..., 0] = _mixed(second, c1, np.empty_like(c0))
    found[..., 1] = second
    found[..., 2] = _mixed(first, c3, np.empty_like(c0))
    found[..., 3] = first
    return found.reshape(*c0.shape[:-1], -1)
