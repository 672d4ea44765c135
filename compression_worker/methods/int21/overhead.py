"""What adapters add to a packed base, counted in every way that people count it. No torch."""

from __future__ import annotations

from compression_worker.contracts import Json


def overhead(*, codes: int, scales: int, adapter: int, rest: int, weights: int, others: int, item_bytes: int) -> Json:
    """Ratios to the packed base and bits a weight, linears only and whole file, with and without scales.

    ``codes``, ``scales``, ``adapter`` and ``rest`` (embeddings, head, norms) are bytes; ``weights`` are the linears',
    ``others`` all other parameters, and ``item_bytes`` is what a weight had. ``codes_ratio`` is the paper's way to
    count: linears only and no scales.
    """

    def bits(size: int, count: int) -> float:
        return 8 * size / count

    return {
        "linears": {
            "ratio": (codes + adapter) / codes,
            "ratio_with_scales": (codes + scales + adapter) / (codes + scales),
            "bits": bits(codes + adapter, weights),
            "bits_with_scales": bits(codes + scales + adapter, weights),
            "adapter_bits": bits(adapter, weights),
            "codes_ratio": weights * item_bytes / (codes + adapter),
        },
        "whole": {
            "ratio": (codes + rest + adapter) / (codes + rest),
            "ratio_with_scales": (codes + scales + rest + adapter) / (codes + scales + rest),
            "bits": bits(codes + rest + adapter, weights + others),
            "bits_with_scales": bits(codes + scales + rest + adapter, weights + others),
        },
    }
