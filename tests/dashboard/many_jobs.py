"""A table full of jobs, written by the database itself: finished ones with their steps, and a few that wait."""

from __future__ import annotations

from django.db import connection
from django.db.backends.utils import CursorWrapper

from dashboard.lifecycle import Role
from tests.dashboard.world import pair, person

JOBS = """
    INSERT INTO dashboard_job (kind, title, spec, method, variant_id, state, blocked_reason, cancel_requested, priority,
      queue, error_code, error, created_by_id, created_at, started_at, finished_at, is_demo)
    SELECT (ARRAY['compress', 'compress', 'evaluate', 'import', 'rehearse'])[1 + n %% 5],
      'bitdelta variant ' || n, '{"config": {}, "first": {}}', 'bitdelta', %(variant)s,
      CASE WHEN n %% 97 = 0 THEN 'failed' WHEN n %% 101 = 0 THEN 'cancelled' WHEN n %% 1009 = 0 THEN 'dead'
        ELSE 'succeeded' END,
      '', '', 0, 'cpu', '', '', %(person)s, at, at, at + interval '1 hour', false
    FROM (SELECT n, now() - interval '900 days' + n * interval '1 minute' AS at FROM generate_series(1, %(count)s) n) made
"""
STEPS = """
    INSERT INTO dashboard_step (job_id, index, name, "group", kind, params, inputs, seed, queue, state, attempt, causes,
      owner, key, output, reused, data, progress_done, progress_total, progress_unit, started_at, finished_at)
    SELECT j.id, n, CASE n WHEN 0 THEN 'plan' ELSE 'layer ' || n END, 'layer', 'bitdelta.layer', '{}',
      CASE n WHEN 0 THEN '{}' ELSE '{"plan": "@0"}' END::jsonb, j.id, %(queue)s, %(state)s,
      CASE %(state)s WHEN 'done' THEN 1 ELSE 0 END, '{}', '', CASE %(state)s WHEN 'done' THEN
      encode(sha256(('key' || j.id || '-' || n)::bytea), 'hex') ELSE '' END, '', false, '{}', 0, 0, '',
      j.started_at, j.finished_at
    FROM dashboard_job j CROSS JOIN generate_series(0, %(steps)s - 1) n
    WHERE j.id > %(after)s
"""
WAITING = """
    INSERT INTO dashboard_job (kind, title, spec, method, variant_id, state, blocked_reason, cancel_requested, priority,
      queue, error_code, error, created_by_id, created_at, is_demo)
    SELECT 'compress', 'waiting ' || n, '{"config": {}, "first": {}}', 'bitdelta', %(variant)s, 'queued', '', '',
      %(priority)s, %(queue)s, '', '', %(person)s, now(), false
    FROM generate_series(1, %(count)s) n
"""


def finished_jobs(count: int, *, steps: int = 2) -> None:
    """``count`` jobs of all kinds and ends, with ``steps`` finished steps and their attempts each."""
    values = {"count": count, "variant": pair()[1].pk, "person": person(Role.ENGINEER).pk}
    with connection.cursor() as cursor:
        after = _newest(cursor)
        _without_triggers(cursor, "dashboard_job", JOBS, values)
        made = {"after": after, "steps": steps, "state": "done", "queue": "cpu"}
        cursor.execute(STEPS, made)
        cursor.execute(
            """INSERT INTO dashboard_attempt (step_id, number, worker, outcome, detail, started_at, finished_at)
            SELECT s.id, 1, 'worker-1', 'done', '', s.started_at, s.finished_at
            FROM dashboard_step s WHERE s.job_id > %(after)s""",
            made,
        )


def waiting_jobs(count: int, *, steps: int = 1, queue: str = "cpu", priority: int = 0) -> None:
    """``count`` queued jobs; the steps after the first one need it."""
    values = {
        "count": count,
        "variant": pair()[1].pk,
        "person": person(Role.ENGINEER).pk,
        "queue": queue,
        "priority": priority,
    }
    with connection.cursor() as cursor:
        after = _newest(cursor)
        _without_triggers(cursor, "dashboard_job", WAITING, values)
        cursor.execute(STEPS, {"after": after, "steps": steps, "state": "waiting", "queue": queue})


def analyze() -> None:
    """Tell the planner what there is, as autovacuum does on a server that has been up for a while."""
    for table in ("job", "step", "attempt"):
        with connection.cursor() as cursor:
            cursor.execute(f"VACUUM ANALYZE dashboard_{table}")


def _newest(cursor: CursorWrapper) -> int:
    cursor.execute("SELECT coalesce(max(id), 0) FROM dashboard_job")
    return int(cursor.fetchone()[0])


def _without_triggers(cursor: CursorWrapper, table: str, statement: str, values: dict[str, object]) -> None:
    """No history for rows that nobody made."""
    cursor.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    cursor.execute(statement, values)
    cursor.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
