"""Whether the database was set back to an older state, and what that means for each environment and step."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

from django.db import connection

from dashboard.lifecycle import StepState
from dashboard.models import Environment, Recovery, ServerReport, Step
from dashboard.selectors.environments import deployment_words

MARK = """
SELECT concat_ws('-', (SELECT system_identifier FROM pg_control_system()),
                 (SELECT timeline_id FROM pg_control_checkpoint()),
                 (SELECT oid FROM pg_database WHERE datname = current_database()),
                 'dashboard_job'::regclass::oid)
"""
"""A restore of a dump makes its tables anew, under other numbers; a recovery to a point in time, or a replica that
takes over, begins another time line. A copy of the data folder changes neither: there only servers can tell."""


def database_mark() -> str:
    """By what the present database is told from one that was restored in its place."""
    with connection.cursor() as cursor:
        cursor.execute(MARK)
        row: tuple[str] = cursor.fetchone()
    return row[0]


def restored() -> bool:
    """Whether the database was restored, or taken over by a replica, since ``manage.py recover`` last looked.

    What is old and unreferenced then may only have lost its row: nothing is to be swept before a recovery.
    """
    known = Recovery.objects.order_by("-id").values_list("mark", flat=True).first()
    return known is not None and known != database_mark()


@dataclass(frozen=True, kw_only=True)
class Place:
    """An environment and what servers said of it."""

    environment: Environment
    reports: list[ServerReport]

    @property
    def ahead(self) -> list[ServerReport]:
        """Servers that saw a later deployment than the database knows, or another one in the same place."""
        return [report for report in self.reports if self._is_ahead(report)]

    def _is_ahead(self, report: ServerReport) -> bool:
        present = self.environment.epoch, self.environment.generation
        seen = report.epoch, report.wanted
        return seen > present or (seen == present and report.state == "rewound")

    @property
    def next_epoch(self) -> int:
        """One that no server has seen, wherever the database was set back to: the seconds since 1970.

        Counting on would not do. A second restore takes the database back before the first recovery, and a server that
        has seen that one's epoch may not have reported yet.
        """
        seen = [self.environment.epoch, *(report.epoch for report in self.reports)]
        return max(int(time.time()), *(epoch + 1 for epoch in seen))

    def lines(self) -> list[str]:
        """What it points at, and what each server answers from."""
        environment, active = self.environment, self.environment.active
        what = "nothing yet"
        if active is not None:
            who = f" by {active.created_by}" if active.created_by else ""
            what = (
                f"{deployment_words(active)} ({active.digest[:12]}), deployed {active.created_at:%Y-%m-%d %H:%M}{who}"
            )
        head = f"{environment.name} points at generation {environment.generation} of epoch {environment.epoch}: {what}"
        return [head, *(self._server_line(report) for report in self.reports)]

    def _server_line(self, report: ServerReport) -> str:
        seen = f"saw generation {report.wanted} of epoch {report.epoch}"
        answers = f"answers from generation {report.generation} ({report.digest[:12] or 'nothing'})"
        at = f"{report.reported_at:%Y-%m-%d %H:%M:%S}"
        return f"  {report.server} {seen}, {answers}, {report.state}, as of {at}"


def places() -> list[Place]:
    """Every environment, with the last report of each server."""
    reports: dict[str, list[ServerReport]] = defaultdict(list)
    for report in ServerReport.objects.order_by("server"):
        reports[report.environment].append(report)
    found = Environment.objects.select_related("active__variant", "active__artifact", "active__created_by")
    return [Place(environment=one, reports=reports[one.name]) for one in found.order_by("name")]


def steps_held() -> list[tuple[Step, bool]]:
    """Each running step, and whether its lease ran out by the database's clock."""
    running = Step.objects.filter(state=StepState.RUNNING).select_related("job").order_by("job_id", "index")
    lapsed = set(running.extra(where=["lease_until < clock_timestamp()"]).values_list("pk", flat=True))
    return [(step, step.pk in lapsed) for step in running]
