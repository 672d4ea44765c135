"""Progressive module replacement: which followers go their new way in which step of training. No torch.

    p(t) = min(1, p0 + c t),    and p = 1 in a last share of the steps

Each module of each follower draws by itself, from the seed, the step and its place alone: a run that goes on elsewhere
draws the same. The paper names the procedure; that ``p`` rises in a line, and its constants, follow BERT-of-Theseus
(arXiv:2002.02925) and are our reading.
"""

from __future__ import annotations

import hashlib
import math

from compression_worker.methods.deltallm.config import DeltaLLMConfig


def probability(config: DeltaLLMConfig, step: int, total: int) -> float:
    """``p`` of training step ``step`` (from 0) of ``total``."""
    rising = total - math.ceil(config.final_share * total)
    if config.replacement == "none" or step >= rising:
        return 1.0
    slope = (1 - config.p0) / rising if config.slope is None else config.slope
    return min(1.0, config.p0 + slope * step)


def drawn(seed: int, step: int, block: int, kind: str, p: float) -> bool:
    """Whether the module ``kind`` of ``block`` goes its new way in this step."""
    digest = hashlib.sha256(f"{seed} {step} {block} {kind}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < p * 2**64
