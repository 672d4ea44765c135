"""The Celery app. Messages only wake; every truth about a job is a row in Postgres."""

from __future__ import annotations

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "dashboard.settings")

RECONCILE_SECONDS = 5.0

app = Celery("deltaworks")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.conf.update(
    task_acks_late=False,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={"socket_timeout": 5, "socket_connect_timeout": 5, "retry_on_timeout": True},
    task_default_queue="cpu",
    # A reconcile message that waits behind a long wake expires: the worker reconciles from inside that wake, too.
    beat_schedule={
        "reconcile": {
            "task": "dashboard.tasks.reconcile",
            "schedule": RECONCILE_SECONDS,
            "options": {"expires": 3 * RECONCILE_SECONDS},
        }
    },
    worker_hijack_root_logger=False,
)
app.autodiscover_tasks()
