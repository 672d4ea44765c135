"""Where one environment stands: which generation was wanted last, what is being loaded, why something was refused.

Deployments have one order, by epoch and generation, and a server never goes back in it; the epoch is what somebody
raises after the database was restored from an older state. Each wanted one is loaded by a thread of its own beside the
model that answers, and takes over by one swap; a newer one abandons an older load. What is refused is tried again after
a while, because a disk or a memory may have been put right; what answers meanwhile stays what it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from compression_worker.contracts import CompressionError
from compression_worker.faults import failpoint
from compression_worker.serving.loading import Abandoned, LoadAbandoned
from compression_worker.serving.variants import Handle, Resident, Variants

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 30.0
LONGEST_RETRY_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """A row of the view: what an environment should answer from. Digests of what is not there are None.

    An artifact that stands alone has the checkpoint that it was made from as its base, too.
    """

    environment: str
    alias: str
    epoch: int = 1
    generation: int
    kind: str | None
    variant_digest: str | None
    base_digest: str | None
    artifact_digest: str | None
    digest: str | None

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in the one order of an environment's deployments."""
        return self.epoch, self.generation


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is reported of an environment. ``generation`` and ``digest`` are of what answers, ``epoch`` of ``wanted``.

    ``state`` is starting, loading, serving, refused (what is wanted cannot be loaded), rewound (the database went back
    and is not followed) or fallback.
    """

    environment: str
    epoch: int
    wanted: int
    generation: int
    digest: str
    state: str
    message: str


class Loads(Protocol):
    """What brings a digest into memory."""

    def full_precision(self, digest: str, abandoned: Abandoned) -> Resident: ...

    def compressed(self, artifact: str, base: str | None, abandoned: Abandoned) -> Resident: ...


class Switch:
    """Follows the pointer of one environment. ``changed`` is called at each change of :meth:`status`."""

    def __init__(
        self,
        environment: str,
        variants: Variants,
        loader: Loads,
        changed: Callable[[], None],
        *,
        retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        self.environment = environment
        self._variants, self._loader, self._changed = variants, loader, changed
        self._lock = threading.Lock()
        self._wanted: Pointer | None = None
        self._refused = ""
        self._rewound = ""
        self._first_retry = self._pause = retry_seconds
        self._retry_at = 0.0

    def see(self, pointer: Pointer) -> None:
        """Take note of the pointer; start to load it when it is news, or when a refused one is due again."""
        if not pointer.digest:
            return
        self._variants.expect(pointer.alias, pointer.environment)
        with self._lock:
            was_rewound, self._rewound = self._rewound, _rewound(self._wanted, pointer)
            newer = self._wanted is None or pointer.place > self._wanted.place
            due = bool(self._refused) and time.monotonic() >= self._retry_at
            load = not self._rewound and (newer or due)
            if load:
                self._wanted, self._refused = pointer, ""
                self._pause = self._first_retry if newer else self._pause
        if load:
            name = f"load-{self.environment}-{pointer.generation}"
            threading.Thread(target=self._load, args=(pointer,), name=name, daemon=True).start()
        if self._rewound and not was_rewound:
            logger.error("%s: %s", self.environment, self._rewound)
        if load or self._rewound != was_rewound:
            self._changed()

    def close(self) -> None:
        """Abandon a running load."""
        with self._lock:
            self._wanted = None

    @property
    def ready(self) -> bool:
        """Whether this environment answers, or has nothing to answer from yet."""
        with self._lock:
            wanted = self._wanted
        return wanted is None or self._variants.active(self.environment) is not None

    def status(self) -> Status:
        handle = self._variants.active(self.environment)
        with self._lock:
            wanted, refused, rewound = self._wanted, self._refused, self._rewound
        state, message = _state(handle, wanted, refused, rewound)
        return Status(
            environment=self.environment,
            epoch=wanted.epoch if wanted else 1,
            wanted=wanted.generation if wanted else 0,
            generation=handle.generation if handle else 0,
            digest=handle.digest if handle else "",
            state=state,
            message=message,
        )

    def _load(self, pointer: Pointer) -> None:
        logger.info("%s: loading generation %d, %s", self.environment, pointer.generation, pointer.digest)
        try:
            failpoint("server.load")
            self._bring(pointer, lambda: self._wanted is not pointer)
        except LoadAbandoned:
            logger.info("%s: the load of generation %d is abandoned", self.environment, pointer.generation)
        except Exception as error:
            self._refuse(pointer, error)
        self._changed()

    def _bring(self, pointer: Pointer, abandoned: Abandoned) -> None:
        """Load what the pointer names and let it answer.

        The variant at full precision comes first, whatever was asked for: without the way back nothing is served. It
        also stands in when there is nothing else to answer from, as after a restart onto a damaged artifact.
        """
        variant, artifact, base = _digests(pointer)
        with self._variants.obtain(variant, lambda: self._loader.full_precision(variant, abandoned)) as full:
            handle = Handle(
                environment=pointer.environment,
                alias=pointer.alias,
                epoch=pointer.epoch,
                generation=pointer.generation,
                resident=full,
            )
            if artifact is None:
                self._swap(pointer, handle)
                return
            try:
                with self._variants.obtain(
                    artifact, lambda: self._loader.compressed(artifact, base, abandoned)
                ) as compressed:
                    self._swap(pointer, replace(handle, resident=compressed, fallback=full))
            except LoadAbandoned:
                raise
            except Exception as error:
                if self._variants.active(self.environment) is None:
                    self._swap(pointer, replace(handle, fell_back=_reason(error)))
                raise

    def _swap(self, pointer: Pointer, handle: Handle) -> None:
        """Let ``handle`` answer, unless something newer is wanted by now."""
        failpoint("server.swap")
        with self._lock:
            swapped = self._wanted is pointer and self._variants.swap(handle)
        failpoint("server.swapped")
        if swapped:
            logger.info("%s: generation %d answers from %s", self.environment, handle.generation, handle.digest)

    def _refuse(self, pointer: Pointer, error: Exception) -> None:
        with self._lock:
            if self._wanted is not pointer:
                return
            self._refused = f"generation {pointer.generation} is refused: {_reason(error)}"
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_RETRY_SECONDS)
        logger.error("%s: %s", self.environment, self._refused, exc_info=not isinstance(error, CompressionError))


def _state(handle: Handle | None, wanted: Pointer | None, refused: str, rewound: str) -> tuple[str, str]:
    """The word for where an environment stands, and what there is to say of it."""
    if rewound:
        return "rewound", rewound
    if handle and handle.fell_back:
        return "fallback", handle.fell_back
    if refused:
        return "refused", refused
    if wanted and (handle is None or handle.place < wanted.place):
        return "loading", f"generation {wanted.generation} is being loaded"
    return ("serving", "") if handle else ("starting", "nothing is deployed yet")


def _rewound(wanted: Pointer | None, pointer: Pointer) -> str:
    """What is wrong with a pointer that went back, or that names something else under a generation already seen."""
    if wanted is None or pointer.place > wanted.place:
        return ""
    if pointer.place == wanted.place and pointer.digest == wanted.digest:
        return ""
    return (
        f"the database shows {_shown(pointer)}, but {_shown(wanted)} was seen here already: it was set back. "
        "'manage.py recover' lets servers follow it; so does another deployment, or a restart of this server"
    )


def _shown(pointer: Pointer) -> str:
    return f"generation {pointer.generation} of epoch {pointer.epoch} ({str(pointer.digest)[:12]})"


def _digests(pointer: Pointer) -> tuple[str, str | None, str | None]:
    """Variant, artifact and base; refuses a row that contradicts itself."""
    if pointer.variant_digest and pointer.digest == (pointer.artifact_digest or pointer.variant_digest):
        return pointer.variant_digest, pointer.artifact_digest, pointer.base_digest
    raise CompressionError("inconsistent_pointer", f"generation {pointer.generation} names digests that do not agree")


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, CompressionError) else f"{type(error).__name__}: {error}"
