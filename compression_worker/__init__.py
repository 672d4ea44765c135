"""How models become small, and how they run. Knows neither Django nor Celery."""
