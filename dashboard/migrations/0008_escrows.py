"""Escrows of variants, and what the database refuses about them. Reversible while no weights were given up."""

import django.db.models.deletion
import pgtrigger.compiler
import pgtrigger.migrations
from django.conf import settings
from django.db import migrations, models


# As 0007 does it for the tables that were there then; it goes with its table.
NEVER_EMPTIED = """
    CREATE TRIGGER never_emptied BEFORE TRUNCATE ON dashboard_escrowevent
    EXECUTE FUNCTION dashboard_history_is_never_emptied();
"""


class Migration(migrations.Migration):

    dependencies = [
        ('dashboard', '0007_history_is_never_emptied'),
        ('pghistory', '0007_auto_20250421_0444'),
    ]

    operations = [
        migrations.CreateModel(
            name='Escrow',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('digest', models.CharField(max_length=64)),
                ('source_bytes', models.BigIntegerField()),
                ('escrow_bytes', models.BigIntegerField()),
                ('ledger', models.JSONField()),
                ('released_at', models.DateTimeField(null=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
            ],
        ),
        migrations.CreateModel(
            name='EscrowEvent',
            fields=[
                ('pgh_id', models.AutoField(primary_key=True, serialize=False)),
                ('pgh_created_at', models.DateTimeField(auto_now_add=True)),
                ('pgh_label', models.TextField(help_text='The event label.')),
                ('id', models.BigIntegerField()),
                ('digest', models.CharField(max_length=64)),
                ('released_at', models.DateTimeField(null=True)),
            ],
            options={
                'abstract': False,
            },
        ),
        migrations.AlterField(
            model_name='job',
            name='kind',
            field=models.CharField(choices=[('import', 'Import'), ('compress', 'Compression'), ('evaluate', 'Evaluation'), ('rehearse', 'Rollback rehearsal'), ('escrow', 'Escrow'), ('restore', 'Restore of full precision')], max_length=16),
        ),
        migrations.AlterField(
            model_name='jobevent',
            name='kind',
            field=models.CharField(choices=[('import', 'Import'), ('compress', 'Compression'), ('evaluate', 'Evaluation'), ('rehearse', 'Rollback rehearsal'), ('escrow', 'Escrow'), ('restore', 'Restore of full precision')], max_length=16),
        ),
        migrations.AlterField(
            model_name='sweepblob',
            name='kind',
            field=models.CharField(choices=[('leftover', 'Leftovers of broken attempts'), ('intermediate', 'Intermediate results of old jobs'), ('retired', 'Withdrawn artifacts'), ('released', 'Weights kept as escrow')], max_length=16),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='deployment',
            trigger=pgtrigger.compiler.Trigger(name='full_precision_is_at_hand', sql=pgtrigger.compiler.UpsertTriggerSql(func="\n                    PERFORM 1 FROM dashboard_escrow WHERE variant_id = NEW.variant_id FOR SHARE;\n                    IF EXISTS (SELECT 1 FROM dashboard_escrow\n                               WHERE variant_id = NEW.variant_id AND released_at IS NOT NULL) THEN\n                        RAISE EXCEPTION 'a variant whose weights were given up is restored before it is deployed';\n                    END IF;\n                    RETURN NEW;\n                ", hash='229762997124ce467854078f34df50cdc50d25bd', operation='INSERT', pgid='pgtrigger_full_precision_is_at_hand_356db', table='dashboard_deployment', when='BEFORE')),
        ),
        migrations.AddField(
            model_name='escrow',
            name='base',
            field=models.ForeignKey(on_delete=django.db.models.deletion.RESTRICT, related_name='escrows_on_base', to='dashboard.checkpoint'),
        ),
        migrations.AddField(
            model_name='escrow',
            name='job',
            field=models.OneToOneField(on_delete=django.db.models.deletion.RESTRICT, related_name='escrow', to='dashboard.job'),
        ),
        migrations.AddField(
            model_name='escrow',
            name='released_by',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
        migrations.AddField(
            model_name='escrow',
            name='variant',
            field=models.OneToOneField(on_delete=django.db.models.deletion.RESTRICT, related_name='escrow', to='dashboard.checkpoint'),
        ),
        migrations.AddField(
            model_name='escrowevent',
            name='pgh_context',
            field=models.ForeignKey(db_constraint=False, null=True, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', to='pghistory.context'),
        ),
        migrations.AddField(
            model_name='escrowevent',
            name='pgh_obj',
            field=models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='id_variant_digest_released_at_events', to='dashboard.escrow'),
        ),
        migrations.AddField(
            model_name='escrowevent',
            name='variant',
            field=models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', related_query_name='+', to='dashboard.checkpoint'),
        ),
        migrations.AddConstraint(
            model_name='escrow',
            constraint=models.CheckConstraint(condition=models.Q(('digest__regex', '^[0-9a-f]{64}$')), name='escrow_digest_is_sha256'),
        ),
        migrations.AddConstraint(
            model_name='escrow',
            constraint=models.CheckConstraint(condition=models.Q(('base', models.F('variant')), _negated=True), name='escrow_has_another_base'),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='escrow',
            trigger=pgtrigger.compiler.Trigger(name='what_is_kept_never_changes', sql=pgtrigger.compiler.UpsertTriggerSql(condition='WHEN (OLD."variant_id" IS DISTINCT FROM (NEW."variant_id") OR OLD."base_id" IS DISTINCT FROM (NEW."base_id") OR OLD."digest" IS DISTINCT FROM (NEW."digest"))', func="RAISE EXCEPTION 'pgtrigger: Cannot update rows from % table', TG_TABLE_NAME;", hash='61d5070e3853cd0d68835bda36f776ad91b9e1fe', operation='UPDATE', pgid='pgtrigger_what_is_kept_never_changes_87de9', table='dashboard_escrow', when='BEFORE')),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='escrow',
            trigger=pgtrigger.compiler.Trigger(name='weights_in_use_stay', sql=pgtrigger.compiler.UpsertTriggerSql(condition='WHEN (NEW."released_at" IS NOT NULL)', func="\n                    IF \n    EXISTS (SELECT 1 FROM dashboard_environment e\n            JOIN dashboard_deployment d ON d.id = e.active_id\n            LEFT JOIN dashboard_deployment r ON r.id = d.replaces_id\n            WHERE NEW.variant_id IN (d.variant_id, r.variant_id))\n THEN\n                        RAISE EXCEPTION 'weights that an environment stands on are not given up';\n                    END IF;\n                    RETURN NEW;\n                ", hash='bd8a54cf3045fd4f2145d42971d1f4f8794b355c', operation='INSERT OR UPDATE', pgid='pgtrigger_weights_in_use_stay_56139', table='dashboard_escrow', when='BEFORE')),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='escrow',
            trigger=pgtrigger.compiler.Trigger(name='the_only_way_back_stays', sql=pgtrigger.compiler.UpsertTriggerSql(constraint='CONSTRAINT', func="\n                    IF EXISTS (SELECT 1 FROM dashboard_checkpoint WHERE id = OLD.variant_id) AND\n                       (OLD.released_at IS NOT NULL OR \n    EXISTS (SELECT 1 FROM dashboard_environment e\n            JOIN dashboard_deployment d ON d.id = e.active_id\n            LEFT JOIN dashboard_deployment r ON r.id = d.replaces_id\n            WHERE OLD.variant_id IN (d.variant_id, r.variant_id))\n) THEN\n                        RAISE EXCEPTION 'an escrow stays while its variant needs it for full precision';\n                    END IF;\n                    RETURN NULL;\n                ", hash='c8d1055634a2d8f06500262adf479f08755fa813', operation='DELETE', pgid='pgtrigger_the_only_way_back_stays_58b6a', table='dashboard_escrow', timing='DEFERRABLE INITIALLY DEFERRED', when='AFTER')),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='escrow',
            trigger=pgtrigger.compiler.Trigger(name='insert_insert', sql=pgtrigger.compiler.UpsertTriggerSql(func='INSERT INTO "dashboard_escrowevent" ("digest", "id", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "released_at", "variant_id") VALUES (NEW."digest", NEW."id", _pgh_attach_context(), NOW(), \'insert\', NEW."id", NEW."released_at", NEW."variant_id"); RETURN NULL;', hash='6d08cc346b677b1f8f28a8812228225e33c60d06', operation='INSERT', pgid='pgtrigger_insert_insert_20662', table='dashboard_escrow', when='AFTER')),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='escrow',
            trigger=pgtrigger.compiler.Trigger(name='update_update', sql=pgtrigger.compiler.UpsertTriggerSql(condition='WHEN (OLD."digest" IS DISTINCT FROM (NEW."digest") OR OLD."id" IS DISTINCT FROM (NEW."id") OR OLD."released_at" IS DISTINCT FROM (NEW."released_at") OR OLD."variant_id" IS DISTINCT FROM (NEW."variant_id"))', func='INSERT INTO "dashboard_escrowevent" ("digest", "id", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "released_at", "variant_id") VALUES (NEW."digest", NEW."id", _pgh_attach_context(), NOW(), \'update\', NEW."id", NEW."released_at", NEW."variant_id"); RETURN NULL;', hash='a0429b314256b8df8ab92f4918e984d2afad9b72', operation='UPDATE', pgid='pgtrigger_update_update_7fe8e', table='dashboard_escrow', when='AFTER')),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='escrowevent',
            trigger=pgtrigger.compiler.Trigger(name='append_only', sql=pgtrigger.compiler.UpsertTriggerSql(func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;", hash='960a25f19d14d32cda431d752117d74faea75f6c', operation='UPDATE OR DELETE', pgid='pgtrigger_append_only_f6371', table='dashboard_escrowevent', when='BEFORE')),
        ),
        migrations.RunSQL(NEVER_EMPTIED, migrations.RunSQL.noop),
    ]
