"""The queues that work may go to, who serves them, and which steps go where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from django.conf import settings
from django.utils import timezone

from compression_worker.catalog import need
from compression_worker.preflight import ADDRESS_SPACE_BYTES
from dashboard.models import Worker

LIGHT_QUEUE = "cpu"
"""Where steps go that need no device: a worker with a GPU serves it as well (``WORKER_QUEUES=gpu,cpu``)."""


def workers_alive() -> list[Worker]:
    """Workers that reported themselves lately, those in trouble among them."""
    since = timezone.now() - timedelta(seconds=2 * settings.LEASE_SECONDS)
    return list(Worker.objects.filter(seen_at__gte=since).order_by("name"))


def serves(worker: Worker, queue: str) -> bool:
    return queue in worker.queues.split(",")


def offered_queues(workers: Sequence[Worker] | None = None) -> list[str]:
    """The queues that a job may be put into: of the settings, and of whoever is alive."""
    found = dict.fromkeys(settings.WORKER_QUEUES)
    for worker in workers_alive() if workers is None else workers:
        found |= dict.fromkeys(name for name in worker.queues.split(",") if name)
    return list(found)


def default_queue() -> str:
    first: str = settings.WORKER_QUEUES[0]
    return first


def light_queue(workers: Sequence[Worker] | None = None) -> str:
    """Where light steps go: ``cpu``; nothing where this installation has no such queue, and they follow their job."""
    return LIGHT_QUEUE if LIGHT_QUEUE in settings.WORKER_QUEUES or LIGHT_QUEUE in offered_queues(workers) else ""


def step_queue(kind: str, queue: str, light: str) -> str:
    """The queue of a step of ``kind`` in a job of ``queue``."""
    return queue if need(kind).device else light or queue


@dataclass(frozen=True)
class Room:
    """What one step may take on a worker; None is unknown. ``gpu`` None: it computes on the CPU."""

    worker: str
    memory: int | None
    gpu: int | None
    on_gpu: bool


def room_of(worker: Worker) -> Room:
    """A limit of the address space also covers what a process maps and never touches."""
    limit = worker.memory_limit_bytes
    limits = [one for one in (worker.memory_bytes, limit and max(0, limit - ADDRESS_SPACE_BYTES)) if one is not None]
    on_gpu = bool(worker.gpu_name) and worker.device != "cpu"
    return Room(worker.name, min(limits) if limits else None, worker.gpu_memory_bytes if on_gpu else None, on_gpu)
