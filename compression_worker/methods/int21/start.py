"""Adapters that begin as the best low-rank answer to what quantization lost, weighted by what each input carries.

With the Hessian ``H = C C^T`` of full-precision inputs, the error of a layer's output is ``|(W - W^ - s B A) C|``,
which is least for ``s B A = SVD_r((W - W^) C) C^{-1}`` (EoRA, arXiv:2410.21271; QERA, arXiv:2410.06040). The Hessian is
damped as it is for rounding.
"""

from __future__ import annotations

import torch

from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.making.inputs import opened
from compression_worker.making.reading import ArtifactTensors
from compression_worker.making.table import six_digits
from compression_worker.methods.int21 import packed_base as base_method
from compression_worker.methods.int21.config import Int21Config
from compression_worker.methods.int21.layout import keys
from compression_worker.methods.int21.training import ADAPTER_FILE
from compression_worker.quantization.calibration import Hessians
from compression_worker.tensors import Spec, TensorFiles, checkpoint_files, raw_bytes, write_file

DAMPING = 0.01


def start_step(context: StepContext) -> StepOutput:
    """Factors of every adapted linear in fp32, and how much of each one's weighted error they take away."""
    config = Int21Config(**context.spec.params["config"])
    base = base_method.packed_base(context)
    checkpoint = opened(context, "variant")
    hessians = Hessians(context, checkpoint.fingerprint)
    beneath = base_method.implementation(base)
    found: dict[str, torch.Tensor] = {}
    left: Json = {}
    places = base_method.adapted(base)
    with checkpoint_files(checkpoint) as files, beneath.open_merged(None, base) as packed:
        for done, (name, path) in enumerate(places.items(), start=1):
            error = _error(files, packed, name).to(context.device)
            a, b, share = closed_form(error, hessians.of(name).to(context.device), config.rank, config.scale)
            first, second = keys(path)
            found[first], found[second] = a.cpu(), b.cpu()
            left[name] = six_digits(share)
            context.progress(done, len(places), "linears")
    with context.store.writer() as blob:
        whole = {name: tensor.contiguous() for name, tensor in found.items()}
        write_file(blob, {name: (Spec("F32", tuple(one.shape)), [raw_bytes(one)]) for name, one in whole.items()})
    return StepOutput(blobs={ADAPTER_FILE: blob.digest}, data={"left": left})


def closed_form(
    error: torch.Tensor, hessian: torch.Tensor, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """``A (r, K)`` and ``B (N, r)`` with ``scale * B A`` nearest to ``error (N, K)``, and the share of it that stays.

    The share is ``|(error - scale B A) C|^2 / |error C|^2``. Where the rank exceeds a side, factors end in zeros.
    """
    root = _root(hessian.double())
    left, values, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    kept = min(rank, len(values))
    # Half of each singular value on either side, so that both factors learn at one pace.
    half = (values[:kept] / scale).sqrt()
    a, b = torch.zeros((rank, error.shape[1])), torch.zeros((len(error), rank))
    inverse = torch.linalg.solve_triangular(root, right[:kept], upper=False, left=False)
    a[:kept] = (half[:, None] * inverse).to(torch.float32).cpu()
    b[:, :kept] = (left[:, :kept] * half).to(torch.float32).cpu()
    total = float(values.square().sum())
    return a, b, float(values[kept:].square().sum()) / total if total else 0.0


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


def _error(files: TensorFiles, packed: ArtifactTensors, name: str) -> torch.Tensor:
    """``W - W^ (N, K)`` in fp32."""
    whole = files.file(name).tensor(name).to(torch.float32) - packed.tensor(name, torch.float32)
    return whole.T if packed.table[name].get("transposed") else whole
