"""End-to-end fine-tuning: sign vectors and norms of the whole model learn its full-precision answers.

QuIP#, arXiv 2402.04396, appendix D.2: Adam on all ``s_in`` and ``s_out``, all norms and, where it is asked for, the
output head; soft cross-entropy to the teacher, one window at a time. Code words stay. An epoch is a few steps of the
job: what a kill costs is a run of :data:`CHUNK_WINDOWS` windows. A third of the windows is left out and chooses the
best epoch, the state before the first one among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compression_worker.checkpoints import load_model
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import codes_file, six_digits
from compression_worker.methods.quip_sharp import layout
from compression_worker.methods.quip_sharp.config import QuipSharpConfig
from compression_worker.methods.quip_sharp.layers import NORMS
from compression_worker.methods.quip_sharp.quantize import code_words
from compression_worker.methods.quip_sharp.rotation import Rotation
from compression_worker.methods.quip_sharp.stacks import from_line
from compression_worker.methods.quip_sharp.student import Student, named_parameters
from compression_worker.methods.quip_sharp.teacher import Teacher
from compression_worker.quantization.calibration import read_tokens
from compression_worker.tensors import TensorFile, whole, write_file
from kernels.e8p_matmul.reference import decode_matrix

CHUNK_WINDOWS = 32
STATE, BEST = "state", "best"
VALUE, MEAN, SQUARE = "value", "mean", "square"
BETAS, EPSILON = (0.9, 0.999), 1e-8


def lesson_windows(windows: int) -> int:
    """How many of ``windows`` are learnt from; the others choose the best epoch."""
    return max(1, min(windows - 1, math.ceil(windows * 2 / 3)))


def planned_tuning(config: QuipSharpConfig, inputs: Mapping[str, str], at: int, seed: int) -> list[PlannedStep]:
    """The steps of end-to-end fine-tuning, of which the first is number ``at`` of the plan.

    ``inputs`` name the checkpoint (``variant``), the text (``text``) and the steps that coded the layers.
    """
    training = {
        name: getattr(config, name)
        for name in ("num_bits", "learning_rate", "sign_learning_rate", "train_head", "tuning_epochs")
    }
    steps = [
        PlannedStep(
            name="answers of the model",
            kind="quip_sharp.teacher",
            group="distill",
            params={"logits": config.teacher_logits},
            inputs={name: inputs[name] for name in ("variant", "text")},
        )
    ]
    lesson = lesson_windows(config.samples)
    for epoch in range(config.tuning_epochs):
        for first in range(0, lesson, CHUNK_WINDOWS):
            last = min(lesson, first + CHUNK_WINDOWS)
            more = {"previous": f"@{at + len(steps) - 1}"} if len(steps) > 1 else {}
            steps.append(
                PlannedStep(
                    name=f"epoch {epoch + 1}, windows {first + 1} to {last}",
                    kind="quip_sharp.tune",
                    group="distill",
                    params={"config": training, "epoch": epoch, "first": first, "last": last, "ends": last == lesson},
                    inputs={**inputs, "teacher": f"@{at}", **more},
                    seed=seed,
                )
            )
    return steps


def tune_step(context: StepContext) -> StepOutput:
    """Windows ``first`` to ``last`` of an epoch in its own order; the state, and the best values so far."""
    params = context.spec.params
    previous = context.input("previous") if "previous" in context.spec.inputs else None
    training = Training(context, QuipSharpConfig(**params["config"]))
    tokens = read_tokens(context, "text")
    lesson = range(lesson_windows(len(tokens)))
    exam = range(len(lesson), len(tokens)) or lesson
    curve: Json = {"losses": [], "exam": []}
    if previous:
        training.resume(previous.blobs)
        curve = {name: list(values) for name, values in previous.data["curve"].items()}
    else:
        curve["exam"].append(training.examined(tokens, exam))
        training.keep()
    order = _order(len(lesson), context.spec.seed, params["epoch"])[params["first"] : params["last"]]
    for done, window in enumerate(order):
        curve["losses"].append(six_digits(training.learn(tokens, window)))
        context.progress(done + 1, len(order), "windows")
    if params["ends"]:
        curve["exam"].append(training.examined(tokens, exam))
        if curve["exam"][-1] < min(curve["exam"][:-1]):
            training.keep()
        context.log(f"divergence {curve['exam'][0]:.4g} at first, {curve['exam'][-1]:.4g} now", "info")
    data = {"curve": curve, "windows": len(tokens), "tuned": training.whole_tensors()}
    return StepOutput(blobs=training.blobs(), data=data)


@dataclass
class Moments:
    """What Adam remembers of one parameter."""

    mean: torch.Tensor
    square: torch.Tensor


class Training:
    """The student and its optimizer, with everything that it remembers in the open."""

    def __init__(self, context: StepContext, config: QuipSharpConfig) -> None:
        self._context, self._config = context, config
        self._model, self._rates = _student(context, config)
        self._moments = {
            name: Moments(torch.zeros_like(one), torch.zeros_like(one)) for name, (one, _) in self._rates.items()
        }
        self._tensors = opened(context, "variant").manifest["tensors"]
        self._steps = 0
        self._best: dict[str, torch.Tensor] = {}
        self._teacher = Teacher(context)

    def learn(self, tokens: torch.Tensor, window: int) -> float:
        """One step of Adam on one window; its loss before."""
        loss = self._loss(tokens, window)
        parameters = [one for one, _ in self._rates.values()]
        gradients = torch.autograd.grad(loss, parameters)
        found = float(loss.detach())
        if not math.isfinite(found) or not all(bool(one.isfinite().all()) for one in gradients):
            raise CompressionError("diverged", "end-to-end fine-tuning is not finite: lower the learning rates")
        self._steps += 1
        for (name, (parameter, rate)), gradient in zip(self._rates.items(), gradients, strict=True):
            self._step(parameter, gradient, self._moments[name], rate)
        return found

    def examined(self, tokens: torch.Tensor, windows: range) -> float:
        """The mean loss on ``windows``."""
        with torch.no_grad():
            losses = [float(self._loss(tokens, window)) for window in windows]
        return six_digits(sum(losses) / len(losses))

    def whole_tensors(self) -> list[str]:
        """The tensors of the checkpoint that are trained: all but the sign vectors."""
        return [name for name in self._rates if name in self._tensors]

    def keep(self) -> None:
        """The values of now are the best."""
        self._best = {name: one.detach().cpu().clone() for name, (one, _) in self._rates.items()}

    def blobs(self) -> dict[str, str]:
        """State and best values, stored."""
        state: dict[str, torch.Tensor] = {"steps": torch.tensor([self._steps], dtype=torch.int32)}
        for name, (parameter, _) in self._rates.items():
            moments = self._moments[name]
            found = {VALUE: parameter.detach(), MEAN: moments.mean, SQUARE: moments.square}
            state |= {f"{name}/{kind}": tensor for kind, tensor in found.items()}
        return {STATE: self._stored(state), BEST: self._stored(self._best)}

    def resume(self, blobs: Mapping[str, str]) -> None:
        """Take up what :meth:`blobs` stored."""
        with TensorFile(self._context.store.verified_path(blobs[STATE])) as file:
            self._steps = int(file.tensor("steps"))
            for name, (parameter, _) in self._rates.items():
                parameter.data.copy_(file.tensor(f"{name}/{VALUE}"))
                self._moments[name].mean.copy_(file.tensor(f"{name}/{MEAN}"))
                self._moments[name].square.copy_(file.tensor(f"{name}/{SQUARE}"))
        with TensorFile(self._context.store.verified_path(blobs[BEST])) as file:
            self._best = {name: file.tensor(name) for name in file.entries}

    def _loss(self, tokens: torch.Tensor, window: int) -> torch.Tensor:
        logits = self._model(tokens[window : window + 1].to(self._context.device), use_cache=False).logits
        return self._teacher.answers(window).divergence(logits)

    def _step(self, parameter: torch.nn.Parameter, gradient: torch.Tensor, moments: Moments, rate: float) -> None:
        first, second = BETAS
        moments.mean.lerp_(gradient, 1 - first)
        moments.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = moments.mean / (1 - first**self._steps)
        spread = (moments.square / (1 - second**self._steps)).sqrt_().add_(EPSILON)
        parameter.data.addcdiv_(mean, spread, value=-rate)

    def _stored(self, tensors: Mapping[str, torch.Tensor]) -> str:
        with self._context.store.writer() as blob:
            write_file(blob, {name: whole(tensor) for name, tensor in tensors.items()})
        return blob.digest


def _student(context: StepContext, config: QuipSharpConfig) -> tuple[Any, dict[str, tuple[torch.nn.Parameter, float]]]:
    """The model with its coded linears, and what is trained: by name, each with its learning rate."""
    checkpoint = opened(context, "variant")
    architecture = architecture_of(checkpoint)
    model = load_model(checkpoint, device=context.device, dtype=torch.float32).requires_grad_(False)
    student = Student(model, architecture, tuple(architecture.linears()))
    layers = [context.input(name) for name in sorted(context.spec.inputs) if name.startswith("layers-")]
    norms = dict(named_parameters(model, architecture, "norms"))
    for layer in layers:
        for line, file in _coded(context, layer):
            stack = from_line(line)
            rotation = Rotation.from_json(line["rotation"], context.spec.seed)
            pieces = {name: file.tensor(layout.key(stack.name, name)) for name in _pieces(stack.name, file)}
            planes = tuple(pieces[name] for name in (layout.CODES, layout.SECOND) if name in pieces)
            turned = rotation.back(decode_matrix(code_words(planes, config.num_bits)).to(context.device))
            signs = rotation.signs()
            if layout.SIGNS_IN in pieces:
                signs = pieces[layout.SIGNS_IN].float(), pieces[layout.SIGNS_OUT].float()
            student.put(stack, turned, pieces[layout.SCALES], signs)
        if NORMS in layer.blobs:
            with TensorFile(context.store.verified_path(layer.blobs[NORMS])) as file:
                for name in file.entries:
                    norms[name].data.copy_(file.tensor(name))
    trained = {name: (one, config.sign_rate) for name, one in student.signs().items()}
    trained |= {name: (one, config.learning_rate) for name, one in norms.items()}
    if config.train_head:
        heads = named_parameters(model, architecture, "head")
        trained |= {name: (one, config.learning_rate) for name, one in heads.items()}
    for one, _ in trained.values():
        one.requires_grad_(True)
    return model, dict(sorted(trained.items()))


def _coded(context: StepContext, layer: StepOutput) -> Iterator[tuple[Json, TensorFile]]:
    """Each stack's line of a step that coded layers, and the file that holds it."""
    for line in layer.data["stacks"]:
        digest = layer.blobs[codes_file(line["linears"][0]["block"])]
        with TensorFile(context.store.path(digest)) as file:
            yield line, file


def _pieces(stack: str, file: TensorFile) -> Iterator[str]:
    """The pieces that ``file`` holds of a stack."""
    start = layout.key(stack, "")
    return (name.removeprefix(start) for name in file.entries if name.startswith(start))


def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
