"""The words of the pages, each defined once: metrics with their units, and the terms behind the dotted underlines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from django.utils.translation import gettext_lazy as _

if TYPE_CHECKING:
    from django.utils.functional import _StrPromise  # only the type stubs have it

Words: TypeAlias = "str | _StrPromise"


@dataclass(frozen=True)
class Term:
    label: Words
    meaning: Words


METRICS: Mapping[str, Term] = {
    "perplexity": Term(
        _("Perplexity"),
        _("How surprised the model is by real text, per token: 1 would be never, lower is better."),
    ),
    "kl_divergence": Term(
        _("KL divergence"),
        _("How far the model's next-token probabilities are from those of the uncompressed model; 0 is identical."),
    ),
    "top1_agreement": Term(
        _("Top-1 agreement"),
        _("How often the most likely next token is the same as that of the uncompressed model."),
    ),
    "choice_accuracy": Term(_("Choice accuracy"), _("Share of multiple-choice questions that are answered correctly.")),
}
SHARE_METRICS = frozenset({"top1_agreement", "choice_accuracy"})
"""Stored as a fraction, read as a percentage."""

TERMS: Mapping[str, Term] = {
    "base": Term(_("Base model"), _("The pre-trained model that a variant was fine-tuned from.")),
    "variant": Term(
        _("Variant"), _("A fine-tuned model at full precision: what clients should get, and what a rollback restores.")
    ),
    "artifact": Term(
        _("Artifact"),
        _("What a compression job publishes: immutable bytes that stand for a model, by themselves or with its base."),
    ),
    "delta": Term(_("Delta"), _("The difference between a variant's weights and its base's weights.")),
    "true_ratio": Term(
        _("True ratio"),
        _("Bytes of the model as imported over every byte of the artifact, its manifest included."),
    ),
    "nominal_ratio": Term(
        _("Nominal ratio"), _("The ratio as the method's paper counts it, for the compressed matrices alone.")
    ),
    "bits_per_weight": Term(_("Bits per weight"), _("All bits of the artifact over the number of weights.")),
    "relative_error": Term(
        _("Relative error"),
        _("Size of what is lost over the size of what was compressed, matrix by matrix; 0 is exact."),
    ),
    "proxy_loss": Term(
        _("Proxy loss"),
        _("How much of a layer's output on the calibration text is lost, relative to that output; 0 is exact."),
    ),
    "linears_bits": Term(
        _("Bits of a linear's weight"), _("Bits stored for each weight of the compressed matrices, scales counted.")
    ),
    "study": Term(
        _("Study"), _("Several compressions of one model, each measured alike, so that they can be compared.")
    ),
    "interval": Term(
        _("95 % interval"),
        _("Where the true value lies with 95 % confidence, given these samples. Differences are paired by sample."),
    ),
    "margin": Term(
        _("Margin"),
        _("A difference too small to matter. A verdict holds the whole interval to it; a policy may accept more."),
    ),
    "flip": Term(
        _("Flip"),
        _("A question that one model answers correctly and the other does not. Flips hide in equal accuracy."),
    ),
    "generation": Term(
        _("Generation"), _("The running number of an environment's deployments. It only grows, also on a rollback.")
    ),
    "environment": Term(
        _("Environment"), _("Where clients ask, such as staging or production. It serves exactly one deployment.")
    ),
    "alias": Term(
        _("Alias"), _("The model name that clients use. It stays the same through every change and rollback.")
    ),
    "rollback": Term(_("Rollback"), _("Back to full precision: the environment serves the uncompressed model again.")),
    "certificate": Term(
        _("Rollback certificate"),
        _("Proof that a rollback was really rehearsed: files re-hashed, weights compared, a prompt answered, timed."),
    ),
    "escrow": Term(
        _("Escrow"),
        _("Full precision kept bit for bit as its difference from the base, for a fraction of a second copy."),
    ),
    "fingerprint": Term(
        _("Fingerprint"), _("A SHA-256 over all weights, the configuration and the tokenizer: equal means identical.")
    ),
    "digest": Term(_("Digest"), _("The SHA-256 of a document in the store. One changed byte gives another digest.")),
    "step": Term(_("Step"), _("A piece of a job, from seconds to minutes long. A killed job loses one step at most.")),
    "attempt": Term(_("Attempt"), _("One claim of a step by a worker. A lost or killed attempt is repeated.")),
    "failed": Term(_("Failed"), _("The job says no: the input is wrong, or the target cannot be met.")),
    "errored": Term(_("Errored"), _("The code broke; the same step is tried again, three times at most.")),
    "distillation": Term(
        _("Distillation"), _("Tuning the scales so that the compressed model's answers come close to the variant's.")
    ),
    "scale": Term(_("Scale"), _("The number that a matrix of signs is multiplied with.")),
    "policy": Term(
        _("Policy"),
        _("The checks that an artifact has to pass. An approval counts only under the policy it was given."),
    ),
}

GROUPS: Mapping[str, Words] = {
    "calibrate": _("calibration"),
    "tokens": _("calibration text"),
    "hessians": _("calibration"),
    "layers": _("layer"),
    "choose": _("choice"),
    "search": _("choice"),
    "measure": _("measurement"),
    "layer": _("layer"),
    "rest": _("rest"),
    "distill": _("distillation"),
    "teacher": _("teacher"),
    "logits": _("teacher"),
    "text": _("training text"),
    "start": _("start"),
    "train": _("training"),
    "assemble": _("assembly"),
    "target": _("target"),
    "summary": _("summary"),
    "import": _("import"),
    "plan": _("plan"),
    "rehearse": _("rehearsal"),
    "encode": _("coding"),
    "restore": _("restore"),
}
"""What the steps of a job are counted in."""


PARTS: Mapping[str, Term] = {
    "codes": Term(_("codes"), _("What is left of the weights of the compressed matrices.")),
    "masks": Term(_("masks"), _("Which weights were kept, or further layers of signs.")),
    "residual": Term(_("residual"), _("Small matrices that put right what the codes lost.")),
    "scales": Term(_("scales"), _("The numbers that codes are multiplied with.")),
    "adapter": Term(_("adapter"), _("Low-rank matrices beside packed ones, which learned what those lost.")),
    "deltas": Term(
        _("differences"), _("Low-rank matrices, or signs, of layers that use the weights of an earlier one.")
    ),
    "linears": Term(_("whole matrices"), _("Matrices of blocks that are stored as they were.")),
    "embeddings": Term(_("embeddings"), _("One row for each token of the vocabulary.")),
    "head": Term(_("head"), _("What turns the last layer's output into tokens.")),
    "norms": Term(_("norms"), _("The normalisation of each layer, kept exactly.")),
    "biases": Term(_("biases"), _("What is added after a matrix, kept exactly.")),
    "other": Term(_("other tensors"), _("Tensors that belong to no other part.")),
    "headers": Term(_("headers"), _("Names, shapes and places of tensors in the files.")),
    "side files": Term(_("side files"), _("Configuration and tokenizer.")),
    "manifest": Term(_("manifest"), _("What the artifact says of itself: digests, settings, figures.")),
}
"""The parts of an artifact's ledger, and the rest of its bytes."""


def part_label(name: str) -> str:
    return str(PARTS[name].label) if name in PARTS else name


def part_meaning(name: str) -> str:
    return str(PARTS[name].meaning) if name in PARTS else ""


def metric_label(name: str) -> str:
    """The name of a metric as people read it; an unknown one keeps its own name."""
    return str(METRICS[name].label) if name in METRICS else name.replace("_", " ")


def group_label(name: str) -> str:
    return str(GROUPS.get(name, name))
