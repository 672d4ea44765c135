"""The view that servers follow: each environment with what it should answer from, by digest, and nothing else."""

from django.db import migrations

CREATE = """
CREATE VIEW serving_pointer AS
SELECT e.name AS environment,
       e.alias AS alias,
       e.generation AS generation,
       d.kind AS kind,
       v.digest AS variant_digest,
       CASE WHEN t.id IS NOT NULL THEN b.digest END AS base_digest,
       t.digest AS artifact_digest,
       d.digest AS digest
FROM dashboard_environment e
LEFT JOIN dashboard_deployment d ON d.id = e.active_id
LEFT JOIN dashboard_checkpoint v ON v.id = d.variant_id
LEFT JOIN dashboard_artifact t ON t.id = d.artifact_id
LEFT JOIN dashboard_checkpoint b ON b.id = t.base_id
"""


class Migration(migrations.Migration):

    dependencies = [
        ('dashboard', '0001_initial'),
    ]

    operations = [
        migrations.RunSQL(CREATE, "DROP VIEW serving_pointer"),
    ]
