"""Parallel over matrices instead of inside each operation, which is too short to share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

MOST = 2
"""Matrices in flight at most: each holds a few tiles and its codes."""


def each() -> Callable[..., Iterator[Any]]:
    """``map`` on as many threads as torch has, two at most; on one it is this one, so that it takes one core."""
    threads = min(MOST, torch.get_num_threads())
    return _pool(threads).map if threads > 1 else map


@contextlib.contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """What runs inside computes each operation on the thread that asks for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for the life of the process, which keep their buffers from one block to the next."""
    return ThreadPoolExecutor(threads)
