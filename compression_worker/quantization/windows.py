"""Full windows of calibration tokens: texts joined in a seeded order and cut, or drawn from the model itself."""

from __future__ import annotations

import torch

from compression_worker.checkpoints import Checkpoint, load_model, load_tokenizer
from compression_worker.contracts import CompressionError, StepContext
from compression_worker.samples import read_samples

SPARE = 4
"""Texts are read until there are so many times the tokens that are needed; windows are spread over all of them."""
GENERATED_AT_ONCE = 16


def calibration_tokens(context: StepContext, checkpoint: Checkpoint, *, samples: int, length: int) -> torch.Tensor:
    """``(W, T)`` int64: at most ``samples`` windows of ``length`` tokens; fewer windows where the text is short.

    From the input ``calibration``; without one the model writes the text itself. Raises :class:`CompressionError`:
    ``no_text`` where a set holds no text, ``too_few_tokens`` where it does not fill one window.
    """
    if "calibration" not in context.spec.inputs:
        return generated(context, checkpoint, samples=samples, length=length)
    found = read_samples(context.store.read_bytes(context.spec.inputs["calibration"]))
    texts = [sample["text"] for sample in found if "text" in sample]
    if not texts:
        raise CompressionError("no_text", "the calibration set has no texts: a text set is needed")
    stream = _joined(checkpoint, texts, needed=samples * length * SPARE, seed=context.spec.seed)
    whole = len(stream) // length
    if not whole:
        raise CompressionError(
            "too_few_tokens",
            f"the calibration text has {len(stream)} tokens and one window is {length}: give more text, or shorter "
            "windows",
        )
    if whole < samples:
        context.log(f"the calibration text fills {whole} windows of {length} tokens, not {samples}", "warning")
    windows = torch.tensor(stream[: whole * length]).view(whole, length)
    places = torch.arange(min(samples, whole)) * whole // min(samples, whole)
    return windows[places]


def window_length(context: StepContext, checkpoint: Checkpoint, length: int) -> int:
    """``length``, or as many tokens as the model can read, which is then said."""
    said = checkpoint.manifest["config"]
    most = int(said.get("max_position_embeddings") or said.get("n_positions") or length)
    if length > most:
        context.log(f"the model reads {most} tokens at most: windows are that long, not {length}", "warning")
    return min(length, most)


def generated(context: StepContext, checkpoint: Checkpoint, *, samples: int, length: int) -> torch.Tensor:
    """``(samples, length)`` tokens that the model draws one after another from its own distribution."""
    model = load_model(checkpoint, device=context.device, dtype=torch.float32)
    vocabulary = model.config.vocab_size
    first = torch.randint(vocabulary, (samples, 1), generator=torch.Generator().manual_seed(context.spec.seed))
    if (start := model.generation_config.bos_token_id) is not None:
        first.fill_(start)
    devices = [context.device] if context.device.startswith("cuda") else []
    rows = []
    with torch.random.fork_rng(devices):
        torch.manual_seed(context.spec.seed)
        for at in range(0, samples, GENERATED_AT_ONCE):
            rows.append(_drawn(model, first[at : at + GENERATED_AT_ONCE].to(context.device), length).cpu())
            context.progress(min(at + GENERATED_AT_ONCE, samples), samples, "texts")
    return torch.cat(rows)


def _drawn(model: object, tokens: torch.Tensor, length: int) -> torch.Tensor:
    past = None
    step = tokens
    with torch.no_grad():
        while tokens.shape[1] < length:
            out = model(step, past_key_values=past, use_cache=True)  # type: ignore[operator]
            past = out.past_key_values
            step = torch.multinomial(out.logits[:, -1].softmax(dim=-1), 1)
            tokens = torch.cat([tokens, step], dim=1)
    return tokens


def _joined(checkpoint: Checkpoint, texts: list[str], *, needed: int, seed: int) -> list[int]:
    """Texts in a seeded order as one stream of tokens, an end-of-text token between them where there is one."""
    tokenizer = load_tokenizer(checkpoint)
    stream: list[int] = []
    between = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for index in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist():
        stream += tokenizer(texts[index], add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        stream += between
        if len(stream) >= needed:
            break
    return stream
