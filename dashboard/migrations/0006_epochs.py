"""An epoch for each environment, shown to servers and reported by them; and the mark by which a restore is known."""

import pgtrigger.compiler
import pgtrigger.migrations
from django.db import migrations, models


POINTER = """
SELECT e.name AS environment,
       e.alias AS alias,
       e.generation AS generation,
       d.kind AS kind,
       v.digest AS variant_digest,
       CASE WHEN t.id IS NOT NULL THEN b.digest END AS base_digest,
       t.digest AS artifact_digest,
       d.digest AS digest{epoch}
FROM dashboard_environment e
LEFT JOIN dashboard_deployment d ON d.id = e.active_id
LEFT JOIN dashboard_checkpoint v ON v.id = d.variant_id
LEFT JOIN dashboard_artifact t ON t.id = d.artifact_id
LEFT JOIN dashboard_checkpoint b ON b.id = t.base_id
"""
# At the end, because only there a column can be added to a view in use: servers keep their right to read it.
WITH_EPOCH = "CREATE OR REPLACE VIEW serving_pointer AS" + POINTER.format(epoch=",\n       e.epoch AS epoch")
# A column cannot be taken from a view: it is made anew, and who could read it can read it again.
WITHOUT_EPOCH = f"""
DO $$
DECLARE
    readers text[] := ARRAY(
        SELECT grantee::text FROM information_schema.role_table_grants
        WHERE table_name = 'serving_pointer' AND privilege_type = 'SELECT' AND grantee <> current_user
    );
    reader text;
BEGIN
    DROP VIEW serving_pointer;
    CREATE VIEW serving_pointer AS {POINTER.format(epoch="")};
    FOREACH reader IN ARRAY readers LOOP
        EXECUTE format('GRANT SELECT ON serving_pointer TO %I', reader);
    END LOOP;
END $$
"""
# As selectors.recovery.database_mark reads it, written down here as it was when the rows began to be kept by it.
MARK = """
INSERT INTO dashboard_recovery (mark, report, created_at)
SELECT concat_ws('-', (SELECT system_identifier FROM pg_control_system()),
                 (SELECT timeline_id FROM pg_control_checkpoint()),
                 (SELECT oid FROM pg_database WHERE datname = current_database()),
                 'dashboard_job'::regclass::oid),
       '[]', clock_timestamp()
"""


class Migration(migrations.Migration):

    dependencies = [
        ('dashboard', '0005_claims_at_scale'),
    ]

    operations = [
        migrations.CreateModel(
            name='Recovery',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('mark', models.CharField(max_length=200)),
                ('report', models.JSONField(default=list)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
            ],
            options={
                'ordering': ['-id'],
            },
        ),
        migrations.AddField(
            model_name='environment',
            name='epoch',
            field=models.PositiveBigIntegerField(db_default=1, default=1),
        ),
        migrations.AddField(
            model_name='serverreport',
            name='epoch',
            field=models.BigIntegerField(db_default=1, default=1),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='environment',
            trigger=pgtrigger.compiler.Trigger(name='epoch_only_grows', sql=pgtrigger.compiler.UpsertTriggerSql(condition='WHEN (NEW."epoch" < (OLD."epoch"))', func="RAISE EXCEPTION 'the epoch of an environment only grows';", hash='a8fba9da178afeea1452d59b989827f5bf578bc8', operation='UPDATE', pgid='pgtrigger_epoch_only_grows_4ef9d', table='dashboard_environment', when='BEFORE')),
        ),
        migrations.RunSQL(WITH_EPOCH, WITHOUT_EPOCH),
        migrations.RunSQL(MARK, migrations.RunSQL.noop),
    ]
