"""Settings that do not make the tests of this folder wait."""

from __future__ import annotations

import pytest
from pytest_django.fixtures import Settings


@pytest.fixture(autouse=True)
def _quick(settings: Settings) -> None:
    """No pause between attempts, and no broker unless a test starts one: rows are the truth."""
    settings.RETRY_SECONDS = 0
    settings.CELERY_BROKER_URL = ""
