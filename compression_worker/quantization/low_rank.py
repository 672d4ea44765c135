"""The best product ``B A`` of a given rank in the place of a matrix, ``A (r, K)`` and ``B (N, r)``.

    |D - B A|_F is least for the truncated singular value decomposition, and its square is the sum of the squares of
    the singular values that were left out (Eckart and Young, 1936).

With the Hessian ``H = C C^T`` of inputs, the error of a layer's output is ``|(D - B A) C|``, which is least for
``B A = SVD_r(D C) C^{-1}`` (EoRA, arXiv:2410.21271; QERA, arXiv:2410.06040). The Hessian is damped as it is for
rounding.
"""

from __future__ import annotations

import torch

DAMPING = 0.01
EXACT_SIDE = 4096
"""Up to this shorter side a decomposition is exact, through the eigenvalues of the smaller Gram matrix in fp64."""
SPARE_RANK, POWER_ITERATIONS = 16, 6


def truncated(matrix: torch.Tensor, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` and ``B`` in fp32, half of each singular value on either side, so that both learn at one pace.

    A matrix with a longer shorter side than :data:`EXACT_SIDE` is decomposed at random by ``seed`` (Halko et al.,
    arXiv:0909.4061). Where the rank exceeds a side, factors end in zeros.
    """
    kept = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_SIDE:
        left, values, right = _by_gram(matrix.double(), kept)
    else:
        left, values, right = _at_random(matrix.float(), kept, seed)
    half = values.sqrt()
    a = matrix.new_zeros((rank, matrix.shape[1]), dtype=torch.float32)
    b = matrix.new_zeros((matrix.shape[0], rank), dtype=torch.float32)
    a[:kept] = (half[:, None] * right).float()
    b[:, :kept] = (left * half).float()
    return a, b


def closed_form(
    error: torch.Tensor, hessian: torch.Tensor, rank: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """``A (r, K)`` and ``B (N, r)`` with ``scale * B A`` nearest to ``error (N, K)``, and the share of it that stays.

    The share is ``|(error - scale B A) C|^2 / |error C|^2``. Where the rank exceeds a side, factors end in zeros.
    """
    root = _root(hessian.double())
    weighed = error.double() @ root
    kept = min(rank, *weighed.shape)
    left, values, right = _by_gram(weighed, kept)
    # Half of each singular value on either side, so that both factors learn at one pace.
    half = (values / scale).sqrt()
    a, b = torch.zeros((rank, error.shape[1])), torch.zeros((len(error), rank))
    inverse = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    a[:kept] = (half[:, None] * inverse).to(torch.float32).cpu()
    b[:, :kept] = (left * half).to(torch.float32).cpu()
    total = float(weighed.square().sum())
    return a, b, max(0.0, 1 - float(values.square().sum()) / total) if total else 0.0


def _by_gram(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``U_r``, ``S_r``, ``V_r^T``; one side is orthonormal, the other the projection of the matrix onto it."""
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = _by_gram(matrix.T, rank)
        return right.T, values, left.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    projected = vectors.T @ matrix
    values = projected.norm(dim=1)
    return vectors, values, projected / values.clamp_min(torch.finfo(values.dtype).tiny)[:, None]


def _at_random(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(matrix, min(rank + SPARE_RANK, *matrix.shape), niter=POWER_ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank].T


def _root(hessian: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor of the Hessian, with enough added to its diagonal that there is one."""
    damping = DAMPING
    mean = float(hessian.diagonal().mean()) or 1.0
    while True:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and bool(root.isfinite().all()):
            return root
        damping *= 10
