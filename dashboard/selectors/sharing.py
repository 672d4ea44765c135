"""Blocks that use another's weights, as pages show them: while they are chosen, and of the artifact that came of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from dashboard.formats import byte_words, percent_words, range_words, significant, whole
from dashboard.lifecycle import StepState
from dashboard.models import Artifact, Step
from dashboard.pictures import Candidate, Rank, Round, Sharing
from dashboard.pictures.matrices import Place, place, stands_on

LEFT_OUT = "left out"
"""How a matrix is stored of which nothing is."""


def sharing_of(artifact: Artifact) -> Sharing | None:
    """None where the artifact's method shares nothing."""
    told = artifact.figures.get("sharing")
    if not told:
        return None
    blocks, left_out = told["blocks"], frozenset(told.get("left_out") or ())
    return Sharing(
        blocks=blocks,
        groups=_sharing(_followers(told["groups"]), left_out),
        left_out=left_out,
        protected=_protected(blocks, artifact.config, by_hand=bool(str(artifact.config.get("groups") or "").strip())),
        fewer=(told.get("parameters") or {}).get("reduction"),
    )


def sharing_so_far(steps: Sequence[Step]) -> Sharing | None:
    """As the latest finished round of choosing left it."""
    step = _latest_round(steps)
    if step is None:
        return None
    params = step.params
    groups = {int(follower): anchor for follower, anchor in step.data["groups"].items()}
    left_out = frozenset(step.data.get("left_out") or ())
    return Sharing(
        blocks=params["blocks"],
        groups=_sharing(groups, left_out),
        left_out=left_out,
        protected=_protected(params["blocks"], params["protect"], by_hand=bool(params["by_hand"])),
        still=0 if params["final"] else params["still"] - params["count"],
    )


def rounds_of(artifact: Artifact) -> list[Round]:
    return _rounds((artifact.figures.get("sharing") or {}).get("rounds") or [])


def rounds_so_far(steps: Sequence[Step]) -> list[Round]:
    step = _latest_round(steps)
    return _rounds(step.data["rounds"]) if step else []


def ranks_of(artifact: Artifact) -> list[Rank]:
    """What each measured rank would leave and cost before training."""
    told = artifact.figures.get("sharing") or {}
    before = (told.get("parameters") or {}).get("before")
    return [
        Rank(one["rank"], one["parameters"], before, one["kl"], one.get("lowest"))
        for one in told.get("ranks") or []
        if before
    ]


def savings(artifact: Artifact) -> list[str]:
    """What sharing saves, and what it does not, in a sentence each."""
    told = artifact.figures.get("sharing") or {}
    found = []
    if parameters := told.get("parameters"):
        found.append(_saved(parameters, _bytes_saved(artifact.figures)))
    if operations := told.get("operations"):
        found.append(_time(operations))
    if scales := told.get("scales"):
        found.append(_scaled(list(scales.values())))
    return found


def sharing_words(artifact: Artifact) -> str:
    """An artifact in brief, beside others of its kind: ``6 followers, rank 61, 2 blocks left out, 4-bit anchors``."""
    told = artifact.figures.get("sharing")
    if not told:
        return ""
    gone = len(told.get("left_out") or ())
    words = []
    if count := len(_followers(told["groups"])) - gone:
        words.append(ngettext("%(count)s follower", "%(count)s followers", count) % {"count": whole(count)})
        words.append(_rank_words(told))
    if gone:
        words.append(ngettext("%(count)s block left out", "%(count)s blocks left out", gone) % {"count": whole(gone)})
    if told.get("scales"):
        words.append(_("scaled anchors"))
    if artifact.config.get("base_method", "none") != "none":
        words.append(_("%(bits)s-bit anchors") % {"bits": artifact.config["num_bits"]})
    return ", ".join(words)


def _rank_words(told: Mapping[str, Any]) -> str:
    """``rank 64``, or from the lowest to the highest where groups have ranks of their own."""
    if not told["rank"]:
        return _("signs")
    ranks = [one for one in (told.get("group_ranks") or {"": told["rank"]}).values() if one]
    return _("rank %(rank)s") % {"rank": range_words(min(ranks), max(ranks))}


