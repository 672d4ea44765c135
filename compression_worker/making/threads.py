"""Parallel over matrices instead of inside each operation, which is too short to share."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

MOST = 2
"""Matrices or tiles in flight at most: each holds a few tiles and its codes."""


def each() -> Callable[..., Iterator[Any]]:
    """``map`` on as many threads as torch has, two at most; on one it is this one, so that it takes one core."""
    threads = min(MOST, torch.get_num_threads())
    return _pool(threads).map if threads > 1 else map


def ahead(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``map`` that makes the next results, two at most, while one is used; on one thread it is ``map``."""
    threads = min(MOST, torch.get_num_threads())
    if threads < 2:
        yield from map(work, items)
        return
    made: deque[Future[Any]] = deque()
    for item in items:
        made.append(_looking_ahead(threads).submit(work, item))
        if len(made) > threads:
            yield made.popleft().result()
    while made:
        yield made.popleft().result()


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


@lru_cache(maxsize=1)
def _looking_ahead(threads: int) -> ThreadPoolExecutor:
    """Threads of their own: a matrix that is worked on by :func:`each` may ask for tiles."""
    return ThreadPoolExecutor(threads)
