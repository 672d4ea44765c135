"""Studies: several compressions of one checkpoint, each with the evaluation that follows it. Reversible."""

import django.db.models.deletion
import pgtrigger.compiler
import pgtrigger.migrations
from django.conf import settings
from django.db import migrations, models


# As 0007 does it for the tables that were there then; it goes with its table.
NEVER_EMPTIED = """
    CREATE TRIGGER never_emptied BEFORE TRUNCATE ON dashboard_studyevent
    EXECUTE FUNCTION dashboard_history_is_never_emptied();
"""


class Migration(migrations.Migration):

    dependencies = [
        ('dashboard', '0008_escrows'),
        ('pghistory', '0007_auto_20250421_0444'),
    ]

    operations = [
        migrations.CreateModel(
            name='Study',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('title', models.CharField(max_length=200)),
                ('config', models.JSONField()),
                ('queue', models.CharField(max_length=32)),
                ('priority', models.SmallIntegerField(default=0)),
                ('stopped_at', models.DateTimeField(null=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('is_demo', models.BooleanField(default=False)),
                ('calibration', models.ForeignKey(null=True, on_delete=django.db.models.deletion.RESTRICT, related_name='+', to='dashboard.sampleset')),
                ('choice_set', models.ForeignKey(null=True, on_delete=django.db.models.deletion.RESTRICT, related_name='+', to='dashboard.sampleset')),
                ('created_by', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL)),
                ('text_set', models.ForeignKey(null=True, on_delete=django.db.models.deletion.RESTRICT, related_name='+', to='dashboard.sampleset')),
                ('variant', models.ForeignKey(on_delete=django.db.models.deletion.RESTRICT, related_name='studies', to='dashboard.checkpoint')),
            ],
            options={
                'verbose_name_plural': 'studies',
                'ordering': ['-id'],
            },
        ),
        migrations.CreateModel(
            name='StudyEvent',
            fields=[
                ('pgh_id', models.AutoField(primary_key=True, serialize=False)),
                ('pgh_created_at', models.DateTimeField(auto_now_add=True)),
                ('pgh_label', models.TextField(help_text='The event label.')),
                ('id', models.BigIntegerField()),
                ('title', models.CharField(max_length=200)),
                ('stopped_at', models.DateTimeField(null=True)),
                ('pgh_context', models.ForeignKey(db_constraint=False, null=True, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', to='pghistory.context')),
                ('pgh_obj', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='id_title_variant_stopped_at_events', to='dashboard.study')),
                ('variant', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', related_query_name='+', to='dashboard.checkpoint')),
            ],
            options={
                'abstract': False,
            },
        ),
        migrations.CreateModel(
            name='Trial',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('index', models.PositiveIntegerField()),
                ('method', models.CharField(max_length=32)),
                ('bits', models.PositiveSmallIntegerField(null=True)),
                ('problem', models.TextField(blank=True, default='')),
                ('compression', models.OneToOneField(on_delete=django.db.models.deletion.RESTRICT, related_name='trial', to='dashboard.job')),
                ('evaluation', models.OneToOneField(null=True, on_delete=django.db.models.deletion.RESTRICT, related_name='measured_trial', to='dashboard.job')),
                ('study', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='trials', to='dashboard.study')),
            ],
            options={
                'ordering': ['study_id', 'index'],
            },
        ),
        migrations.AddConstraint(
            model_name='study',
            constraint=models.CheckConstraint(condition=models.Q(('text_set__isnull', False), ('choice_set__isnull', False), _connector='OR'), name='study_measures_something'),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='study',
            trigger=pgtrigger.compiler.Trigger(name='insert_insert', sql=pgtrigger.compiler.UpsertTriggerSql(func='INSERT INTO "dashboard_studyevent" ("id", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "stopped_at", "title", "variant_id") VALUES (NEW."id", _pgh_attach_context(), NOW(), \'insert\', NEW."id", NEW."stopped_at", NEW."title", NEW."variant_id"); RETURN NULL;', hash='a5f8e9f89740fba5f895f6faacd8f3b73e64f74b', operation='INSERT', pgid='pgtrigger_insert_insert_ddcf6', table='dashboard_study', when='AFTER')),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='study',
            trigger=pgtrigger.compiler.Trigger(name='update_update', sql=pgtrigger.compiler.UpsertTriggerSql(condition='WHEN (OLD."stopped_at" IS DISTINCT FROM (NEW."stopped_at"))', func='INSERT INTO "dashboard_studyevent" ("id", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "stopped_at", "title", "variant_id") VALUES (NEW."id", _pgh_attach_context(), NOW(), \'update\', NEW."id", NEW."stopped_at", NEW."title", NEW."variant_id"); RETURN NULL;', hash='258ce383ec12604ff53e34a2bf13c3794f5209a5', operation='UPDATE', pgid='pgtrigger_update_update_a0caf', table='dashboard_study', when='AFTER')),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='studyevent',
            trigger=pgtrigger.compiler.Trigger(name='append_only', sql=pgtrigger.compiler.UpsertTriggerSql(func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;", hash='f6191802ac70df301240b210e754639800704679', operation='UPDATE OR DELETE', pgid='pgtrigger_append_only_04b47', table='dashboard_studyevent', when='BEFORE')),
        ),
        migrations.AddIndex(
            model_name='trial',
            index=models.Index(condition=models.Q(('evaluation__isnull', True), ('problem', '')), fields=['study', 'index'], name='trial_unmeasured'),
        ),
        migrations.AddConstraint(
            model_name='trial',
            constraint=models.UniqueConstraint(fields=('study', 'index'), name='trial_once_per_index'),
        ),
        migrations.AddConstraint(
            model_name='trial',
            constraint=models.UniqueConstraint(fields=('study', 'method', 'bits'), name='trial_once', nulls_distinct=False),
        ),
        migrations.RunSQL(NEVER_EMPTIED, migrations.RunSQL.noop),
    ]
