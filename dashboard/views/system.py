"""Workers, the glossary, and whether the process and what it needs are up."""

from __future__ import annotations

import logging

from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from dashboard.glossary import METRICS, TERMS
from dashboard.permissions import PUBLIC, rule
from dashboard.selectors import system

logger = logging.getLogger(__name__)


@rule("page.view")
@require_GET
def workers(request: HttpRequest) -> HttpResponse:
    return render(request, "system/workers.html", {"workers": system.worker_rows(), "queues": system.queue_depths()})


@rule("page.view")
@require_GET
def glossary(request: HttpRequest) -> HttpResponse:
    terms = sorted([*TERMS.items(), *METRICS.items()], key=lambda entry: str(entry[1].label).lower())
    return render(request, "system/glossary.html", {"terms": terms})


@rule(PUBLIC)
@require_GET
def livez(request: HttpRequest) -> HttpResponse:
    """The process answers."""
    return HttpResponse("ok\n", content_type="text/plain")


@rule(PUBLIC)
@require_GET
def readyz(request: HttpRequest) -> HttpResponse:
    """The database answers and has every table that this code expects."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        executor = MigrationExecutor(connection)
        waiting = len(executor.migration_plan(executor.loader.graph.leaf_nodes()))
    except DatabaseError:
        logger.exception("not ready: the database does not answer")
        return JsonResponse({"database": "unreachable"}, status=503)
    return JsonResponse({"database": "ok", "migrations_waiting": waiting}, status=503 if waiting else 200)