def _latest_round(steps: Iterable[Step]) -> Step | None:
    done = [step for step in steps if step.kind == "deltallm.choose" and step.state == StepState.DONE]
    return max(done, key=lambda step: step.index, default=None)


def _rounds(told: Iterable[Mapping[str, Any]]) -> list[Round]:
    return [
        Round(
            found={
                int(block): Candidate(anchor, math.nan if kl is None else float(kl))
                for block, (anchor, kl) in one["kl"].items()
            },
            chosen=frozenset(one["chosen"]),
        )
        for one in told
    ]


def _followers(groups: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """Follower -> anchor, out of anchor -> followers."""
    return {follower: int(anchor) for anchor, followers in groups.items() for follower in followers}


def _sharing(groups: Mapping[int, int], left_out: Collection[int]) -> dict[int, int]:
    """Follower -> anchor of those that use one."""
    return {follower: anchor for follower, anchor in groups.items() if follower not in left_out}


def _protected(blocks: int, config: Mapping[str, Any], *, by_hand: bool) -> frozenset[int]:
    """Those that may not be chosen as followers; groups that are given by hand protect nothing."""
    if by_hand:
        return frozenset()
    first, last = int(config.get("protect_first") or 0), int(config.get("protect_last") or 0)
    return frozenset(range(min(first, blocks))) | frozenset(range(max(0, blocks - last), blocks))


def _bytes_saved(figures: Mapping[str, Any]) -> int | None:
    """What the followers would weigh if they were stored as their anchors are, less what their differences weigh."""
    sizes: dict[Place, int] = {}
    shared: list[Place] = []
    for line in figures.get("matrices") or []:
        where = place(str(line["name"]))
        if where is None or not isinstance(line.get("bytes"), int):
            continue
        sizes[where] = line["bytes"]
        coding = str(line.get("coding") or "")
        if stands_on(coding) or coding == LEFT_OUT:
            shared.append(where)
    groups = _followers(figures["sharing"]["groups"])
    anchors = [Place(groups[one.block], one.path, one.expert) if one.block in groups else None for one in shared]
    if not shared or any(anchor not in sizes for anchor in anchors):
        return None
    return sum(sizes[anchor] - sizes[one] for one, anchor in zip(shared, anchors, strict=True) if anchor)


def _saved(parameters: Mapping[str, Any], size: int | None) -> str:
    before, after = parameters["before"], parameters["after"]
    words = {
        "before": whole(before),
        "after": whole(after),
        "share": percent_words(parameters["reduction"]),
        "bytes": byte_words(size),
    }
    if size is None:
        return _("Sharing saves parameters: %(after)s are left of %(before)s (%(share)s fewer).") % words
    return (
        _(
            "Sharing saves parameters, bytes and memory: %(after)s parameters are left of %(before)s (%(share)s "
            "fewer), which is %(bytes)s less in the store, and each anchor's weights lie in memory once."
        )
        % words
    )


def _time(operations: Mapping[str, Any]) -> str:
    before, after = operations["before"], operations["after"]
    words = {"before": whole(before), "after": whole(after), "share": percent_words(abs(after / before - 1))}
    if after < before:
        return (
            _(
                "Blocks that are left out save arithmetic and time too: products with weights take %(after)s "
                "operations for each token, where they took %(before)s (%(share)s fewer)."
            )
            % words
        )
    return (
        _(
            "It saves neither arithmetic nor time: products with weights take %(after)s operations for each token, "
            "where they took %(before)s (%(share)s more)."
        )
        % words
    )


def _scaled(scales: Sequence[float]) -> str:
    sizes = sorted(abs(scale) for scale in scales)
    return _(
        "Anchors are scaled: half of the shared matrices use their anchor's weight at %(middle)s or less, the most at "
        "%(largest)s. Near 0 an anchor gives its follower almost nothing, and the difference is all that is left."
    ) % {"middle": significant(statistics.median(sizes), 2), "largest": significant(sizes[-1], 2)}
