"""Jobs that cannot fit are refused with what would; jobs that can keep what was promised. Steps go to their queue."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.contracts import PlannedStep
from compression_worker.preflight import Estimate
from compression_worker.store import Store
from dashboard.lifecycle import JobState, Refused, Role, StepState
from dashboard.models import Checkpoint, Job, SampleSet, Step, Worker
from dashboard.selectors.promises import promises
from dashboard.selectors.rates import measured_rates, quantile, time_needed
from dashboard.services.evaluations import evaluation_create
from dashboard.services.jobs import compression_create, job_retry
from dashboard.services.ordering import steps_insert, wake_waiting
from dashboard.services.registry import checkpoint_import
from tests.dashboard.world import checkpoint, digest, pair, person

pytestmark = pytest.mark.django_db

CONFIG = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
PARAMETERS = 1_235_814_400
WEIGHTS = 2 * PARAMETERS


def variant() -> Checkpoint:
    """A model of 1.2 billion parameters, as its manifest tells it."""
    found = Checkpoint.objects.filter(name="large").first()
    values: dict[str, Any] = {
        "manifest": {"config": CONFIG, "weight_bytes": WEIGHTS, "files": {}},
        "parameters": PARAMETERS,
        "size_bytes": WEIGHTS + 9_000_000,
    }
    return found or checkpoint("large", checkpoint("large-base", **values), **values)


def text() -> SampleSet:
    return SampleSet.objects.get_or_create(
        name="text", defaults={"kind": "text", "digest": digest("text"), "samples": 9, "size_bytes": 90_000}
    )[0]


def worker(name: str = "w1", queues: str = "cpu", **values: Any) -> Worker:
    now = timezone.now()
    return Worker.objects.create(name=name, queues=queues, pid=1, started_at=now, seen_at=now, **values)


def ask(config: dict[str, Any] | None = None, **values: Any) -> Job:
    given: dict[str, Any] = {"actor": person(Role.ENGINEER), "method": "bitdelta", "variant": variant()}
    given |= {"config": config or {}, "calibration": text()}
    return compression_create(**(given | values))


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda self: size)


def test_a_job_without_room_is_refused_with_how_many_bytes_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1_000_000_000)
    with pytest.raises(Refused, match=r"needs 1\.31 GB of free room.*has 1.00 GB: \d+ MB too little.*Free \d+ MB"):
        ask()
    assert not Job.objects.exists()
    free(monkeypatch, 1_400_000_000)
    assert ask().state == JobState.QUEUED


def test_a_job_that_fits_on_no_worker_is_refused_with_a_change_that_is_then_accepted() -> None:
    worker(memory_bytes=16_000_000_000)
    huge = {"batch_size": 64, "sequence_length": 512}
    with pytest.raises(Refused, match=r"“distillation” needs .* of memory") as refusal:
        ask(huge)
    change = re.search(r"It would fit with batch_size (\d+)\.", str(refusal.value))
    assert change, str(refusal.value)
    batch = int(change[1])
    assert ask(huge | {"batch_size": batch}).estimate is not None
    with pytest.raises(Refused):
        ask(huge | {"batch_size": 2 * batch})


def test_a_model_too_large_to_distil_is_still_compressed_without() -> None:
    worker(memory_bytes=6_000_000_000)
    with pytest.raises(Refused, match="It would fit with distill_steps 0"):
        ask()
    ask({"distill_steps": 0})


def test_a_machine_too_small_for_anything_is_told_what_it_takes() -> None:
    worker(memory_bytes=300_000_000)
    with pytest.raises(Refused, match="No smaller setting fits: it takes a worker with at least"):
        ask({"distill_steps": 0})


def test_the_limit_of_a_step_counts_and_not_only_the_machine() -> None:
    worker(memory_bytes=64_000_000_000, memory_limit_bytes=6_000_000_000)
    with pytest.raises(Refused, match="distill_steps 0"):
        ask()


def test_another_queue_costs_nothing_and_is_proposed_first() -> None:
    worker("w1", "cpu", memory_bytes=6_000_000_000)
    worker("w2", "gpu", memory_bytes=64_000_000_000, gpu_name="H100", gpu_memory_bytes=80 << 30, device="auto")
    with pytest.raises(Refused, match="It fits in the queue gpu"):
        ask(queue="cpu")


def test_a_gpu_too_small_is_refused_by_its_own_memory() -> None:
    worker("w2", "gpu,cpu", memory_bytes=64_000_000_000, gpu_name="A2", gpu_memory_bytes=8 << 30, device="cuda")
    with pytest.raises(Refused, match=r"of GPU memory, and the largest GPU of the queue gpu has 8\.59 GB"):
        ask(queue="gpu")


@pytest.mark.parametrize("values", [{}, {"memory_bytes": None}])
def test_a_worker_that_does_not_say_what_it_has_refuses_nothing(values: dict[str, Any]) -> None:
    worker(**values)
    assert ask().state == JobState.QUEUED


def test_with_no_worker_alive_on_the_queue_the_job_is_accepted() -> None:
    worker(memory_bytes=1_000)
    Worker.objects.update(seen_at=timezone.now() - timedelta(hours=1))
    assert ask().state == JobState.QUEUED


def test_a_worker_in_trouble_is_no_room() -> None:
    worker(memory_bytes=64_000_000_000, trouble="its disk is gone")
    worker("small", memory_bytes=6_000_000_000)
    with pytest.raises(Refused):
        ask()


def test_an_unknown_queue_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(Refused, match="no queue 'moon'; known: cpu"):
        ask(queue="moon")


def test_what_was_promised_is_kept_and_stands_beside_what_came() -> None:
    job = ask()
    kept = Estimate.from_json(job.estimate)
    assert kept.source_bytes == WEIGHTS
    assert job.estimate["seconds"] is None
    Step.objects.filter(job=job).update(
        state=StepState.DONE, data={"measured": {"seconds": 2.0, "peak_memory_bytes": 5e8}}
    )
    rows = {one.label: one for one in promises(job, list(job.steps.all()))}
    assert rows["Time of computing"].predicted == "not measured here yet"
    assert rows["Time of computing"].measured == "2.0 s"
    assert rows["Memory at its peak"].measured == "500 MB"
    assert rows["Bytes"].measured == "–"


def test_a_retry_is_judged_by_what_there_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    job = ask()
    Job.objects.filter(pk=job.pk).update(state=JobState.DEAD, finished_at=timezone.now())
    free(monkeypatch, 10)
    with pytest.raises(Refused, match="too little"):
        job_retry(actor=person(Role.ENGINEER), job=job)
    free(monkeypatch, 10**12)
    assert job_retry(actor=person(Role.ENGINEER), job=job).estimate == job.estimate


def test_an_evaluation_is_judged_by_the_two_models_it_loads() -> None:
    worker(memory_bytes=6_000_000_000)
    with pytest.raises(Refused, match="“target” needs"):
        evaluation_create(actor=person(Role.ENGINEER), variant=variant(), text_set=text())
    Worker.objects.update(memory_bytes=64_000_000_000)
    assert evaluation_create(actor=person(Role.ENGINEER), variant=variant(), text_set=text()).estimate


def test_an_import_without_room_is_refused(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x" * 5_000)
    settings.IMPORT_ROOTS = {"here": str(tmp_path)}
    free(monkeypatch, 9_000)
    asked: dict[str, Any] = {"actor": person(Role.ENGINEER), "root": "here", "folder": "model", "name": "new"}
    with pytest.raises(Refused, match=r"needs 10.0 kB of free room.*1.00 kB too little"):
        checkpoint_import(**asked)
    free(monkeypatch, 11_000)
    assert checkpoint_import(**asked).estimate["parts"][0] == {"name": "weights", "bytes": 5_000}


def plan() -> list[PlannedStep]:
    kinds = ("bitdelta.layer", "bitdelta.rest", "bitdelta.distill", "bitdelta.assemble")
    return [PlannedStep(name=kind, kind=kind, group="x") for kind in kinds]


def queues_of(job: Job) -> dict[str, str]:
    return dict(job.steps.values_list("kind", "queue"))


def test_steps_that_need_no_device_leave_the_gpu_alone() -> None:
    worker("w2", "gpu,cpu", gpu_name="H100", gpu_memory_bytes=80 << 30)
    job = ask(queue="gpu")
    steps_insert(job=job, planned=plan())
    assert queues_of(job) == {
        "bitdelta.plan": "cpu",
        "bitdelta.layer": "cpu",
        "bitdelta.rest": "cpu",
        "bitdelta.distill": "gpu",
        "bitdelta.assemble": "cpu",
    }


def test_where_there_is_no_queue_cpu_every_step_follows_its_job(settings: Settings) -> None:
    settings.WORKER_QUEUES = ["big"]
    job = ask()
    steps_insert(job=job, planned=plan())
    assert set(queues_of(job).values()) == {"big"}


def test_whoever_may_claim_a_step_is_woken(
    monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: Any
) -> None:
    worker("w2", "gpu,cpu")
    job = ask(queue="gpu")
    steps_insert(job=job, planned=plan())
    woken: list[str] = []
    monkeypatch.setattr("dashboard.services.wakes.wake", woken.append)
    with django_capture_on_commit_callbacks(execute=True):
        wake_waiting(job)
    assert woken == ["cpu", "gpu"]


def test_hours_come_from_finished_steps_alone_and_scale_with_the_work() -> None:
    assert measured_rates({"bitdelta.rest"}) == {}
    done = ask()
    for seconds in (1.0, 2.0, 3.0, 4.0, 5.0):
        Step.objects.create(
            job=done, index=50 + int(seconds), name="r", kind="bitdelta.rest", state=StepState.DONE,
            data={"measured": {"seconds": seconds}},
        )  # fmt: skip
    Step.objects.create(
        job=done, index=99, name="r", kind="bitdelta.rest", state=StepState.DONE, reused=True,
        data={"measured": {"seconds": 9999.0}},
    )  # fmt: skip
    rates = measured_rates({"bitdelta.rest", "bitdelta.distill"})
    assert set(rates) == {("bitdelta.rest", False)}
    estimate = Estimate.from_json(done.estimate)
    hours = time_needed(estimate, rates, on_gpu=False)
    assert hours.span is not None
    assert hours.span.middle == pytest.approx(3.0)
    assert (hours.span.low, hours.span.high) == (pytest.approx(1.4), pytest.approx(4.6))
    assert set(hours.unmeasured) == {"bitdelta.plan", "bitdelta.layer", "bitdelta.distill", "bitdelta.assemble"}


def test_a_gpus_rate_is_not_a_cpus() -> None:
    done = ask()
    params = {"config": {"batch_size": 4, "sequence_length": 128}, "first": 0, "last": 25}
    for at, gpu in enumerate(({}, {"gpu_peak_memory_bytes": 1e9})):
        Step.objects.create(
            job=done, index=50 + at, name="d", kind="bitdelta.distill", state=StepState.DONE, params=params,
            data={"measured": {"seconds": 100.0 if not gpu else 1.0} | gpu},
        )  # fmt: skip
    rates = measured_rates({"bitdelta.distill"})
    slow, fast = rates["bitdelta.distill", False], rates["bitdelta.distill", True]
    assert slow.middle == pytest.approx(100 * fast.middle)
    steps = [one for one in Estimate.from_json(done.estimate).steps if one.kind == "bitdelta.distill"]
    assert fast.times(steps[0].units).middle == pytest.approx(8.0)  # 200 steps, of which 25 took a second


def test_quantiles_lie_between_their_neighbours() -> None:
    assert quantile([5.0], 0.1) == 5.0
    assert quantile([1.0, 3.0], 0.5) == 2.0
    assert quantile([4.0, 1.0, 2.0, 3.0, 0.0], 0.9) == pytest.approx(3.6)


def test_a_preflight_asks_the_database_little(monkeypatch: pytest.MonkeyPatch) -> None:
    from compression_worker.methods.bitdelta.config import BitDeltaConfig
    from dashboard.selectors.preflight import compression_inputs, compression_preflight

    worker(memory_bytes=6_000_000_000)
    inputs = compression_inputs("bitdelta", variant(), text())
    with CaptureQueriesContext(connection) as queries:
        found = compression_preflight("bitdelta", BitDeltaConfig(batch_size=1024), inputs, "cpu")
    assert not found.fits
    assert len(queries) <= 2, "workers and rates, however many changes are tried"


def test_a_variant_of_unknown_shape_is_accepted_with_a_bound() -> None:
    job = ask(variant=pair()[1])
    assert job.estimate["exact"] is False
