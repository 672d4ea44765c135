"""What is in memory and what answers: resident models shared by digest, and one immutable handle an environment.

A request checks a handle out and keeps it until its answer is finished, so that one answer comes from one digest. A
model stays resident as long as a handle or a running answer points at it, and leaves memory after the last of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Outcome = tuple[str, int, str]
"""Environment, generation, and how the answer ended: ``ok``, ``refused``, ``non_finite``, ``abandoned``, ``error``."""


class UnknownModel(Exception):
    """No environment answers under the name that was asked for."""


class NotReady(Exception):
    """An environment has this name, and nothing of it is loaded yet."""


@dataclass(frozen=True, eq=False)
class Resident:
    """A verified model in memory. ``digest`` names its bytes: a checkpoint manifest's or an artifact manifest's."""

    digest: str
    model: Any
    tokenizer: Any
    context_length: int

    def storages(self) -> dict[int, int]:
        """Address -> bytes of each piece of memory that its tensors lie in; tied tensors share one."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        memory = (tensor.untyped_storage() for tensor in tensors)
        return {storage.data_ptr(): storage.nbytes() for storage in memory}


@dataclass(frozen=True, eq=False, kw_only=True)
class Handle:
    """What an environment answers from. Replaced as a whole, never changed.

    ``fallback`` is the variant at full precision, kept beside a compressed model as the way back.
    """

    environment: str
    alias: str
    epoch: int = 1
    generation: int
    resident: Resident
    fallback: Resident | None = None
    fell_back: str = ""

    @property
    def digest(self) -> str:
        return self.resident.digest

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in the one order of an environment's deployments."""
        return self.epoch, self.generation

    def fallen_back(self, why: str) -> Handle:
        """The same generation at full precision, because of ``why``. There is no way back but a new generation."""
        return replace(self, resident=self.fallback or self.resident, fallback=None, fell_back=why)

    def residents(self) -> list[Resident]:
        return [self.resident] if self.fallback is None else [self.resident, self.fallback]


class Variants:
    """The table of handles and of what is resident. Each method takes the one lock, briefly.

    ``names_known`` is False until it is known which names will answer: until then none of them is called unknown.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Resident, int]] = {}
        self._active: dict[str, Handle] = {}
        self._awaited: dict[str, str] = {}
        self.names_known = True
        self._answers: Counter[Outcome] = Counter()
        self._loading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def expect(self, alias: str, environment: str) -> None:
        """Announce a name that will answer later: asking for it says 'not yet', not 'unknown'."""
        with self._lock:
            self._awaited[alias] = environment

    @contextlib.contextmanager
    def obtain(self, digest: str, load: Callable[[], Resident]) -> Iterator[Resident]:
        """The resident ``digest``, loaded if need be (by one thread at a time), kept in memory until the block ends."""
        with self._loading[digest]:
            resident = self._take_held(digest)
            if resident is None:
                resident = load()
                with self._lock:
                    self._take(resident)
        try:
            yield resident
        finally:
            self._give_back(resident)

    @contextlib.contextmanager
    def checkout(self, alias: str) -> Iterator[Handle]:
        """The handle that answers as ``alias`` now, its model kept in memory until the block ends."""
        with self._lock:
            handle = next((each for each in self._active.values() if each.alias == alias), None)
            if handle is None:
                raise NotReady(alias) if alias in self._awaited or not self.names_known else UnknownModel(alias)
            self._take(handle.resident)
        try:
            yield handle
        finally:
            self._give_back(handle.resident)

    def swap(self, handle: Handle, *, only_from: Handle | None = None) -> bool:
        """Let ``handle`` answer for its environment from now on. Running answers end on the handle they hold.

        What stands before the present one in the order of deployments is refused, and so is a present handle other
        than ``only_from`` where that is given: somebody else was faster.
        """
        with self._lock:
            present = self._active.get(handle.environment)
            if present and handle.place < present.place:
                return False
            if only_from is not None and present is not only_from:
                return False
            for resident in handle.residents():
                self._take(resident)
            self._active[handle.environment] = handle
            for resident in present.residents() if present else []:
                self._release(resident)
        return True

    def active(self, environment: str) -> Handle | None:
        with self._lock:
            return self._active.get(environment)

    def handles(self) -> list[Handle]:
        with self._lock:
            return list(self._active.values())

    def count(self, handle: Handle, outcome: str) -> None:
        with self._lock:
            self._answers[handle.environment, handle.generation, outcome] += 1

    def answers(self) -> dict[Outcome, int]:
        with self._lock:
            return dict(self._answers)

    def resident_bytes(self) -> int:
        """Bytes of memory of all resident models; what two of them share counts once."""
        with self._lock:
            residents = [resident for resident, _ in self._held.values()]
        memory: dict[int, int] = {}
        for resident in residents:
            memory |= resident.storages()
        return sum(memory.values())

    def resident_digests(self) -> list[str]:
        with self._lock:
            return sorted(self._held)

    def _take_held(self, digest: str) -> Resident | None:
        with self._lock:
            if digest not in self._held:
                return None
            resident = self._held[digest][0]
            self._take(resident)
        return resident

    def _take(self, resident: Resident) -> None:
        kept, holders = self._held.get(resident.digest, (resident, 0))
        self._held[resident.digest] = (kept, holders + 1)

    def _give_back(self, resident: Resident) -> None:
        with self._lock:
            self._release(resident)

    def _release(self, resident: Resident) -> None:
        kept, holders = self._held[resident.digest]
        if holders == 1:
            del self._held[resident.digest]
        else:
            self._held[resident.digest] = (kept, holders - 1)
