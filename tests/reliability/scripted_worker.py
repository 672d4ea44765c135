"""The product's Celery app, whose workers start the scripted child: ``celery --app tests.reliability.scripted_worker``.

Main process, pool process, child, signals, leases and messages are the real ones; only what is computed is a script.
"""

from __future__ import annotations

import sys

import django

from dashboard.celery import app

django.setup()

from dashboard import execution  # noqa: E402 - the settings have to be loaded first
from tests.dashboard.services.jobs_at_work import CHILD  # noqa: E402

execution.child_command = lambda *given: [sys.executable, str(CHILD)]  # type: ignore[assignment]

__all__ = ["app"]
