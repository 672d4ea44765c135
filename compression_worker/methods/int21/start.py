"""Adapters that begin as the best low-rank answer to what quantization lost, weighted by what each input carries.

What is least is ``|(W - W^ - s B A) C|`` for the Hessian ``H = C C^T`` of full-precision inputs
(:mod:`compression_worker.quantization.low_rank`).
"""

from __future__ import annotations

import torch

from compression_worker.adapters import lora_names
from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.making.beneath import implementation, packed_base
from compression_worker.making.inputs import opened
from compression_worker.making.reading import ArtifactTensors
from compression_worker.making.table import six_digits
from compression_worker.methods.int21 import packed_base as base_method
from compression_worker.methods.int21.config import Int21Config
from compression_worker.methods.int21.training import ADAPTER_FILE
from compression_worker.quantization.calibration import Hessians
from compression_worker.quantization.low_rank import closed_form
from compression_worker.tensors import Spec, TensorFiles, checkpoint_files, raw_bytes, write_file


def start_step(context: StepContext) -> StepOutput:
    """Factors of every adapted linear in fp32, and how much of each one's weighted error they take away."""
    config = Int21Config(**context.spec.params["config"])
    base = packed_base(context)
    checkpoint = opened(context, "variant")
    hessians = Hessians(context, checkpoint.fingerprint)
    beneath = implementation(base)
    found: dict[str, torch.Tensor] = {}
    left: Json = {}
    places = base_method.adapted(base)
    with checkpoint_files(checkpoint) as files, beneath.open_merged(None, base) as packed:
        for done, (name, path) in enumerate(places.items(), start=1):
            error = _error(files, packed, name).to(context.device)
            a, b, share = closed_form(error, hessians.of(name).to(context.device), config.rank, config.scale)
            first, second = lora_names(path)
            found[first], found[second] = a.cpu(), b.cpu()
            left[name] = six_digits(share)
            context.progress(done, len(places), "linears")
    with context.store.writer() as blob:
        whole = {name: tensor.contiguous() for name, tensor in found.items()}
        write_file(blob, {name: (Spec("F32", tuple(one.shape)), [raw_bytes(one)]) for name, one in whole.items()})
    return StepOutput(blobs={ADAPTER_FILE: blob.digest}, data={"left": left})


def _error(files: TensorFiles, packed: ArtifactTensors, name: str) -> torch.Tensor:
    """``W - W^ (N, K)`` in fp32."""
    whole = files.file(name).tensor(name).to(torch.float32) - packed.tensor(name, torch.float32)
    return whole.T if packed.table[name].get("transposed") else whole
