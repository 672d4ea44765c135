"""What fine-tuning leaves, in the artifact's files: sign vectors beside the codes, norms in a file of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.methods.quip_sharp import layout
from compression_worker.methods.quip_sharp.layers import NORMS, store_tensors
from compression_worker.methods.quip_sharp.tuning import BEST
from compression_worker.tensors import TensorFile


def with_signs(context: StepContext, coded: Mapping[str, str], tuning: StepOutput) -> dict[str, str]:
    """The files of codes, each with the sign vectors that end-to-end fine-tuning has found best."""
    made = {}
    with TensorFile(context.store.verified_path(tuning.blobs[BEST])) as best:
        for number, (file, digest) in enumerate(coded.items()):
            with TensorFile(context.store.verified_path(digest)) as codes:
                tensors = {name: codes.tensor(name) for name in codes.entries}
            for stack in [name.removesuffix(layout.key("", layout.CODES)) for name in tensors if _is_codes(name)]:
                for piece in (layout.SIGNS_IN, layout.SIGNS_OUT):
                    tensors[layout.key(stack, piece)] = best.tensor(layout.key(stack, piece)).to(torch.float16)
            made[file] = store_tensors(context, tensors)
            context.progress(number + 1, len(coded), "files")
    return made


def tuned_tensors(
    context: StepContext, layers: Iterable[StepOutput], tuning: StepOutput | None
) -> tuple[dict[str, str], dict[str, Json]]:
    """The file of norms (in fp32) and head (in fp16) that were trained, and their lines; nothing where there are none.

    ``tuning`` is the last step of end-to-end fine-tuning; without it they are those of the blocks.
    """
    variant = opened(context, "variant")
    parts, stored = architecture_of(variant).parts, variant.manifest["tensors"]
    found: dict[str, torch.Tensor] = {}
    for digest in [tuning.blobs[BEST]] if tuning else [layer.blobs[NORMS] for layer in layers]:
        with TensorFile(context.store.verified_path(digest)) as file:
            found |= {name: file.tensor(name) for name in file.entries if name in stored}
    tensors = {name: one.to(torch.float16 if parts[name] == "head" else torch.float32) for name, one in found.items()}
    if not tensors:
        return {}, {}
    entries = {
        name: layout.vector_entry(stored[name]["dtype"], tensor.shape, parts[name], tensor.nbytes)
        for name, tensor in tensors.items()
    }
    return {layout.TUNED_FILE: store_tensors(context, tensors)}, entries


def _is_codes(name: str) -> bool:
    return name.endswith(layout.key("", layout.CODES))
