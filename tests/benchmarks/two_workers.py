"""One job of 24 layers by one worker and by two: wall time, CPU time, and the artifact's bytes.

    python -m tests.benchmarks.two_workers [--rounds 3] [--hidden 2048] [--layers 24]

Makes a synthetic pair (hundreds of MB a side), then runs the same BitDelta job with real worker processes: each is the
product's ``Execution`` with its own warm child of one thread. Rounds of one and of two workers alternate on one machine;
each has a fresh store and database rows of its own, and all artifacts have to be byte-equal. Medians go to
``results.csv``. Exits 1 when two workers take more than 0.6 of the time of one.

Children are warm when the clock starts, as they are in a stack that runs. The clock is the database's: from the
job's row to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
BOUND = 0.6
POLL_SECONDS = 0.02
START_SECONDS = 120
JOB_SECONDS = 1_800


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How one run went. ``shares``: steps by worker. ``cpu``: seconds of each worker with its child."""

    seconds: float
    artifact: str
    shares: Mapping[str, int]
    cpu: tuple[float, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--work", nargs=2, metavar=("NAME", "READY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], Path(args.work[1]))
    with tempfile.TemporaryDirectory(prefix="deltaworks-two-workers-") as scratch, installation(Path(scratch)):
        return measure(Path(scratch), args)


@contextlib.contextmanager
def installation(scratch: Path) -> Iterator[None]:
    """A migrated embedded Postgres, and the settings of this process and its workers in the environment."""
    from deploy.postgres import EmbeddedPostgres

    postgres = EmbeddedPostgres(scratch / "postgres", password="of a benchmark", durable=True)
    postgres.start()
    postgres.ensure(database="deltaworks", owner_password="owner", server_password="server")
    os.environ |= {
        "SECRET_KEY": "a key for a benchmark: it signs nothing",
        "DATABASE_URL": postgres.url("deltaworks", "deltaworks", "owner"),
        "CELERY_BROKER_URL": "",
        "ARTIFACT_ROOT": str(scratch / "store"),
        "PLAIN_STATIC": "1",
        "STEP_DEVICE": "cpu",
        "DJANGO_SETTINGS_MODULE": "dashboard.settings",
    }
    try:
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        yield
    finally:
        postgres.stop()


