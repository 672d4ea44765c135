"""Finite fields GF(q), q = p^k: which of their elements are squares.

An element is the number whose digits to the base p are the coefficients of its polynomial, lowest first, so that for
k = 1 elements are the numbers modulo p. Multiplication is modulo a monic polynomial of degree k that is primitive: the
powers of its root walk through all q - 1 elements that are not zero, and the even powers are the squares. The smallest
such polynomial is taken. What is a square does not depend on the choice but by renaming elements.
"""

from __future__ import annotations

from functools import cache

import numpy as np


@cache
def prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q = p^k``, p prime and k >= 1, or None."""
    if q < 2:
        return None
    prime = next((divisor for divisor in range(2, int(q**0.5) + 1) if q % divisor == 0), q)
    exponent, rest = 0, q
    while rest % prime == 0:
        exponent, rest = exponent + 1, rest // prime
    return (prime, exponent) if rest == 1 else None


def quadratic_character(q: int) -> np.ndarray:
    """chi of each element of GF(q), q an odd prime power: int8 ``(q,)``, 1 for squares, -1 for others, 0 for zero."""
    found = prime_power(q)
    if found is None or found[0] == 2:
        raise ValueError(f"no quadratic character of order {q}: it is no odd prime power")
    powers = _powers(*found)
    character = np.zeros(q, dtype=np.int8)
    character[powers[0::2]] = 1
    character[powers[1::2]] = -1
    return character


def character_of_differences(q: int) -> np.ndarray:
    """``chi(a - b)`` for all pairs of elements of GF(q): int8 ``(q, q)``, a by rows."""
    character = quadratic_character(q)
    prime, exponent = prime_power(q) or (q, 1)
    elements, difference = np.arange(q), np.zeros((q, q), dtype=np.int64)
    for place in range(exponent):
        digit = elements // prime**place % prime
        difference += (digit[:, None] - digit[None, :]) % prime * prime**place
    return character[difference]


def _powers(prime: int, degree: int) -> list[int]:
    """The powers 0 .. q - 2 of a root of the smallest primitive polynomial."""
    order = prime**degree - 1
    for tail in range(1, prime**degree):
        powers = _walk(prime, degree, tail, order)
        if len(powers) == order:
            return powers
    raise AssertionError(f"GF({prime}^{degree}) has a primitive polynomial")


def _walk(prime: int, degree: int, tail: int, order: int) -> list[int]:
    """Powers of the root of ``X^degree - tail`` until one is 1 again; tail is a polynomial, as a number."""
    top = prime ** (degree - 1)
    multiples = [_times(prime, tail, factor) for factor in range(prime)]
    powers, element = [1], tail if degree == 1 else prime
    while element > 1 and len(powers) < order:
        powers.append(element)
        lead, rest = divmod(element, top)
        element = _sum(prime, rest * prime, multiples[lead])
    return powers if element == 1 else []


def _times(prime: int, element: int, times: int) -> int:
    """``times`` times an element."""
    total, place = 0, 1
    while element:
        element, digit = divmod(element, prime)
        total += digit * times % prime * place
        place *= prime
    return total


def _sum(prime: int, left: int, right: int) -> int:
    total, place = 0, 1
    while left or right:
        (left, one), (right, other) = divmod(left, prime), divmod(right, prime)
        total += (one + other) % prime * place
        place *= prime
    return total
