"""Indexes under which neither a claim nor a page of the job list reads what is finished, however much that is."""

from django.db import migrations, models


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
    ]
