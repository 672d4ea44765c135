"""What a person sees while a command runs: a bar and warnings, on standard error. Results go elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compression_worker.contracts import Json


class Bars:
    """Shows the messages of a run. Off a terminal, or when ``quiet``, only warnings are written, a line each."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._progress: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._step = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Bars:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, event: Json) -> None:
        if event["type"] == "log":
            if event["level"] != "info" or self._progress:
                self._console.print(f"{event['level']}: {event['text']}")
        elif self._progress and event["type"] == "step":
            name = f"{event['name']} ({event['index'] + 1} of {event['total']})"
            self._progress.reset(self._step, total=None, description=name)
        elif self._progress and event["type"] == "progress":
            self._progress.update(self._step, completed=event["done"], total=event["total"])


def summary_lines(summary: Json) -> list[str]:
    """What ``inspect`` prints for people."""
    width = max(len(part["name"]) for part in summary["parts"])
    total = summary["artifact_bytes"]
    parts = [
        f"  {part['name']:<{width}}  {part['bytes']:>14,}  {100 * part['bytes'] / total:5.1f} %"
        for part in summary["parts"]
    ]
    settings = ", ".join(f"{name}={value}" for name, value in sorted(summary["config"].items()))
    return [
        f"{summary['method']} ({settings})" if settings else summary["method"],
        f"{summary['source_bytes']:,} bytes -> {total:,} bytes",
        f"true ratio {summary['true_ratio']:.2f}, nominal ratio {summary['nominal_ratio']:.2f}, "
        f"{summary['bits_per_weight']:.3f} bits per weight",
        *parts,
        f"base     {summary['base_fingerprint']}",
        f"variant  {summary['variant_fingerprint']}",
    ]
