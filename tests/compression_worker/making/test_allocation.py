"""Memory of a training step goes back: measured in a process of its own, since others' blocks would hide it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compression_worker.making.allocation import given_back

HELD = """
import contextlib, ctypes
from pathlib import Path
from compression_worker.making.allocation import USUAL, _set, given_back

def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
_set(libc.mallopt, USUAL, 2 * USUAL)  # as a process is that has allocated tensors
before = pages()
with {inside}:
    blocks = [libc.malloc(4 << 20) for _ in range(16)]
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    last = blocks.pop()  # in use: what lies before it cannot go back as the end of the heap
    for block in blocks:
        libc.free(block)
    print(pages() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_blocks_are_the_systems_inside_and_kept_outside() -> None:
    kept, back = (
        int(subprocess.run([sys.executable, "-c", HELD.format(inside=inside)], capture_output=True, check=True).stdout)
        for inside in ("contextlib.nullcontext()", "given_back()")
    )
    assert kept > 10_000, "40 MB and more of 60 are still held"
    assert back < 3_000, "about the one block that is in use"


def test_it_may_be_used_again_and_again() -> None:
    for _ in range(3):
        with given_back():
            assert len(bytearray(1 << 22)) == 1 << 22
