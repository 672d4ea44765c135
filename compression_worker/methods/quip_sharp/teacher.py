"""What the full-precision model answers, kept small: of each token the ``k`` largest logits and the sum of the rest.

A distribution over the vocabulary is kept as ``k`` log-probabilities and that of all other words together, so that a
window of 512 tokens takes 400 kB at ``k = 128`` and not 100 MB. What a student answers is compared in the same form:

    loss = sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)

the Kullback-Leibler divergence where the words that are left out count as one, which bounds that of all words from
below. Its gradient is that of soft cross-entropy (QuIP#, arXiv 2402.04396, appendix D.2) but for the words left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression_worker.checkpoints import load_model
from compression_worker.contracts import StepContext, StepOutput
from compression_worker.making.inputs import opened
from compression_worker.quantization.calibration import read_tokens
from compression_worker.tensors import TensorFile, whole, write_file

SHARD_WINDOWS = 32
"""Windows in one file."""
LOGS, WORDS = "log_probabilities", "words"


@dataclass(frozen=True)
class Answers:
    """Of some windows: ``logs (W, T, k + 1)`` fp32, the last of them that of the rest; ``words (W, T, k)`` int64."""

    logs: torch.Tensor
    words: torch.Tensor

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """Of a student's ``logits (W, T, V)``: the mean over tokens, in nats."""
        ours = student_logs(logits, self.words)
        return (self.logs.exp() * (self.logs - ours)).sum(-1).mean()


def answers_of(logits: torch.Tensor, count: int) -> Answers:
    """What is kept of ``logits (W, T, V)``."""
    words = logits.topk(min(count, logits.shape[-1] - 1), dim=-1).indices
    return Answers(student_logs(logits, words), words)


def student_logs(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """``logits (..., V)`` -> log-probabilities of ``words (..., k)`` and, last, of all others together, fp32."""
    logs = logits.to(torch.float32).log_softmax(-1)
    rest = logs.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)
    # Where the others have no probability left in fp32, their logarithm is that of the least there is.
    return torch.cat([logs.gather(-1, words), rest.clamp(min=-87.0)], dim=-1)


def teacher_step(context: StepContext) -> StepOutput:
    """The answers to all windows of the calibration text, in files of :data:`SHARD_WINDOWS`."""
    count = context.spec.params["logits"]
    tokens = read_tokens(context, "text")
    model = load_model(opened(context, "variant"), device=context.device, dtype=torch.float32)
    blobs = {}
    for start in range(0, len(tokens), SHARD_WINDOWS):
        logs, words = [], []
        for at in range(start, min(len(tokens), start + SHARD_WINDOWS)):
            with torch.no_grad():
                logits = model(tokens[at : at + 1].to(context.device), use_cache=False).logits
            found = answers_of(logits, count)
            logs.append(found.logs.cpu())
            words.append(found.words.cpu().to(torch.int32))
            context.progress(at + 1, len(tokens), "windows")
        with context.store.writer() as blob:
            write_file(blob, {LOGS: whole(torch.cat(logs)), WORDS: whole(torch.cat(words))})
        blobs[shard_name(start)] = blob.digest
    return StepOutput(blobs=blobs, data={"windows": len(tokens)})


def shard_name(window: int) -> str:
    """The file that holds the answers to a window."""
    return f"teacher-{window // SHARD_WINDOWS:05d}.safetensors"


class Teacher:
    """The answers that the step given as input ``teacher`` has kept; one file of them is in memory."""

    def __init__(self, context: StepContext) -> None:
        self._context, self._blobs = context, context.input("teacher").blobs
        self._name, self._held = "", Answers(torch.empty(0), torch.empty(0))

    def answers(self, window: int) -> Answers:
        """To the window of that number, ``W`` = 1."""
        name = shard_name(window)
        if name != self._name:
            with TensorFile(self._context.store.verified_path(self._blobs[name])) as file:
                self._held = Answers(file.tensor(LOGS), file.tensor(WORDS).to(torch.int64))
            self._name = name
        at = slice(window % SHARD_WINDOWS, window % SHARD_WINDOWS + 1)
        device = self._context.device
        return Answers(self._held.logs[at].to(device), self._held.words[at].to(device))
