"""Wake-up messages to the workers. A message is only a hint: the row is the promise, and ``reconcile`` sees to it."""

from __future__ import annotations

import logging

from django.conf import settings
from django.db import transaction
from kombu.exceptions import OperationalError

from compression_worker.faults import failpoint
from dashboard.celery import app

log = logging.getLogger(__name__)

EXPIRES_SECONDS = 60
"""A wake that nobody took for this long is worth nothing: the reconciler has sent others."""
PATIENCE_SECONDS = 1
"""A page that submits a job does not wait longer than this for a broker that is down."""


def wake_on_commit(queue: str) -> None:
    """Send a wake to ``queue`` once the present transaction is committed."""
    transaction.on_commit(lambda: wake(queue), robust=True)


def wake(queue: str) -> None:
    """Tell a worker of ``queue`` that there may be something to claim. Never raises when the broker is away."""
    failpoint("wake.send")
    if not settings.CELERY_BROKER_URL:
        return
    try:
        with app.connection_for_write(connect_timeout=PATIENCE_SECONDS, transport_options=_impatient()) as connection:
            app.send_task(
                "dashboard.tasks.wake",
                args=[queue],
                queue=queue,
                expires=EXPIRES_SECONDS,
                retry=False,
                ignore_result=True,
                connection=connection,
            )
    except (OperationalError, OSError) as error:
        log.warning("the broker is away, the reconciler will wake queue %s: %s", queue, error)


def _impatient() -> dict[str, float]:
    """Without these, kombu tries for ever to reach a broker that is down."""
    return {
        "max_retries": 0,
        "interval_start": 0,
        "socket_timeout": PATIENCE_SECONDS,
        "socket_connect_timeout": PATIENCE_SECONDS,
    }
