"""Django's entry for the one app."""

from django.apps import AppConfig

from compression_worker import faults


class DashboardConfig(AppConfig):
    name = "dashboard"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from dashboard.services.units import cut_connection

        faults.drop_database = cut_connection
