"""The randomised Hadamard transform of a stack of matrices, on both sides: what makes weights look Gaussian.

A stack ``W (N, K)`` of matrices that read one input becomes ``Wt (N', K')``, and its Hessian ``Ht (K', K')``:

    Wt = Q_out^T diag(s_out) W diag(s_in) Q_in        Ht = Q_in^T diag(s_in) H diag(s_in) Q_in

with signs ``s`` of +-1 and the orthogonal ``Q`` of :mod:`kernels.hadamard.factors`, so that ``tr(W H W^T)`` stays what
it is (QuIP#, arXiv 2402.04396, section 3). The way back, of codes ``Wt_hat``, is the fixed matrix ``M = Q_out Wt_hat
Q_in^T`` and the layer ``y = s_out * M (s_in * x)``: there ``s`` may be real vectors that were trained.

``K' >= K`` is the next multiple of 8, and ``N'`` the next even number, so that there is a transform of the whole
dimension: columns and rows of zeros are added at the end, and dropped on the way back. They count in the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from kernels.hadamard.factors import Plan, plan, plan_from
from kernels.hadamard.signs import random_signs
from kernels.registry import choose

WORD = 8
"""Columns that a code word stands for."""


def padded(outputs: int, inputs: int) -> tuple[int, int]:
    """``(N', K')`` of a stack ``(N, K)``."""
    return outputs + outputs % 2, -(-inputs // WORD) * WORD


@dataclass(frozen=True)
class Rotation:
    """How one stack is transformed. ``stream`` numbers its signs among those of ``seed``."""

    outputs: int
    inputs: int
    output_plan: Plan
    input_plan: Plan
    seed: int
    stream: int

    @classmethod
    def of(cls, outputs: int, inputs: int, seed: int, stream: int) -> Self:
        """The rotation of a stack ``(outputs, inputs)``."""
        rows, columns = padded(outputs, inputs)
        return cls(outputs, inputs, plan(rows), plan(columns), seed, stream)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], seed: int) -> Self:
        """What :meth:`to_json` wrote into a manifest. Raises ``ValueError`` where it is none."""
        plans = plan_from(value["output_plan"]), plan_from(value["input_plan"])
        return cls(value["outputs"], value["inputs"], *plans, seed, value["stream"])

    def to_json(self) -> dict[str, Any]:
        return {
            "outputs": self.outputs,
            "inputs": self.inputs,
            "output_plan": self.output_plan.as_dict(),
            "input_plan": self.input_plan.as_dict(),
            "stream": self.stream,
        }

    def signs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``s_in (K,)`` and ``s_out (N,)``, +-1 in fp32: streams ``2 stream`` and ``2 stream + 1`` of the seed."""
        left = random_signs(self.inputs, self.seed, 2 * self.stream)
        return torch.from_numpy(left), torch.from_numpy(random_signs(self.outputs, self.seed, 2 * self.stream + 1))

    def weight(self, weight: torch.Tensor, s_in: torch.Tensor, s_out: torch.Tensor) -> torch.Tensor:
        """``W (N, K)`` -> ``Wt^T (K', N')``, a column of ``Wt`` in one run of memory."""
        signed = _grown(weight * s_in, self.output_plan.n, self.input_plan.n)
        signed[: self.outputs] *= s_out[:, None]
        return _transform(_transform(signed, self.input_plan).T, self.output_plan)

    def hessian(self, hessian: torch.Tensor, s_in: torch.Tensor) -> torch.Tensor:
        """``H (K, K)`` -> ``Ht (K', K')``, symmetric to the bit."""
        signed = _grown(hessian * s_in * s_in[:, None], self.input_plan.n, self.input_plan.n)
        turned = _transform(_transform(signed, self.input_plan).T, self.input_plan)
        return (turned + turned.T) / 2

    def back(self, rotated: torch.Tensor) -> torch.Tensor:
        """``Wt_hat (N', K')`` -> ``M (N, K)``, without signs."""
        columns = _transform(rotated, self.input_plan, transpose=True)[:, : self.inputs]
        return _transform(columns.T, self.output_plan, transpose=True)[:, : self.outputs].T


def _transform(x: torch.Tensor, plan: Plan, *, transpose: bool = False) -> torch.Tensor:
    """``x Q``, or ``x Q^T``, of rows."""
    y: torch.Tensor = choose("hadamard", x.device.type)(x.contiguous(), plan, None, transpose)
    return y


def _grown(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``matrix`` with zeros to the right and below."""
    if matrix.shape == (rows, columns):
        return matrix
    grown = matrix.new_zeros((rows, columns))
    grown[: len(matrix), : matrix.shape[1]] = matrix
    return grown
