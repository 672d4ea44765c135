"""Memory that is free goes back to the system, where a step computes with few and large tensors.

glibc keeps freed blocks of up to 32 MB for the next one that fits, which makes short operations fast and leaves holes:
a training pass then holds about half as much again as its tensors need.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of ``mallopt``."""
LARGE = 1 << 20
USUAL = 1 << 25
"""What glibc comes to by itself in a process that allocates tensors."""


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Inside, blocks of a MiB and more are the system's again as soon as they are freed. Without glibc: nothing."""
    found = getattr(ctypes.CDLL(None), "mallopt", None)
    if found is None:
        yield
        return
    _set(found, LARGE, LARGE)
    try:
        yield
    finally:
        _set(found, USUAL, 2 * USUAL)


def _set(mallopt: Callable[[int, int], int], mmap: int, trim: int) -> None:
    mallopt(MMAP_THRESHOLD, mmap)
    mallopt(TRIM_THRESHOLD, trim)
