"""Claims and job lists that read nothing of what is finished, however much that is.

The two halves of a claim are functions of the database: it keeps their plans, where a statement that comes from outside
is planned anew each time, for longer than it runs. They keep nothing between transactions, so that a connection pool
may give each to another session.
"""

from django.db import migrations, models

# One row for each queue that has a step to do: a running one whose lease lapsed counts, its claimer is gone. Nothing is
# locked: what was seen is compared again when the claim is written.
STEP_NEXT = """
CREATE FUNCTION step_next(p_queues text[], p_held bigint[]) RETURNS TABLE (
    job_id bigint, job_state text, cancel_requested text, blocked_reason text, priority smallint,
    step_id bigint, index integer, state text, attempt integer, causes jsonb, lease_until timestamptz,
    not_before timestamptz, name text, kind text, params jsonb, seed bigint, inputs jsonb, now timestamptz
) LANGUAGE plpgsql VOLATILE AS $body$
#variable_conflict use_column
DECLARE
    one_queue text;
BEGIN
    FOREACH one_queue IN ARRAY p_queues LOOP
        RETURN QUERY
        SELECT j.id, j.state::text, j.cancel_requested::text, j.blocked_reason::text, j.priority,
            s.id, s.index, s.state::text, s.attempt, s.causes, s.lease_until,
            s.not_before, s.name::text, s.kind::text, s.params, s.seed,
            (
                SELECT jsonb_object_agg(needed.key, CASE WHEN needed.value NOT LIKE '@%' THEN needed.value ELSE (
                    SELECT made.output FROM dashboard_step made
                    WHERE made.job_id = s.job_id AND made.index = substr(needed.value, 2)::int AND made.state = 'done'
                ) END)
                FROM jsonb_each_text(s.inputs) needed
            ),
            clock_timestamp()
        FROM dashboard_job j CROSS JOIN LATERAL (
            SELECT * FROM dashboard_step open
            WHERE open.job_id = j.id AND open.state IN ('waiting', 'running') AND open.queue = one_queue
                AND (
                    (open.state = 'running' AND open.lease_until < clock_timestamp())
                    OR (
                        open.state = 'waiting' AND (open.not_before IS NULL OR open.not_before <= clock_timestamp())
                        AND NOT EXISTS (
                            SELECT 1 FROM jsonb_each_text(open.inputs) needed
                            WHERE needed.value LIKE '@%' AND 'done' IS DISTINCT FROM (
                                SELECT made.state FROM dashboard_step made
                                WHERE made.job_id = open.job_id AND made.index = substr(needed.value, 2)::int
                            )
                        )
                    )
                )
            ORDER BY open.index LIMIT 1
        ) s
        WHERE j.state IN ('queued', 'running') AND j.cancel_requested = '' AND j.id <> ALL(p_held)
        ORDER BY j.priority DESC, j.id
        LIMIT 1;
    END LOOP;
END
$body$
"""

# The claim. It waits for nobody: a job that somebody holds is not free, and a step that moved on since it was seen is
# not taken. The last column is the output of a done step with the same key.
STEP_TAKE = """
CREATE FUNCTION step_take(
    p_job bigint, p_job_seen text, p_job_state text, p_step bigint, p_seen integer, p_attempt integer, p_state text,
    p_worker text, p_lease_until timestamptz, p_not_before timestamptz, p_key text, p_now timestamptz
) RETURNS TABLE (is_free boolean, is_taken boolean, output text) LANGUAGE plpgsql VOLATILE AS $body$
#variable_conflict use_column
BEGIN
    is_taken := false;
    PERFORM 1 FROM dashboard_job
    WHERE id = p_job AND state = p_job_seen AND cancel_requested = ''
    FOR NO KEY UPDATE SKIP LOCKED;
    is_free := FOUND;
    IF is_free THEN
        UPDATE dashboard_step SET state = p_state, attempt = p_attempt, owner = p_worker, lease_until = p_lease_until,
            not_before = p_not_before, key = p_key, progress_done = 0, progress_total = 0, progress_unit = '',
            progress_at = NULL, started_at = p_now, finished_at = NULL
        WHERE id = p_step AND job_id = p_job AND attempt = p_seen AND state = 'waiting';
        is_taken := FOUND;
    END IF;
    IF is_taken THEN
        INSERT INTO dashboard_attempt (step_id, number, worker, outcome, detail, started_at)
        VALUES (p_step, p_attempt, p_worker, 'running', '', p_now);
        UPDATE dashboard_job SET state = p_job_state, started_at = COALESCE(started_at, p_now)
        WHERE id = p_job AND state <> p_job_state;
        SELECT known.output INTO output FROM dashboard_step known
        WHERE known.key = p_key AND known.state = 'done' ORDER BY known.id DESC LIMIT 1;
    END IF;
    RETURN NEXT;
END
$body$
"""
SIGNATURES = (
    "step_next(text[], bigint[])",
    "step_take(bigint, text, text, bigint, integer, integer, text, text, timestamptz, timestamptz, text, timestamptz)",
)


class Migration(migrations.Migration):

    dependencies = [
        ('dashboard', '0004_preflight'),
    ]

    operations = [
        migrations.AddIndex(
            model_name='job',
            index=models.Index(condition=models.Q(('state__in', ['blocked', 'queued', 'running', 'verifying'])), fields=['-id'], name='job_unfinished'),
        ),
        migrations.AddIndex(
            model_name='job',
            index=models.Index(fields=['state', '-id'], name='job_by_state'),
        ),
        migrations.AddIndex(
            model_name='job',
            index=models.Index(fields=['kind', '-id'], name='job_by_kind'),
        ),
        migrations.AddIndex(
            model_name='job',
            index=models.Index(fields=['created_by', '-id'], name='job_by_person'),
        ),
        migrations.AddIndex(
            model_name='step',
            index=models.Index(condition=models.Q(('state__in', ['running', 'waiting'])), fields=['job', 'queue', 'index'], name='step_open'),
        ),
        migrations.RunSQL(STEP_NEXT, f"DROP FUNCTION {SIGNATURES[0]}"),
        migrations.RunSQL(STEP_TAKE, f"DROP FUNCTION {SIGNATURES[1]}"),
        *[migrations.RunSQL(f"REVOKE ALL ON FUNCTION {one} FROM PUBLIC", migrations.RunSQL.noop) for one in SIGNATURES],
    ]
