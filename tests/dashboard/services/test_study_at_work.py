"""A study from its form to its page with real steps: three methods at two widths, compressed, measured and compared."""

from __future__ import annotations

from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from compression_worker.launcher import Launcher, child_command
from dashboard.execution import Execution
from dashboard.lifecycle import JobState, Role
from dashboard.models import Checkpoint, Study
from dashboard.selectors.studies import SHOWN
from dashboard.services.evaluations import sample_set_create
from dashboard.services.registry import checkpoint_import
from tests.dashboard.world import person
from tests.tiny import make_tiny_pair

pytestmark = pytest.mark.django_db(transaction=True)

TEXT = b"".join(b"Paragraph %d: the quick brown fox jumps over the lazy dog.\n\n" % n for n in range(3000))
WAYS = ["gptq:2", "gptq:4", "quip_sharp:2", "quip_sharp:4", "int21:2", "int21:4"]
TOKENS = 2048


@pytest.fixture
def worker(settings: Settings, tmp_path: Path) -> Iterator[Execution]:
    """Its child is the product's own."""
    settings.ARTIFACT_ROOT = str(tmp_path / "store")
    settings.IMPORT_ROOTS = {"models": str(tmp_path / "models")}
    make_tiny_pair(tmp_path / "models")
    command = child_command(tmp_path / "store", {"models": tmp_path / "models"}, "cpu")
    present = Execution(name="real", queues=["cpu"], launcher=Launcher(command))
    yield present
    present.close()


def test_one_form_compresses_a_model_in_six_ways_and_one_page_compares_them(worker: Execution) -> None:
    engineer = person(Role.ENGINEER)
    checkpoint_import(actor=engineer, root="models", folder="base", name="base")
    worker.run_all()
    base = Checkpoint.objects.get(name="base")
    read = sample_set_create(actor=engineer, name="read", kind="text", data=TEXT)
    held = sample_set_create(actor=engineer, name="held", kind="text", data=TEXT[:4000])
    client = Client()
    client.force_login(engineer)
    asked = {"variant": base.pk, "calibration": read.pk, "text_set": held.pk, "priority": "0", "ways": WAYS}
    brief = {"window_tokens": "32", "max_windows": "6", "max_new_tokens": "2", "bootstrap_resamples": "200"}
    answer = client.post(reverse("study-new"), asked | brief | {"training_tokens": str(TOKENS)})
    study = Study.objects.get()
    assert answer.headers["Location"] == reverse("study-detail", args=[study.pk])

    worker.run_all()  # the compressions, and the evaluations that follow by themselves
    for trial in study.trials.select_related("compression__artifact", "evaluation"):
        assert trial.compression.state == JobState.SUCCEEDED, trial.compression.error
        assert trial.evaluation is not None
        assert trial.evaluation.state == JobState.SUCCEEDED, trial.evaluation.error
        training = trial.compression.artifact.figures.get("training") or {"tokens": None}
        # As many as were asked for, in windows of what the tiny model reads: half of the method's own 512.
        assert training["tokens"] == (TOKENS // 2 if trial.method == "int21" else None)

    response = client.get(reverse("study-detail", args=[study.pk]))
    page = " ".join(unescape(response.content.decode()).split())
    assert "6 of 6 measured" in page
    assert "is best at the fewest bits" in page
    assert "<dt>Training tokens</dt><dd>2,048</dd>" in page
    rows = response.context["rows"]
    assert [f"{row.trial.method}:{row.trial.bits}" for row in rows] == WAYS
    for row in rows:
        assert row.trial.bits <= row.linears_bits < 16, row.label
        for metric in ("perplexity", "kl_divergence"):
            figure = row.cells[SHOWN.index(metric)][1]
            assert f'{figure.value}</span> <span class="interval">({figure.low} … {figure.high})' in page, row.label
