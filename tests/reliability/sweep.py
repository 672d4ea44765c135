"""The failpoint sweep: each place times each action, one fault a run, over the whole loop from an import to a rollback.

``python -m tests.reliability.sweep`` runs all; ``--short`` passes each place once, four places a run and a different
action at each: ``--turn 1`` to ``--turn 4`` shift the actions, and all five turns cover what the whole sweep does.
``--nth N`` fires at the N-th passing, ``--nth all`` goes on for each place until it is no longer passed so often. Ends
with the count of runs and exits 1 when something was lost, doubled, wrong, or a place was never passed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression_worker.faults import ACTIONS, POINTS
from deploy import processes
from tests.reliability.settings import import_everything, prepare_environment

RUN_SECONDS = 90.0
LOOK_SECONDS = 0.03
TOGETHER = 4
"""Faults in one run of the short form, each of another action: what kills a worker twice is no poison yet."""


@dataclass
class Report:
    """What the runs came to."""

    expected: dict[str, str]
    runs: int = 0
    fired: int = 0
    worst_redone: int = 0
    longest: float = 0.0
    problems: list[str] = field(default_factory=list)
    unfired: list[str] = field(default_factory=list)

    def add(self, fault: str, result: dict[str, Any]) -> None:
        self.runs += 1
        self.longest = max(self.longest, result["seconds"])
        self.unfired += result["unfired"]
        fired = fault.count(",") + 1 - len(result["unfired"])
        if not fired:
            return
        self.fired += fired
        self.worst_redone = max(self.worst_redone, -(-result["redone"] // fired))
        problems = list(result["problems"])
        if result["redone"] > fired:
            problems.append(f"{result['redone']} steps were computed for nothing")
        for name, digest in self.expected.items():
            if result["published"].get(name, "") != digest:
                problems.append(f"{name} is {result['published'].get(name, 'missing')}, not {digest}")
        self.problems += [f"{fault}: {problem}" for problem in problems]


def direct(world: Any, database: str, fault: str, answer: Path, keep: bool) -> None:
    """One run in a process of its own: keep its processes alive until the loop was gone through, then look at it."""
    from tests.reliability import invariants, scenario
    from tests.reliability.forking import Forked
    from tests.reliability.world import Run

    run, began = Run(world, database, fault), time.monotonic()

    def person() -> None:
        run.enter()
        scenario.play()

    for name in ("worker-1", "worker-2"):
        run.keep(name, lambda name=name: run.work(name))  # type: ignore[misc]
    run.keep("server", run.serve)
    run.keep("person", person)
    actor = run.living[-1]
    while not actor.finished and time.monotonic() - began < RUN_SECONDS:
        run.look()
        time.sleep(LOOK_SECONDS)
        if _gave_up(actor.log):
            break
    for one in run.living:
        one.end()

    def look() -> None:
        run.fault = ""
        run.enter()
        invariants.write(answer, invariants.observe(run.store))

    code = Forked(look, log=run.folder / "checker.log").wait(60)
    result = json.loads(answer.read_text()) if code == 0 else {"problems": ["unreadable"], "published": {}, "redone": 0}
    if not actor.finished:
        result["problems"].insert(0, f"not gone through: {processes.last_lines(actor.log, 2)}")
    result |= {"unfired": run.unfired(), "seconds": time.monotonic() - began}
    answer.write_text(json.dumps(result))
    run.end(keep_files=keep and bool(result["problems"]))


def _gave_up(log: Path) -> bool:
    return log.exists() and b"scenario.Lost" in log.read_bytes()[-4000:]


def run_all(world: Any, faults: Iterator[str], at_once: int, keep: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs for ``faults``, several at a time; yields each with its result as it ends."""
    from tests.reliability.forking import Forked

    waiting, running, again = list(faults), [], set[str]()
    while waiting or running:
        while waiting and len(running) < at_once:
            fault = waiting.pop(0)
            run = world.fresh(fault)
            answer = world.folder / f"{run.database}.json"
            work = lambda run=run, fault=fault, answer=answer: direct(world, run.database, fault, answer, keep)  # noqa: E731
            running.append((fault, answer, Forked(work, log=world.folder / f"{run.database}.director.log")))
        for one in [one for one in running if one[2].poll() is not None]:
            running.remove(one)
            result = json.loads(one[1].read_text()) if one[1].exists() else _broken(one[0], world.folder)
            if result["redone"] > one[0].count(",") + 1 and not result["problems"] and one[0] not in again:
                # On a machine that others use, too, a lease of two seconds may run out by itself: once more.
                again.add(one[0])
                waiting.append(one[0])
                continue
            yield one[0], result
        time.sleep(LOOK_SECONDS)


