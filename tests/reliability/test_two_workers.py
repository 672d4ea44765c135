"""Two worker processes share the layers of one job, and the artifact has the bytes that one worker makes.

How long they take is measured by ``python -m tests.benchmarks.two_workers``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from django.db import connection
from pytest_django.fixtures import Settings

from dashboard.models import Attempt, Step
from tests.benchmarks.two_workers import run
from tests.tiny import make_tiny_pair

pytestmark = pytest.mark.django_db(transaction=True)


def test_two_workers_share_a_job_of_24_layers_and_make_the_same_bytes(tmp_path: Path, settings: Settings) -> None:
    make_tiny_pair(tmp_path / "models", layers=24)
    database = connection.settings_dict
    address = f"{database['HOST']}:{database['PORT']}/{database['NAME']}"
    environment = {"DATABASE_URL": f"postgres://{database['USER']}:{database['PASSWORD']}@{address}"}
    environment |= {"CELERY_BROKER_URL": ""}
    two = run(tmp_path / "models", tmp_path / "store-of-two", 2, environment)
    assert Step.objects.count() == 27
    assert Attempt.objects.filter(outcome="done").count() == 27, "each step is done once"
    assert min(two.shares.get(name, 0) for name in ("worker-1", "worker-2")) >= 3, two.shares
    one = run(tmp_path / "models", tmp_path / "store-of-one", 1, environment)
    assert one.shares == {"worker-1": 27}
    assert not Step.objects.filter(reused=True).exists()
    assert one.artifact == two.artifact
