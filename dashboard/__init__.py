"""The web floor: what people see, decide and remember."""

from dashboard.celery import app as celery_app

__all__ = ["celery_app"]
