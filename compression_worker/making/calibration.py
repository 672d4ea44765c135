"""The calibration text as token windows of the variant's tokenizer."""

from __future__ import annotations

from compression_worker.checkpoints import Checkpoint, load_tokenizer
from compression_worker.contracts import CompressionError, StepContext
from compression_worker.distillation import Windows
from compression_worker.samples import read_samples


def calibration_windows(context: StepContext, variant: Checkpoint, *, length: int, needed: int) -> Windows:
    """Windows of at most ``length`` tokens, in an order that the step's seed decides.

    Raises :class:`CompressionError` (``no_text``) where the calibration set holds no text.
    """
    samples = read_samples(context.store.read_bytes(context.spec.inputs["calibration"]))
    texts = [sample["text"] for sample in samples if "text" in sample]
    if not texts:
        raise CompressionError("no_text", "the calibration set has no texts: a text set is needed")
    tokenizer = load_tokenizer(variant)
    return Windows(
        texts,
        lambda text: tokenizer(text, add_special_tokens=True, truncation=False, verbose=False)["input_ids"],
        length=length,
        needed=needed,
        seed=context.spec.seed,
    )
