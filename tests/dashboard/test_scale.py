"""Many finished jobs: a claim, the reconciler and a page of the job list read none of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from pytest_django.fixtures import Settings

from dashboard.lifecycle import Role
from dashboard.models import Job, Step
from dashboard.selectors import jobs as selectors
from dashboard.selectors.jobs import job_list, jobs_active, jobs_in_trouble
from dashboard.services.reconciling import reconcile
from dashboard.services.steps import ready_step, step_claim
from tests.dashboard.many_jobs import analyze, finished_jobs, waiting_jobs
from tests.dashboard.world import person

pytestmark = pytest.mark.django_db(transaction=True)

FINISHED = 20_000
LARGE = ("dashboard_job", "dashboard_step", "dashboard_attempt")
LISTS = [
    "",
    "state=active",
    "state=finished",
    "state=dead",
    "kind=rehearse",
    "state=failed&kind=import",
    "q=variant+19",
    "q=no-such-job",
    "q=%2319",
    "before=500",
]


@pytest.fixture
def _full(settings: Settings) -> None:
    settings.CELERY_BROKER_URL = ""
    finished_jobs(FINISHED)
    waiting_jobs(300, steps=3)
    analyze()


def plans(of: Callable[[], object]) -> dict[str, Any]:
    """The plan of each statement that ``of`` runs on jobs, steps or attempts."""
    found: dict[str, Any] = {}

    def explained(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if re.search(r"dashboard_(job|step|attempt)\b", sql) and sql.lstrip().upper().startswith(
            ("SELECT", "WITH", "UPDATE", "DELETE")
        ):
            with connection.connection.cursor() as cursor:
                cursor.execute("EXPLAIN (FORMAT JSON) " + sql, params)
                answer = cursor.fetchone()[0]
            found[sql] = json.loads(answer) if isinstance(answer, str) else answer
        return execute(sql, params, many, context)

    with connection.execute_wrapper(explained):
        of()
    return found


def nodes(plan: Any) -> Iterator[dict[str, Any]]:
    if isinstance(plan, dict):
        if "Node Type" in plan:
            yield plan
        for value in plan.values():
            yield from nodes(value)
    elif isinstance(plan, list):
        for value in plan:
            yield from nodes(value)


def whole_tables(found: dict[str, Any]) -> list[str]:
    return [
        f"{node['Relation Name']} in: {sql[:300]}"
        for sql, plan in found.items()
        for node in nodes(plan)
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] in LARGE
    ]


def scans(of: Callable[[], object]) -> tuple[dict[str, int], set[str]]:
    """How often each table was read as a whole while ``of`` ran, and which indexes were used, as Postgres counts it."""
    before = _index_scans()
    with transaction.atomic(), connection.cursor() as cursor:
        of()
        cursor.execute("SELECT relname, seq_scan FROM pg_stat_xact_user_tables WHERE relname = ANY(%s)", [list(LARGE)])
        whole = dict(cursor.fetchall())
    return whole, {name for name, count in _index_scans().items() if count > before.get(name, 0)}


def _index_scans() -> dict[str, int]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute("SELECT pg_stat_clear_snapshot()")
        cursor.execute("SELECT indexrelname, idx_scan FROM pg_stat_user_indexes")
        return dict(cursor.fetchall())


@pytest.mark.usefixtures("_full")
def test_a_claim_reads_along_the_indexes_of_what_is_open() -> None:
    for _ in range(8):  # the database settles on a plan after a few
        whole, used = scans(lambda: step_claim(worker="worker-1", queues=["cpu"]))
        assert whole == dict.fromkeys(LARGE, 0)
        assert {"job_active", "step_open", "step_done_by_key"} <= used
    whole, _ = scans(lambda: ready_step(["no-such-queue"]))
    assert whole == dict.fromkeys(LARGE, 0)


@pytest.mark.usefixtures("_full")
def test_a_claim_is_two_statements() -> None:
    with CaptureQueriesContext(connection) as captured:
        assert step_claim(worker="worker-1", queues=["cpu", "gpu"]) is not None
    assert len(captured) == 2, "one looks, one writes"


@pytest.mark.usefixtures("_full")
def test_the_reconciler_reads_no_finished_job() -> None:
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    Step.objects.filter(pk=claim.step_id).update(lease_until="2020-01-01T00:00Z")
    found = plans(reconcile)
    assert len(found) > 5
    assert whole_tables(found) == []
    assert Step.objects.get(pk=claim.step_id).causes == {"lost": 1}


def viewer() -> Client:
    client = Client()
    client.force_login(person(Role.VIEWER))
    return client


@pytest.mark.usefixtures("_full")
def test_no_page_of_jobs_reads_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "SEARCHED", 500)  # as far below the number of jobs as in a table of a million
    client = viewer()
    for address in LISTS:
        found = plans(lambda address=address: client.get(f"{reverse('job-list')}?{address}"))  # type: ignore[misc]
        assert found, address
        assert (address, whole_tables(found)) == (address, [])
    assert whole_tables(plans(jobs_active)) == []
    assert whole_tables(plans(jobs_in_trouble)) == []


def test_a_page_of_the_job_list_takes_as_many_queries_for_many_jobs_as_for_few() -> None:
    client = viewer()

    def queries() -> list[int]:
        counts = []
        for address in LISTS:
            with CaptureQueriesContext(connection) as captured:
                page = client.get(f"{reverse('job-list')}?{address}")
            # A page without rows saves the query that counts their steps.
            counts.append(len(captured) - bool(page.context["jobs"]))
        return counts

    finished_jobs(31)
    waiting_jobs(2)  # a page with jobs that wait asks why, in a few queries more, for all of them together
    few = queries()
    finished_jobs(3_000)
    waiting_jobs(50)
    many = queries()
    assert [address for address, now, then in zip(LISTS, many, few, strict=True) if now > then] == []
    assert many[0] == few[0]


def test_a_page_shows_each_job_with_its_steps_counted() -> None:
    finished_jobs(40, steps=3)
    waiting_jobs(2, steps=4)
    page = job_list(limit=5)
    assert [job.pk for job in page] == sorted(Job.objects.values_list("pk", flat=True), reverse=True)[:5]
    assert [(job.steps_done, job.steps_total) for job in page] == [(0, 4), (0, 4), (3, 3), (3, 3), (3, 3)]


def test_a_search_finds_by_number_by_person_and_by_a_part_of_the_title() -> None:
    finished_jobs(60)
    numbers = sorted(Job.objects.values_list("pk", flat=True))
    assert [job.title for job in job_list(query="VARIANT 60")] == ["bitdelta variant 60"]
    assert [job.pk for job in job_list(query=f"#{numbers[3]}")] == [numbers[3]]
    assert len(job_list(query=person(Role.ENGINEER).username.upper(), limit=100)) == 60
    assert job_list(query=person(Role.ENGINEER).username, state="dead") == []
    assert job_list(query="no such words") == []
