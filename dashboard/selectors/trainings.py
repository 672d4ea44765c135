"""How a training goes: of an artifact as its figures say, of a running job as the parts say that are done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dashboard.lifecycle import StepState
from dashboard.models import Step
from dashboard.pictures import Training


def training(figures: Mapping[str, Any]) -> Training:
    """A training that belongs to the method; empty without one."""
    told = figures.get("training") or {}
    replaces = any(p < 1 for p in told.get("probabilities") or [])
    return _told(told, shares=bool(figures.get("sharing")), replaces=replaces)


def training_so_far(steps: Sequence[Step]) -> Training:
    """As the latest part that is done left it: what a part tells holds what the parts before it told."""
    parts = [step for step in steps if _tells(step, "curve", list) and _tells(step, "losses", list)]
    last = max(parts, key=lambda step: step.index, default=None)
    if last is None:
        return Training()
    replaces = (last.params.get("config") or {}).get("replacement", "none") != "none"
    total = int(last.params.get("total") or 0)
    return _told(last.data, total=total, shares=last.kind == "deltallm.train", replaces=replaces)


def distillation_losses(figures: Mapping[str, Any]) -> list[float]:
    """The loss before each training step of the distillation; empty without one."""
    told = figures.get("distillation") or (figures.get("tuning") or {}).get("end_to_end") or {}
    return _losses(told)


def losses_so_far(steps: Sequence[Step]) -> list[float]:
    """The distillation's loss curve, from the latest finished part of it."""
    return max((_losses(step.data["curve"]) for step in steps if _tells(step, "curve", dict)), key=len, default=[])


def _tells(step: Step, name: str, kind: type) -> bool:
    """A distillation's ``curve`` holds its losses; that of another training is a list of points beside them."""
    return step.state == StepState.DONE and isinstance(step.data.get(name), kind)


def _told(data: Mapping[str, Any], *, total: int = 0, shares: bool, replaces: bool) -> Training:
    curve = [point for point in data.get("curve") or [] if point.get("kl") is not None]
    return Training(_losses(data), _begun(curve) if shares else curve, total, replaces)


def _begun(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without the packed base in which nothing is shared yet: training begins behind it."""
    return [point for point in curve if point.get("phase") != "base"]


def _losses(data: Mapping[str, Any]) -> list[float]:
    return [math.nan if loss is None else float(loss) for loss in data.get("losses") or []]
