"""Hadamard matrices of many orders, made when they are asked for, and the transform of each dimension.

A Hadamard matrix of order h has entries +-1 and ``H H^T = h I``. Sylvester: order 2^a, ``(-1)^popcount(i & j)``. Paley
I: order q + 1 for a prime power q = 3 mod 4. Paley II: order 2 (q + 1) for a prime power q = 1 mod 4. (R. Paley, "On
orthogonal matrices", J. Math. Phys. 12, 1933.) The Kronecker product of two is one again.

:func:`plan` says how a dimension ``n = o 2^a`` (o odd) is transformed by an orthogonal ``Q``, n by n:

    direct      (H_h kron H_m) / sqrt(n)          h = o 2^t the smallest Paley order, m = n / h
    kronecker   (H_h1 kron ... kron H_m) / sqrt(n)   o is a product of the odd parts of Paley orders
    fourier     unitary FFT of C^(n/2) after fixed phases, for even n (QuIP#, arXiv 2402.04396, A.2)
    block       I_o kron H_m / sqrt(m)            m = 2^a: blocks of their own; the identity where n is odd

Only whole numbers decide, so that every machine plans alike; a plan as a dictionary goes into a manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np

from kernels.hadamard.fields import character_of_differences, prime_power

LARGEST_FACTOR = 1024
"""The largest dense factor that a plan uses: above, a product or a Fourier transform costs less than its matrix."""
KINDS = ("direct", "kronecker", "fourier", "block")


@dataclass(frozen=True)
class Plan:
    """How a dimension is transformed: ``n = copies * product of factors * sylvester``.

    ``factors`` are orders of Paley matrices, outermost first; ``sylvester`` is 2^a, the innermost order; ``copies`` are
    the blocks of a block-diagonal transform. A Fourier plan has no factors; ``seed`` fixes its phases.
    """

    kind: str
    n: int
    factors: tuple[int, ...] = ()
    sylvester: int = 1
    copies: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a transform of kind '{self.kind}' is unknown: {', '.join(KINDS)} are known")
        if self.n < 1 or self.sylvester < 1 or self.sylvester & (self.sylvester - 1):
            raise ValueError(f"dimension {self.n} and power of two {self.sylvester} do not fit a transform")
        if self.kind == "fourier":
            if self.n % 2 or self.factors or self.copies != 1 or self.sylvester != 1:
                raise ValueError(f"a Fourier transform of dimension {self.n} wants an even one, and no factors")
        elif self.copies * self.sylvester * prod(self.factors) != self.n:
            raise ValueError(f"{self.copies} x {self.factors} x {self.sylvester} is not {self.n}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed {self.seed} does not fit 64 bits")
        for order in self.factors:
            if paley(order) is None:
                raise ValueError(f"no Paley matrix has order {order}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; :func:`plan_from` reads them."""
        return asdict(self) | {"factors": list(self.factors)}


def plan_from(values: Mapping[str, Any]) -> Plan:
    """The plan that :meth:`Plan.as_dict` wrote. ValueError where it is none, so that a foreign manifest cannot pass."""
    fields = {"kind", "n", "factors", "sylvester", "copies", "seed"}
    if set(values) != fields:
        raise ValueError(f"a transform's plan has the fields {', '.join(sorted(fields))}, not {sorted(values)}")
    factors = values["factors"] if isinstance(values["factors"], list | tuple) else [None]
    numbers = [*factors, *(values[name] for name in ("n", "sylvester", "copies", "seed"))]
    if any(type(number) is not int for number in numbers):
        raise ValueError(f"a transform's plan is made of whole numbers: {dict(values)}")
    return Plan(**{**values, "factors": tuple(factors)})


@cache
def plan(n: int, *, fourier: bool = True, largest: int = LARGEST_FACTOR) -> Plan:
    """The transform of dimension ``n`` >= 1: the first that exists of direct, kronecker, fourier and block.

    ``fourier`` False leaves the Fourier transform out; ``largest`` bounds the order of a Paley factor.
    """
    if n < 1:
        raise ValueError(f"dimension {n} has no transform: 1 at least")
    power = n & -n
    odd = n // power
    if odd == 1:
        return Plan("direct", n, (), n)
    order = _smallest_paley(odd, power, largest)
    if order:
        return Plan("direct", n, (order,), n // order)
    factors = _product_of_paleys(odd, power, largest)
    if factors:
        return Plan("kronecker", n, factors, n // prod(factors))
    if fourier and n % 2 == 0:
        return Plan("fourier", n)
    return Plan("block", n, (), power, odd)


@cache
def paley(order: int) -> tuple[str, int] | None:
    """The construction ``("I" or "II", q)`` of a Hadamard matrix of this order, or None. I goes before II."""
    for name, q, rest in (("I", order - 1, 3), ("II", order // 2 - 1, 1)):
        if order % 4 == 0 and q % 4 == rest and prime_power(q):
            return name, q
    return None


@cache
def hadamard_matrix(order: int) -> np.ndarray:
    """A Hadamard matrix, int8 ``(order, order)``: Sylvester's where the order is a power of two, else Paley's.

    ValueError where neither construction has the order. The array is shared: it cannot be written to.
    """
    if order > 0 and order & (order - 1) == 0:
        matrix = _sylvester(order)
    else:
        found = paley(order)
        if found is None:
            raise ValueError(f"no Sylvester or Paley matrix has order {order}")
        matrix = _paley_one(found[1]) if found[0] == "I" else _paley_two(found[1])
    matrix.setflags(write=False)
    return matrix


def _sylvester(order: int) -> np.ndarray:
    matrix = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _paley_one(q: int) -> np.ndarray:
    """``I + S``, S skew: an all-plus row above a column of minus and ``chi(a_i - a_j)``."""
    matrix = np.ones((q + 1, q + 1), dtype=np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character_of_differences(q) + np.eye(q, dtype=np.int8)
    return matrix


def _paley_two(q: int) -> np.ndarray:
    """``C kron [[1, 1], [1, -1]] + I kron [[1, -1], [-1, -1]]``, C the symmetric conference matrix of order q + 1."""
    conference = np.ones((q + 1, q + 1), dtype=np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = character_of_differences(q)
    off, on = np.array([[1, 1], [1, -1]], dtype=np.int8), np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(conference, off) + np.kron(np.eye(q + 1, dtype=np.int8), on)


def _smallest_paley(odd: int, power: int, largest: int) -> int | None:
    """The smallest Paley order ``odd * 2^t`` with 2^t up to ``power``."""
    order = odd
    while order <= min(odd * power, largest):
        if paley(order):
            return order
        order *= 2
    return None


@cache
def _product_of_paleys(odd: int, power: int, largest: int) -> tuple[int, ...] | None:
    """Paley orders, largest first, whose odd parts have the product ``odd`` and whose powers of two one of at most
    ``power``; of all such the one with the least sum, which is what the transform costs. () for 1."""
    if odd == 1:
        return ()
    found = []
    for divisor in range(3, odd + 1, 2):
        order = _smallest_paley(divisor, power, largest) if odd % divisor == 0 else None
        if order:
            others = _product_of_paleys(odd // divisor, power // (order // divisor), largest)
            if others is not None:
                found.append(tuple(sorted((order, *others), reverse=True)))
    return min(found, key=lambda orders: (sum(orders), orders), default=None)
