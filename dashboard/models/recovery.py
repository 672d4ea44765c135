"""What ``manage.py recover`` remembers: by which mark it knew the database, and what it did there."""

from __future__ import annotations

from django.db import models


class Recovery(models.Model):
    """One look at the database after which everything in it counts as of one time.

    ``mark`` names the database as the server knows it. A restore makes another one, so a mark that differs from the
    present one says that the rows are older than what workers and servers have seen.
    """

    mark = models.CharField(max_length=200)
    report = models.JSONField(default=list)  # the lines that were printed
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-id"]
