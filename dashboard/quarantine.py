"""A worker whose store or device fails takes no more steps, so that it does not spoil one after another.

A store that cannot be written is tried again before each claim, and the steps that met it go back uncounted. A device
that failed twice is suspect until the worker is started anew.
"""

from __future__ import annotations

import re

from compression_worker.contracts import CompressionError
from compression_worker.launcher import Outcome
from compression_worker.store import STORE_AWAY, NoRoom, open_store

DEVICE_FAULT = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|device-side assert|NCCL error|HIP error")
FAULTS_BEFORE_SUSPECT = 2
PROBE = b"a worker looks whether its store can be written\n"


class Quarantine:
    """The state of one worker's own: ``trouble`` says why it takes no steps, in words for the page of workers."""

    def __init__(self, store: str, cache: str) -> None:
        self.trouble = ""
        self._store, self._cache = store, cache
        self._device_faults = 0

    def judge(self, outcome: Outcome) -> bool:
        """Learn from how a step ended; True when the step is not at fault and goes back uncounted."""
        if outcome.kind == "errored" and outcome.code == STORE_AWAY:
            self.trouble = f"its store cannot be used: {outcome.message}"
            return True
        if outcome.kind == "errored" and DEVICE_FAULT.search(f"{outcome.message}\n{outcome.detail}"):
            self._device_faults += 1
            if self._device_faults >= FAULTS_BEFORE_SUSPECT:
                self.trouble = f"its device failed {self._device_faults} times: look at it, then start the worker again"
        return False

    def holds(self) -> bool:
        """Whether the worker may still not claim; a store that can be written again ends the trouble with it."""
        if self.trouble and self._device_faults < FAULTS_BEFORE_SUSPECT:
            try:
                open_store(self._store, self._cache).write_bytes(PROBE)
            except (OSError, NoRoom, CompressionError) as error:
                self.trouble = f"its store cannot be used: {error}"
            else:
                self.trouble = ""
        return bool(self.trouble)