def _broken(fault: str, folder: Path) -> dict[str, Any]:
    return {
        "problems": [f"the run of {fault} broke, see {folder}"],
        "published": {},
        "redone": 0,
        "unfired": [],
        "seconds": 0.0,
    }


def plan(points: list[str], actions: list[str], nth: int) -> list[str]:
    """The faults to inject, one a run: each action at each place."""
    return [f"{point}:{nth}:{action}" for point in points for action in actions]


def short_plan(points: list[str], actions: list[str], nth: int, turn: int) -> list[str]:
    """Each place once, the actions in turn; places that stand far apart share a run."""
    runs = -(-len(points) // TOGETHER)
    return [
        ",".join(
            f"{point}:{nth}:{actions[(run + place + turn) % len(actions)]}"
            for place, point in enumerate(points[run::runs])
        )
        for run in range(runs)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="", help="places, comma separated; a prefix counts (default: all)")
    parser.add_argument("--actions", default=",".join(ACTIONS))
    parser.add_argument("--nth", default="1", help="a number, or all: 1, 2, 3 … until a place is not passed so often")
    parser.add_argument("--short", action="store_true", help="each place once, four a run")
    parser.add_argument("--turn", type=int, default=0, help="shifts the actions of the short form: 0 to 4")
    parser.add_argument("--at-once", type=int, default=max(2, os.cpu_count() or 2))
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs with problems")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="deltaworks-sweep-"))
    port = processes.free_port()
    prepare_environment(folder, port)
    import_everything()
    from tests.reliability.world import World

    wanted = [prefix for prefix in args.points.split(",") if prefix]
    points = [point for point in POINTS if not wanted or point.startswith(tuple(wanted))]
    world = World.start(folder, port)
    clean = True
    try:
        began = time.monotonic()
        ((_, undisturbed),) = run_all(world, iter([""]), 1, args.keep)
        if undisturbed["problems"]:
            sys.stdout.write("the undisturbed run has problems:\n  " + "\n  ".join(undisturbed["problems"]) + "\n")
            clean = False
            return 1
        report = Report(undisturbed["published"])
        sys.stdout.write(f"undisturbed: {undisturbed['seconds']:.1f} s, {len(report.expected)} published digests\n")
        nth, last = (1, 10_000) if args.nth == "all" else (int(args.nth), int(args.nth))
        actions = args.actions.split(",")
        while nth <= last and points:
            missed: set[str] = set()
            faults = short_plan(points, actions, nth, args.turn) if args.short else plan(points, actions, nth)
            for fault, result in run_all(world, iter(faults), args.at_once, args.keep):
                before = len(report.problems)
                report.add(fault, result)
                missed |= {one.partition(":")[0] for one in result["unfired"]}
                told = "; ".join(report.problems[before:])
                told = told or (f"not passed: {', '.join(result['unfired'])}" if result["unfired"] else "ok")
                sys.stdout.write(f"{report.runs:4d} {fault:34s} {result['seconds']:5.1f} s  {told}\n")
                sys.stdout.flush()
            if nth > 1 or args.nth == "all":
                # Past the first round a place that is not passed so often is done with.
                report.unfired = [fault for fault in report.unfired if fault.split(":")[1] == "1"]
                points = [point for point in points if point not in missed]
            nth += 1
        clean = not report.problems and not report.unfired
        sys.stdout.write(
            f"sweep: {report.runs} runs, {report.fired} fired, {len(report.unfired)} places not passed "
            f"{report.unfired}, {len(report.problems)} problems, "
            f"at most {report.worst_redone} steps redone a fault, "
            f"{time.monotonic() - began:.0f} s\n"
        )
        return 0 if clean else 1
    finally:
        if clean or not args.keep:
            world.stop()
        else:
            world.postgres.stop()
            sys.stdout.write(f"kept: {folder}\n")


if __name__ == "__main__":
    sys.exit(main())
