"""Failpoints: named places where a test makes this process die, stop, break, run out of room or lose its database.

``FAULT=name:n:action`` arms a place: at its ``n``-th passing ``action`` happens, once; several are separated by commas,
each place at most once. Unarmed, a place costs one look at a variable. With ``FAULT_LEDGER=path`` passings are counted
over all processes that share the file, and the firing is written there: a process started anew does not fire again, and
a test can tell that the place was reached.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

STOP_SECONDS = 3.0

POINTS: Final[dict[str, str]] = {
    # The store
    "store.open": "a temporary file was made",
    "store.half": "half of a blob is written",
    "store.written": "a blob is written, not yet synchronised",
    "store.synced": "a blob is synchronised, not yet under its name",
    "store.renamed": "a blob has its name, its folder is not yet synchronised",
    "store.settled": "a blob is in its place for good",
    "store.read": "a blob is about to be read",
    "store.verify": "a blob is about to be hashed again",
    "store.view": "a folder of links is about to get its name",
    # The child that computes
    "child.ready": "the child waits for its first step",
    "child.received": "a step has arrived at the child",
    "child.reuse": "an earlier output is about to be verified",
    "child.compute": "a step's function is about to be called",
    "child.computed": "a step's function has returned, its output is not yet stored",
    "child.stored": "a step's output is stored, not yet reported",
    "child.answer": "the answer is about to be written to the parent",
    # What steps do
    "import.open": "a folder to import was opened",
    "import.hashed": "a file of an import is in the store",
    "import.manifest": "the manifest of an import is about to be stored",
    "bitdelta.matrix": "a matrix is packed, not yet written",
    "delta.rest": "the tensors that are kept as they are, are about to be written",
    "artifact.scales": "the scales of an artifact are stored, its files not yet hashed",
    "artifact.manifest": "the manifest of an artifact is about to be stored",
    "evaluation.target": "a target was measured",
    "evaluation.summary": "the summary is about to be stored",
    "rehearse.restored": "full precision was restored for a rehearsal",
    "escrow.manifest": "the manifest of an escrow is about to be stored",
    "escrow.restored": "a weight file was restored from an escrow",
    # The parent that watches
    "launch.start": "a child is about to be started",
    "launch.sent": "a step was handed to the child",
    "execute.claimed": "a step is claimed, its child has not heard of it",
    "execute.watch": "the parent looks at what a person asked for",
    "execute.outcome": "the child has answered, nothing is written down",
    "execute.reported": "the end of an attempt is written down",
    "log.append": "log lines are about to be written",
    "worker.seen": "a worker says that it is alive",
    # Jobs and steps
    "order.job": "a job's row is written, its step is not",
    "order.steps": "a job and its step are written, not committed",
    "claim.found": "something to claim was found",
    "claim.committed": "a claim is committed",
    "heartbeat.write": "a lease is renewed, not committed",
    "finish.begin": "the end of an attempt is about to be written",
    "finish.attempt": "an attempt is ended, its step is not",
    "finish.step": "a step is ended, its job not yet settled",
    "finish.planned": "the steps of a plan are written, not committed",
    "finish.commit": "all of an ending is written, not committed",
    "lapse.return": "a lapsed lease is taken back, not committed",
    "cancel.write": "a request to stop is written, not committed",
    "cancel.rest": "the steps that are left were cancelled, not committed",
    "publish.begin": "all steps are done, the result is not yet published",
    "publish.checkpoint": "an imported checkpoint's row is written, not committed",
    "publish.artifact": "an artifact's row is written, not committed",
    "publish.evaluation": "an evaluation's row is written, not committed",
    "publish.certificate": "a certificate's row is written, not committed",
    "publish.escrow": "an escrow's row is written, not committed",
    "publish.done": "a job has succeeded, not committed",
    # Wakes and the reconciler
    "wake.send": "a wake is about to be sent",
    "wake.receive": "a wake has arrived",
    "reconcile.locked": "a reconciler holds its lock",
    "reconcile.returned": "lapsed leases are back",
    "reconcile.wake": "the reconciler is about to wake queues",
    # Approvals and releases
    "approve.request": "a request for approval is written, not committed",
    "approve.decide": "a decision is written, not committed",
    "audit.insert": "a change was recorded in the history, not committed",
    "deploy.locked": "an environment is locked for a deployment",
    "deploy.checked": "a deployment is allowed, its row is not written",
    "deploy.row": "a deployment's row is written, the pointer has not moved",
    "deploy.pointer": "the pointer has moved, not committed",
    "deploy.observed": "what servers report is written, not committed",
    # The server
    "server.read": "the pointer was read",
    "server.load": "a server begins to load",
    "server.verify": "a file is about to be hashed before it is loaded",
    "server.loaded": "a model is loaded beside the one that answers",
    "server.swap": "the reference is about to be swapped",
    "server.swapped": "the new model answers, nobody was told",
    "server.report": "a report is about to be written",
}
"""Every place, and what is so when it is passed."""


class FaultInjected(RuntimeError):
    """What the action ``raise`` raises: code that broke."""


@dataclass(frozen=True)
class Armed:
    """One place that is armed: its name, at which passing, what happens, and the file that is shared about it."""

    name: str
    nth: int
    action: str
    ledger: str


def cut_nothing() -> None:
    """``drop_db`` in a process without a database: a child asks its parent instead, once it runs."""


def cut_socket(descriptor: int) -> None:
    """Shut a connected socket down in both directions, without the courtesy of a good-bye."""
    with socket.socket(fileno=os.dup(descriptor)) as end:
        end.shutdown(socket.SHUT_RDWR)


drop_database: Callable[[], None] = cut_nothing
"""How this process loses its connection to the database; replaced by those that have one."""


def armed_from(environ: os._Environ[str] | dict[str, str]) -> tuple[Armed, ...]:
    """What ``FAULT`` arms. Raises ValueError for a name or an action that there is not, and for a name given twice."""
    faults = [fault.partition(":") for fault in environ.get("FAULT", "").split(",") if fault]
    found = {}
    for name, _, rest in faults:
        nth, _, action = rest.partition(":")
        if name not in POINTS or name in found or not nth.isdecimal() or action not in ACTIONS:
            given, actions = environ["FAULT"], ", ".join(ACTIONS)
            raise ValueError(f"FAULT={given}: want name:n:action with a known name, each once, and one of {actions}")
        found[name] = Armed(name, int(nth), action, environ.get("FAULT_LEDGER", ""))
    return tuple(found.values())


def failpoint(name: str) -> None:
    """Pass the place ``name``."""
    if _ARMED and (armed := _ARMED.get(name)) is not None and _is_due(armed):
        ACTIONS[armed.action]()


def arm(*armed: Armed) -> None:
    """Arm these places of this process and no other."""
    global _ARMED
    _ARMED = {one.name: one for one in armed}
    _PASSED.clear()


def _is_due(armed: Armed) -> bool:
    """Count this passing; whether it is the one. Shared over processes where there is a ledger, and true only once."""
    if not armed.ledger:
        _PASSED[armed.name] += 1
        return armed.nth == _PASSED[armed.name]
    handle = os.open(armed.ledger, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        passed = os.pread(handle, 1 << 20, 0).count(f"passed {armed.name} ".encode())
        os.write(handle, f"passed {armed.name} {os.getpid()}\n".encode())
        if passed + 1 != armed.nth:
            return False
        os.write(handle, f"fired {armed.name} {armed.action} {os.getpid()}\n".encode())
        return True
    finally:
        os.close(handle)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise FaultInjected("a fault was injected here")


def _enospc() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stop() -> None:
    """Stop this process for ``FAULT_STOP_SECONDS``, as a machine does that sleeps: another process lets it go on."""
    seconds = float(os.environ.get("FAULT_STOP_SECONDS", STOP_SECONDS))
    subprocess.Popen(["/bin/sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _drop_db() -> None:
    drop_database()


ACTIONS: Final[dict[str, Callable[[], None]]] = {
    "kill": _kill,
    "raise": _raise,
    "enospc": _enospc,
    "stop": _stop,
    "drop_db": _drop_db,
}

_PASSED: Counter[str] = Counter()
_ARMED = {one.name: one for one in armed_from(os.environ)}