def measure(scratch: Path, args: argparse.Namespace) -> int:
    from tests.benchmarks.bench_bitdelta import machine, make_pair

    sizes = {"hidden_size": args.hidden, "intermediate_size": 2 * args.hidden, "num_hidden_layers": args.layers}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": args.hidden // 16, "vocab_size": 288}
    make_pair(scratch / "models", sizes)
    size = sum((scratch / "models" / side / "model.safetensors").stat().st_size for side in ("base", "variant"))
    print(f"{machine()}: {args.layers} layers, {size / 1e6:.0f} MB of base and variant", flush=True)
    found: dict[int, list[Timing]] = {1: [], 2: []}
    for at in range(2 * args.rounds):
        workers = 1 + at % 2
        store = scratch / f"store-{at}"
        timing = run(scratch / "models", store, workers)
        found[workers].append(timing)
        print(
            f"{workers} worker(s): {timing.seconds:.2f} s, CPU {' + '.join(f'{one:.2f}' for one in timing.cpu)} s, "
            f"steps {dict(timing.shares)}, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    return judge(found)


def judge(found: Mapping[int, list[Timing]]) -> int:
    one, two = (statistics.median(timing.seconds for timing in found[workers]) for workers in (1, 2))
    cpu = {workers: statistics.median(max(timing.cpu) for timing in found[workers]) for workers in (1, 2)}
    equal = len({timing.artifact for timings in found.values() for timing in timings}) == 1
    note(f"one worker, {len(found[1])} runs", one, "s, median")
    note(f"two workers, {len(found[2])} runs", two, "s, median")
    note("CPU of the busiest, two / one", cpu[2] / cpu[1], "ratio")
    kept = note("two workers / one", two / one, f"ratio; artifacts byte-equal: {'yes' if equal else 'NO'}", BOUND)
    return 0 if kept and equal else 1


def note(figure: str, value: float, unit: str, bound: float | None = None) -> bool:
    from tests.benchmarks import bench_bitdelta

    return bench_bitdelta.record(figure, value, unit, bound, benchmark="two_workers")


def run(models: Path, store: Path, workers: int, environment: Mapping[str, str] | None = None) -> Timing:
    """One job by ``workers`` processes against the database and the settings of this one."""
    from django.conf import settings

    from dashboard.lifecycle import JobState
    from dashboard.models import Attempt

    settings.ARTIFACT_ROOT = str(store)
    variant = taken_in(models, store)
    env = os.environ | {"ARTIFACT_ROOT": str(store), "OMP_NUM_THREADS": "1", **(environment or {})}
    with started(workers, store.parent, env) as processes:
        before = [cpu_seconds(process.pid) for process in processes]
        job = ordered(variant)
        give_up = time.monotonic() + JOB_SECONDS
        while not job.is_terminal:
            assert time.monotonic() < give_up, f"{job} is {job.state}"
            assert all(process.poll() is None for process in processes), "a worker ended"
            time.sleep(0.05)
            job.refresh_from_db()
        cpu = tuple(cpu_seconds(process.pid) - had for process, had in zip(processes, before, strict=True))
    assert job.state == JobState.SUCCEEDED, job.error
    names = list(Attempt.objects.filter(step__job=job).values_list("worker", flat=True))
    shares = {name: names.count(name) for name in sorted(set(names))}
    seconds = (job.finished_at - job.created_at).total_seconds()
    return Timing(seconds=seconds, artifact=job.artifact.digest, shares=shares, cpu=cpu)


def taken_in(models: Path, store: Path) -> Any:
    """Rows for base and variant, their weights linked into a fresh store; returns the variant."""
    from compression_worker.checkpoints import attach_folder, read_manifest
    from compression_worker.store import Store
    from dashboard.models import Checkpoint

    base = None
    for name in ("base", "variant"):
        digest = attach_folder(Store(store), models / name)
        manifest = {key: value for key, value in read_manifest(Store(store), digest).items() if key != "tensors"}
        fields = {key: manifest[key] for key in ("fingerprint", "size_bytes", "parameters", "dtype", "architecture")}
        base, _ = Checkpoint.objects.get_or_create(
            name=name, defaults={"base": base, "digest": digest, "manifest": manifest, **fields}
        )
    return base


def ordered(variant: Any) -> Any:
    """The job, written down as a page does it; it reuses nothing of the run before, whose store was another one."""
    from dashboard.lifecycle import Role
    from dashboard.models import Step, User
    from dashboard.services.jobs import compression_create

    Step.objects.filter(state="done").update(key="")
    engineer, _ = User.objects.get_or_create(username="engineer", defaults={"role": Role.ENGINEER})
    return compression_create(actor=engineer, method="bitdelta", variant=variant, config={"distill_steps": 0})


@contextlib.contextmanager
def started(workers: int, folder: Path, env: Mapping[str, str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """That many worker processes, each with a warm child; they are gone when the block ends."""
    ready = [folder / f"ready-{time.monotonic_ns()}-{at}" for at in range(workers)]
    command = [sys.executable, "-m", "tests.benchmarks.two_workers", "--work"]
    log = (folder / "workers.log").open("ab")
    processes = [
        subprocess.Popen([*command, f"worker-{at + 1}", str(file)], env=dict(env), cwd=PROJECT, stdout=log, stderr=log)
        for at, file in enumerate(ready)
    ]
    try:
        give_up = time.monotonic() + START_SECONDS
        while not all(file.exists() for file in ready):
            assert time.monotonic() < give_up, "the workers did not start"
            assert all(process.poll() is None for process in processes), "a worker ended before it was ready"
            time.sleep(0.05)
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(20)
        log.close()


def work(name: str, ready: Path) -> int:
    """A worker process: warm the child, then take what there is until a signal ends it."""
    import signal

    import django

    django.setup()
    from django.conf import settings

    from compression_worker.contracts import StepSpec
    from compression_worker.launcher import Launcher, child_command
    from dashboard.execution import Execution
    from dashboard.models import Checkpoint

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    launcher = Launcher(child_command(Path(settings.ARTIFACT_ROOT), {}, "cpu"))
    execution = Execution(name=name, queues=["cpu"], launcher=launcher)
    try:
        # A plan without a row: by its end the child has loaded all that a job needs, as in a stack that runs.
        pair = {name: Checkpoint.objects.get(name=name).digest for name in ("base", "variant")}
        warmed = launcher.run(StepSpec(kind="bitdelta.plan", params={"config": {"distill_steps": 0}}, inputs=pair))
        assert (warmed.kind, bool(launcher.pid)) == ("done", True), warmed
        ready.touch()
        while True:
            if not execution.run_all():
                time.sleep(POLL_SECONDS)
    finally:
        execution.close()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of what it started."""
    total = 0.0
    for process in (pid, *children(pid)):
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):  # it ended while it was looked at
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found + [below for child in found for below in children(child)]


if __name__ == "__main__":
    sys.exit(main())
