"""Differences learn: one chunk of optimizer steps as a step that takes up the state of the chunk before.

    L = (1 - c) KL(teacher || student) + c CE on the text + w mean |h_l - h_l of the old way|^2

at temperature 1, on the teacher's stored answers (:mod:`compression_worker.quantization.divergence`), ``h_l`` being
what comes out of a block that follows; only differences learn, and adapters of linears that are not shared where
those are asked for. While modules are being replaced (:mod:`compression_worker.methods.deltallm.replacement`), the
weights that followers had are in memory. The loss is our reading. A state is every factor, both of AdamW's moments and
how often each factor was trained, in fp32: a run that was killed goes on, to equal bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.making.allocation import given_back
from compression_worker.making.blobs import read_blob, write_blob
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import six_digits
from compression_worker.methods.deltallm.choosing import pair_file, read_factors
from compression_worker.methods.deltallm.config import SIGN, DeltaLLMConfig
from compression_worker.methods.deltallm.matrices import shareable, unshared
from compression_worker.methods.deltallm.replacement import drawn, probability
from compression_worker.methods.deltallm.sources import base_input
from compression_worker.methods.deltallm.student import Student
from compression_worker.quantization.divergence import divergence
from compression_worker.quantization.learning import (
    HeldOut,
    checkpoint_blocks,
    optimizer_steps,
    read_training,
    round_parameters,
)
from compression_worker.quantization.ranks import in_processes, is_first, processes
from compression_worker.quantization.teacher import TopLogits, read_logits

STATE_FILE = "state.safetensors"
FIRST, SECOND, COUNT = "#first", "#second", "#count"


@given_back()
def train_step(context: StepContext) -> StepOutput:
    """Optimizer steps ``first`` to ``last``; the output carries the state and what was measured."""
    params = context.spec.params
    config = DeltaLLMConfig(**params["config"])
    if (count := processes(context.device, config.batch_size)) > 1:
        return in_processes(context, count)
    before = context.input("previous") if "previous" in context.spec.inputs else None
    chosen = context.input("chosen")
    student = learner(context, config)
    held = HeldOut(context)
    state = read_blob(context, before.blobs[STATE_FILE]) if before else {}
    optimizer = _taken_up(student, state)
    started = time.monotonic()
    windows = read_training(context, config.batch_size)
    losses = _trained(context, student, optimizer, config, windows)
    if not is_first():
        return StepOutput()
    context.measure("seconds_per_training_step", (time.monotonic() - started) / (params["last"] - params["first"]))
    if params["final"]:
        round_factors(student, config)
    student.share(student.blocks)
    curve: list[Json] = list(before.data["curve"] if before else chosen.data["curve"])
    tokens = curve[-1]["tokens"] + windows.numel()
    curve.append(held.measured(student, tokens, "train"))
    context.log(
        f"held-out KL {curve[-1]['kl']:.4g}, cross-entropy {curve[-1]['ce']:.4g} after {tokens:,} tokens", "info"
    )
    losses = (list(before.data["losses"]) if before else []) + [six_digits(loss) for loss in losses]
    blob = write_blob(context, _state(student, optimizer))
    return StepOutput(blobs={STATE_FILE: blob}, data={"curve": curve, "losses": losses})


def learner(context: StepContext, config: DeltaLLMConfig) -> Student:
    """The model with every follower in its place and its factors as they begin, which alone have gradients."""
    checkpoint, chosen = opened(context, "variant"), context.input("chosen")
    layers = shareable(checkpoint.manifest["config"], architecture_of(checkpoint), config.kinds)
    student = Student.of(checkpoint, base_input(context), layers, context.device)
    for follower, anchor in sorted((int(one), anchor) for one, anchor in chosen.data["groups"].items()):
        student.put(
            follower, anchor, read_factors(context, chosen.blobs[pair_file(follower, anchor)], config.share_form)
        )
    if config.tunes_others:
        groups = {int(one): anchor for one, anchor in chosen.data["groups"].items()}
        taken = layers.taken(groups, chosen.data.get("left_out", []))
        others = unshared(checkpoint.manifest["config"], architecture_of(checkpoint), taken)
        student.adapt(others, config.lora_rank, context.spec.seed)
    if config.replacement == "none" and not config.hidden_weight:
        student.forget()
    if config.checkpointing:
        checkpoint_blocks(student.model, checkpoint.manifest["config"])
    for parameter in student.factors.values():
        parameter.requires_grad_(True)
    return student


def replace_modules(student: Student, config: DeltaLLMConfig, seed: int, step: int, total: int) -> None:
    """Set the way of every follower's modules for one training step."""
    p = probability(config, step, total)
    for (block, kind), switch in student.switches.items():
        switch.new = drawn(seed, step, block, kind, p)


def loss_of(student: Student, windows: torch.Tensor, known: TopLogits, config: DeltaLLMConfig) -> torch.Tensor:
    """The loss of ``windows (B, T)`` on the device, with the distance of hidden states where that is asked for."""
    if not config.hidden_weight:
        return student.judged(windows, known, ce_weight=config.ce_weight).loss
    ways = {place: switch.new for place, switch in student.switches.items()}
    student.share([])
    with torch.no_grad():
        _, old = student.hidden(windows)
    for place, switch in student.switches.items():
        switch.new = ways[place]
    logits, new = student.hidden(windows)
    distances = [torch.nn.functional.mse_loss(new[block], old[block]) for block in student.blocks]
    loss = divergence(logits, known, windows, ce_weight=config.ce_weight).loss
    return loss + config.hidden_weight * torch.stack(distances).mean()


def _trained(
    context: StepContext,
    student: Student,
    optimizer: torch.optim.AdamW,
    config: DeltaLLMConfig,
    windows: torch.Tensor,
) -> list[float]:
    teacher, total = read_logits(context, "teacher"), context.spec.params["total"]
    return optimizer_steps(
        context,
        optimizer,
        windows,
        lambda rows: loss_of(student, windows[rows].to(student.device), teacher.at(rows, student.device), config),
        batch_size=config.batch_size,
        vocabulary=int(student.model.config.vocab_size),
        learning_rate=config.learning_rate,
        begin=lambda step: replace_modules(student, config, context.spec.seed, step, total),
    )


def _taken_up(student: Student, state: Mapping[str, torch.Tensor]) -> torch.optim.AdamW:
    """AdamW as ``state`` left it, and the factors with it; a run that begins has none."""
    optimizer = torch.optim.AdamW(student.factors.values(), lr=0.0, weight_decay=0.0, foreach=False)
    for name, parameter in student.factors.items():
        if name in state:
            parameter.data.copy_(state[name])
        if name + COUNT in state:
            optimizer.state[parameter] = {
                "step": state[name + COUNT].clone(),
                "exp_avg": state[name + FIRST].to(student.device),
                "exp_avg_sq": state[name + SECOND].to(student.device),
            }
    return optimizer


def round_factors(student: Student, config: DeltaLLMConfig) -> None:
    """The factors as they will be stored; signs have none."""
    if config.share_form != SIGN:
        round_parameters(student.factors.values(), config.delta_dtype, "delta_dtype", "a factor")


def _state(student: Student, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """A factor that no step has trained yet has no moments."""
    found = {}
    for name, parameter in student.factors.items():
        found[name] = parameter.detach()
        if moments := optimizer.state.get(parameter):
            found[name + COUNT] = moments["step"].to(torch.float32)
            found[name + FIRST], found[name + SECOND] = moments["exp_avg"], moments["exp_avg_sq"]
    return found
