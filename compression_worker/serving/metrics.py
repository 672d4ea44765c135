"""Counters for Prometheus, in its text format."""

from __future__ import annotations

from compression_worker.serving.variants import Variants


def exposition(variants: Variants) -> str:
    """``/metrics``: answers by environment, generation and outcome; the generation that answers; bytes in memory."""
    lines = ["# HELP deltaworks_answers_total Answers since the start.", "# TYPE deltaworks_answers_total counter"]
    for (environment, generation, outcome), count in sorted(variants.answers().items()):
        labels = _labels(environment=environment, generation=str(generation), outcome=outcome)
        lines.append(f"deltaworks_answers_total{labels} {count}")
    lines += ["# HELP deltaworks_generation The generation that answers.", "# TYPE deltaworks_generation gauge"]
    for handle in sorted(variants.handles(), key=lambda handle: handle.environment):
        lines.append(f"deltaworks_generation{_labels(environment=handle.environment)} {handle.generation}")
    lines += ["# HELP deltaworks_fallback 1 while full precision stands in.", "# TYPE deltaworks_fallback gauge"]
    for handle in sorted(variants.handles(), key=lambda handle: handle.environment):
        lines.append(f"deltaworks_fallback{_labels(environment=handle.environment)} {int(bool(handle.fell_back))}")
    lines += ["# HELP deltaworks_resident_bytes Memory of all models.", "# TYPE deltaworks_resident_bytes gauge"]
    lines.append(f"deltaworks_resident_bytes {variants.resident_bytes()}")
    return "\n".join(lines) + "\n"


def _labels(**values: str) -> str:
    escaped = {name: value.replace("\\", "\\\\").replace('"', '\\"') for name, value in values.items()}
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
