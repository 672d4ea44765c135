"""Bring the database and the static files up to date, in one Django process (its start is the dear part).

``DELTAWORKS_SERVER_ROLE`` names the database role that serving processes sign in with; without it nothing is granted.
"""

from __future__ import annotations

import os

import django
from django.core.management import call_command


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "dashboard.settings")
    django.setup()
    call_command("migrate", interactive=False, verbosity=1)
    if role := os.environ.get("DELTAWORKS_SERVER_ROLE"):
        call_command("serving_grants", role=role)
    call_command("collectstatic", interactive=False, clear=True, verbosity=0)


if __name__ == "__main__":
    main()
