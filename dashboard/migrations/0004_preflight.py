"""What the pre-flight promised of a job, what a worker has, and an index to find the newest measured steps of a kind.

Every new column may be left out of an INSERT, so that processes of the release before go on working.
"""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('dashboard', '0003_storage'),
    ]

    operations = [
        migrations.AddField(
            model_name='job',
            name='estimate',
            field=models.JSONField(null=True),
        ),
        migrations.AddField(
            model_name='worker',
            name='code_version',
            field=models.CharField(blank=True, db_default='', default='', max_length=32),
        ),
        migrations.AddField(
            model_name='worker',
            name='gpu_memory_bytes',
            field=models.BigIntegerField(null=True),
        ),
        migrations.AddField(
            model_name='worker',
            name='gpu_name',
            field=models.CharField(blank=True, db_default='', default='', max_length=100),
        ),
        migrations.AddField(
            model_name='worker',
            name='memory_bytes',
            field=models.BigIntegerField(null=True),
        ),
        migrations.AddField(
            model_name='worker',
            name='memory_limit_bytes',
            field=models.BigIntegerField(null=True),
        ),
        migrations.AddField(
            model_name='worker',
            name='trouble',
            field=models.TextField(blank=True, db_default='', default=''),
        ),
        migrations.AddIndex(
            model_name='step',
            index=models.Index(
                condition=models.Q(('reused', False), ('state', 'done')),
                fields=['kind', '-id'],
                name='step_measured',
            ),
        ),
    ]
