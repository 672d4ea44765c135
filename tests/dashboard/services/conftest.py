"""A worker for tests of jobs, and settings that do not make them wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from pytest_django.fixtures import Settings

if TYPE_CHECKING:
    from dashboard.execution import Execution


@pytest.fixture(autouse=True)
def _quick(settings: Settings) -> None:
    """No pause between attempts, and no broker: rows are the truth."""
    settings.RETRY_SECONDS = 0
    settings.CELERY_BROKER_URL = ""


@pytest.fixture
def worker() -> Iterator[Execution]:
    # Imported here: pytest reads this file before Django is set up.
    from tests.dashboard.services.jobs_at_work import execution

    present = execution()
    yield present
    present.close()
