"""Which blocks follow: each candidate is put in alone, and the divergence from the whole model on text decides.

    KL(l) = KL(teacher || model in which the blocks chosen so far and block l share),    rounds of greedy choice

Followers have their real rank and start while they are measured. That layers are chosen so is our reading.

What a candidate changes lies behind it, so of each window the blocks before it run once for all candidates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from compression_worker.architecture import blocks_of, build
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput
from compression_worker.making.blobs import read_blob, write_pieces
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import six_digits
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.differences import Pieces
from compression_worker.methods.deltallm.factors import Starts
from compression_worker.methods.deltallm.groups import Depth, cheapest, picked
from compression_worker.methods.deltallm.layout import keys
from compression_worker.methods.deltallm.matrices import shareable
from compression_worker.methods.deltallm.sources import Sources, base_input
from compression_worker.methods.deltallm.student import Student
from compression_worker.methods.deltallm.sweep import is_swept, rank_sweep
from compression_worker.quantization.calibration import Hessians
from compression_worker.quantization.divergence import divergence
from compression_worker.quantization.learning import HeldOut
from compression_worker.quantization.teacher import TRAINED, read_logits, read_windows
from compression_worker.tensors import whole


def choose_step(context: StepContext) -> StepOutput:
    """One round: measure every candidate, choose the best ones. The last round measures what all of them cost.

    The output's ``groups`` maps follower to anchor, ``left_out`` names those of rank 0, ``rounds`` holds every
    candidate's divergence, and a blob for each pair holds its factors. Groups that are given by hand are put in as they
    are.
    """
    params = context.spec.params
    with Sources.of(context) as sources:
        work = _Round(context, DeltaLLMConfig(**params["config"]), sources)
        for follower, anchor in params["by_hand"].items():
            work.add(int(follower), anchor)
        if not params["by_hand"]:
            depth = Depth(blocks=params["blocks"], alike=tuple(params["alike"]), **params["protect"])
            if params.get("leaves_out"):
                work.leave_out(depth, params["count"])
            else:
                work.choose(depth, params["count"], params["still"])
    data: Json = {
        "groups": {str(one): anchor for one, anchor in sorted(work.groups.items())},
        "left_out": sorted(work.left_out),
        "rounds": work.rounds,
    }
    if params["final"]:
        data |= work.result()
        kl = data["curve"][-1]["kl"]
        words = f" and {len(work.left_out)} are left out" if work.left_out else ""
        context.log(
            f"{len(work.groups) - len(work.left_out)} blocks share{words}: held-out KL {kl:.4g} before training", "info"
        )
    return StepOutput(blobs=work.blobs, data=data)


class _Round:
    """The model with the followers chosen so far, and what was measured."""

    def __init__(self, context: StepContext, config: DeltaLLMConfig, sources: Sources) -> None:
        before = context.input("previous") if "previous" in context.spec.inputs else None
        checkpoint = opened(context, "variant")
        self.groups: dict[int, int] = {}
        self.left_out: set[int] = set(before.data.get("left_out", [])) if before else set()
        self.rounds: list[Json] = list(before.data["rounds"]) if before else []
        self.blobs: dict[str, str] = dict(before.blobs) if before else {}
        self._context = context
        layers = shareable(checkpoint.manifest["config"], architecture_of(checkpoint), config.kinds)
        self._base = base_input(context)
        self._config = config
        self._layers = layers
        self._student = Student.of(checkpoint, self._base, layers, context.device)
        self._blocks = [self._student.model.get_submodule(path) for path, _ in _paths(checkpoint.manifest["config"])]
        calibrated = any(name.startswith("hessians") for name in context.spec.inputs)
        hessians = Hessians(context, checkpoint.fingerprint) if calibrated else None
        rank, own = context.spec.params["rank"], context.spec.params.get("group_ranks", {})
        ranks = {int(follower): one for follower, one in own.items()}
        self.left_out |= {follower for follower, one in ranks.items() if not one}
        self._starts = Starts(config, rank, ranks, sources, hessians, seed=context.spec.seed, device=context.device)
        for follower, anchor in (before.data["groups"] if before else {}).items():
            self.add(int(follower), anchor)

    def add(self, follower: int, anchor: int) -> None:
        """Have ``follower`` share from here on."""
        self._put(follower, anchor)
        self.groups[follower] = anchor

    def leave_out(self, depth: Depth, count: int) -> None:
        """``count`` blocks more do nothing. What was measured of the others is not kept: they may share later."""
        pairs = depth.idle(self.groups)
        for block, anchor in pairs.items():
            self._student.put(block, anchor, self._starts.of(self._layers, block, anchor))
        found = self._measured(list(pairs))
        chosen = cheapest(found, count)
        self._note(dict.fromkeys(pairs), found, chosen)
        for block in chosen:
            self.left_out.add(block)
            self.add(block, pairs[block])

    def choose(self, depth: Depth, count: int, still: int) -> None:
        """``count`` more followers of ``still`` that are wanted; measures again where choices exclude each other."""
        while count:
            pairs = depth.allowed(self.groups, still)
            for done, (block, anchor) in enumerate(pairs.items(), start=1):
                self._put(block, anchor)
                self._context.progress(done, len(pairs), "candidates")
            found = self._measured(list(pairs))
            chosen = picked(found, depth, self.groups, count, still)
            self._note(pairs, found, chosen)
            for block in chosen:
                self.groups[block] = pairs[block]
            count, still = count - len(chosen), still - len(chosen)

    def result(self) -> Json:
        """``curve``: what the chosen followers cost on held-out text, behind what the packed base alone costs.

        ``ranks``: what they would cost with less of their differences, where that can be told.
        """
        held, curve = HeldOut(self._context), []
        if self._base is not None:
            self._student.share([])
            curve.append(held.measured(self._student, 0, "base"))
        self._student.share(self.groups)
        curve.append(held.measured(self._student, 0, "start"))
        if not is_swept(self._config) or self.left_out == self.groups.keys():
            return {"curve": curve}
        rank = self._context.spec.params["rank"]
        points = rank_sweep(self._student, self.groups, self._factors, held, curve[-1], rank)
        return {"curve": curve, "ranks": points}

    def _note(self, pairs: Mapping[int, int | None], found: Mapping[int, float], chosen: list[int]) -> None:
        """Keep what a round measured, beside each candidate's anchor; None where it would be left out."""
        line = {str(block): [pairs[block], six_digits(kl)] for block, kl in found.items()}
        self.rounds.append({"kl": line, "chosen": chosen})

    def _factors(self, follower: int, anchor: int) -> dict[str, Pieces]:
        return read_factors(self._context, self.blobs[pair_file(follower, anchor)], self._config.share_form)

    def _put(self, follower: int, anchor: int) -> None:
        name = pair_file(follower, anchor)
        if name not in self.blobs:
            self.blobs[name] = _written(
                self._context, self._starts.of(self._layers, follower, anchor), self._config.share_form
            )
        self._student.put(follower, anchor, self._factors(follower, anchor))

    def _measured(self, candidates: list[int]) -> dict[int, float]:
        """The mean divergence over windows of each candidate beside those chosen so far."""
        windows, teacher = read_windows(self._context, TRAINED), read_logits(self._context, "teacher")
        count = len(teacher.tokens)
        sums = dict.fromkeys(candidates, 0.0)
        for at in range(count):
            window = windows[at : at + 1].to(self._student.device)
            known = teacher.at(slice(at, at + 1), self._student.device)
            self._student.share(self.groups)
            outputs = self._outputs(window)
            for block in candidates:
                self._student.share({*self.groups, block})
                with self._behind(block, outputs), torch.no_grad():
                    logits = self._student.model(window, use_cache=False).logits
                sums[block] += float(divergence(logits, known, window).kl)
            self._context.progress(at + 1, count, "windows")
        found = {block: value / count for block, value in sums.items()}
        if any(value != value for value in found.values()):
            raise CompressionError("not_finite", "the model's answers are not finite: its weights are damaged")
        return found

    def _outputs(self, window: torch.Tensor) -> list[Any]:
        """What each block gives, as the model is now."""
        found: list[Any] = []
        handles = [block.register_forward_hook(lambda module, args, out: found.append(out)) for block in self._blocks]
        try:
            with torch.no_grad():
                self._student.model(window, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @contextlib.contextmanager
    def _behind(self, block: int, outputs: list[Any]) -> Iterator[None]:
        """Inside, the blocks before ``block`` give what they gave."""
        for module, out in zip(self._blocks[:block], outputs, strict=False):
            module.forward = lambda *args, _out=out, **kwargs: _out
        try:
            yield
        finally:
            for module in self._blocks[:block]:
                del module.forward


def pair_file(follower: int, anchor: int) -> str:
    """The blob that holds how ``follower`` on ``anchor`` begins."""
    return f"start-{follower:05d}-on-{anchor:05d}.safetensors"


def read_factors(context: StepContext, digest: str, form: str) -> dict[str, Pieces]:
    """Pieces by name of weight, as stored."""
    found = read_blob(context, digest)
    names = dict.fromkeys(key.partition("#")[0] for key in found)
    return {name: tuple(found[key] for key in keys(name, form)) for name in names}


def _written(context: StepContext, factors: Mapping[str, Pieces], form: str) -> str:
    flat = {key: one for name, pair in factors.items() for key, one in zip(keys(name, form), pair, strict=True)}
    return write_pieces(context, {key: whole(one) for key, one in sorted(flat.items())})


def _paths(config: Json) -> list[tuple[str, Any]]:
    return blocks_of(build(config))
