"""Rows for tests: a whole small world of checkpoints, jobs, artifacts, evaluations, approvals and environments.

Rows are written directly, not through services, so that tests of pages depend on nothing but tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import count
from types import SimpleNamespace
from typing import Any

from django.utils import timezone

from dashboard.lifecycle import (
    ApprovalState,
    DeploymentKind,
    DeploymentState,
    JobKind,
    JobState,
    Role,
    StepState,
    SweepState,
)
from dashboard.models import (
    Approval,
    Artifact,
    Attempt,
    Checkpoint,
    Deployment,
    Environment,
    Escrow,
    Evaluation,
    Job,
    LogLine,
    Policy,
    RollbackCertificate,
    SampleSet,
    ServerReport,
    Step,
    Study,
    Sweep,
    SweepBlob,
    Trial,
    User,
    Worker,
)

_numbers = count(1)
RULES = [
    {"check": "perplexity_increase", "limit": 0.05, "severity": "block"},
    {"check": "top1_agreement", "limit": 0.9, "severity": "warn"},
    {"check": "choice_accuracy_drop", "limit": 0.03, "severity": "block"},
    {"check": "true_ratio", "limit": 2.0, "severity": "block"},
]


def digest(words: object = "") -> str:
    """A digest that no other call without words gives."""
    return hashlib.sha256(str(words or next(_numbers)).encode()).hexdigest()


def make_user(role: Role | str = Role.VIEWER, **fields: Any) -> User:
    name = fields.pop("username", f"{role}{next(_numbers)}")
    user = User(username=name, role=role, **fields)
    user.set_unusable_password()
    user.save()
    return user


def make_job(kind: JobKind = JobKind.COMPRESS, state: JobState = JobState.SUCCEEDED, **fields: Any) -> Job:
    now = timezone.now()
    terminal = state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD)
    values: dict[str, Any] = {
        "title": f"{kind} {next(_numbers)}",
        "spec": {},
        "created_by": fields.pop("created_by", None) or make_user(Role.ENGINEER),
        "started_at": None if state == JobState.QUEUED else now - timedelta(minutes=3),
        "finished_at": now if terminal else None,
    }
    return Job.objects.create(kind=kind, state=state, **values | fields)


def make_steps(job: Job, layers: int = 4, done: int = 2) -> list[Step]:
    """A plan, ``layers`` layer steps, an assembly; the first ``done`` layers finished, one of them at its second attempt."""
    now = timezone.now()
    rows = [("plan", "plan", "bitdelta.plan")]
    rows += [(f"layer {n}", "layer", "bitdelta.layer") for n in range(layers)]
    rows += [("assemble", "assemble", "bitdelta.assemble")]
    steps = []
    for index, (name, group, kind) in enumerate(rows):
        finished = index <= done
        state = StepState.DONE if finished else StepState.RUNNING if index == done + 1 else StepState.WAITING
        begun = now - timedelta(seconds=(len(rows) - index) * 10)
        step = Step.objects.create(
            job=job,
            index=index,
            name=name,
            group=group,
            kind=kind,
            state=state,
            attempt=0 if state == StepState.WAITING else 1,
            owner="worker-1" if state == StepState.RUNNING else "",
            started_at=None if state == StepState.WAITING else begun,
            finished_at=begun + timedelta(seconds=8) if finished else None,
            progress_at=now,
            data={"linears": {f"model.layers.{index - 1}.self_attn.q_proj": _line(index)}}
            if finished and group == "layer"
            else {},
        )
        if state != StepState.WAITING:
            _attempts(step, begun, finished, killed=index == 2)
        steps.append(step)
    return steps


def _line(index: int) -> dict[str, Any]:
    return {"linear": {"outputs": 8, "inputs": 8}, "scale": 0.1, "sum_abs": 6.0, "sum_squares": 0.7 + index / 50}


def _attempts(step: Step, begun: datetime, finished: bool, *, killed: bool) -> None:
    if killed:
        Attempt.objects.create(
            step=step,
            number=1,
            worker="worker-1",
            outcome="killed",
            detail="signal 9",
            started_at=begun - timedelta(seconds=4),
            finished_at=begun,
        )
    Attempt.objects.create(
        step=step,
        number=2 if killed else 1,
        worker="worker-1",
        outcome="done" if finished else "running",
        started_at=begun,
        finished_at=begun + timedelta(seconds=8) if finished else None,
    )


def make_log(job: Job, lines: int = 3) -> None:
    now = timezone.now()
    LogLine.objects.bulk_create(
        [LogLine(job=job, at=now, level="warning" if n == 1 else "info", text=f"line {n} <b>") for n in range(lines)]
    )


def make_checkpoint(name: str, base: Checkpoint | None = None, **fields: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "digest": digest(),
        "fingerprint": digest(),
        "manifest": {
            "files": {"model.safetensors": {"sha256": digest(), "size": 5_200_000}},
            "weight_bytes": 5_200_000,
            "config": {
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "intermediate_size": 384,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
        },
        "size_bytes": 5_300_000,
        "parameters": 2_600_000,
        "dtype": "BF16",
        "architecture": "LlamaForCausalLM",
        "licence": "Apache-2.0",
    }
    return Checkpoint.objects.create(name=name, base=base, **values | fields)


def make_artifact(
    variant: Checkpoint, job: Job | None = None, *, alone: bool = False, method: str = "bitdelta", **fields: Any
) -> Artifact:
    """``alone``: it holds the whole model, of a base or of a variant."""
    base = variant if alone else variant.base
    assert base is not None
    matrices = [
        {"name": f"model.layers.{layer}.{kind}", "scale": 0.01, "relative_error": 0.35 + layer / 20 + at / 100}
        for layer in range(4)
        for at, kind in enumerate(("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"))
    ]
    values: dict[str, Any] = {
        "name": f"{method} of {variant.name}",
        "digest": digest(),
        "method": method,
        "config": {"distill_steps": 200, "learning_rate": 1e-4},
        "source_bytes": 5_200_000,
        "artifact_bytes": 1_000_000,
        "nominal_ratio": 15.8,
        "bits_per_weight": 3.1,
        "ledger": [
            {"name": "codes", "bytes": 300_000},
            {"name": "embeddings", "bytes": 650_000},
            {"name": "norms", "bytes": 40_000},
            {"name": "manifest", "bytes": 10_000},
        ],
        "figures": {"matrices": matrices, "distillation": {"losses": [1 / (n + 2) for n in range(40)], "windows": 9}},
    }
    return Artifact.objects.create(
        variant=variant, base=base, job=job or make_job(variant=variant, method=method), **values | fields
    )


def standalone_figures(bits: float = 4.16) -> dict[str, Any]:
    """What a method tells that compresses a model by itself and trains a correction."""
    return {
        "linears": {"bits_per_weight": bits},
        "matrices": [
            {
                "name": f"model.layers.{layer}.{kind}",
                "relative_error": 0.1 + layer / 50,
                "proxy_loss": 0.002 + layer / 1000 + at / 5000,
                "bits": 4,
            }
            for layer in range(4)
            for at, kind in enumerate(("self_attn.q_proj", "mlp.down_proj"))
        ],
        "training": {
            "tokens": 8192,
            "losses": [1 / (n + 2) for n in range(20)],
            "curve": [
                {"phase": "base", "tokens": 0, "kl": 0.8, "ce": 3.1},
                {"phase": "lrec", "tokens": 8192, "kl": 0.25, "ce": 2.6},
            ],
            "peak_bytes": 60_000_000,
            "lora_fp16_bytes": 120_000_000,
            "lora_fp32_bytes": 180_000_000,
            "full_finetune_bytes": 400_000_000,
        },
    }


def sharing_figures(blocks: int = 8) -> dict[str, Any]:
    """What a method tells whose blocks use the weights of others: 3 and 4 those of 2, 6 those of 5."""
    followers = {3: 2, 4: 2, 6: 5}
    matrices = []
    for block in range(blocks):
        for kind, size in (("self_attn.q_proj", 8_000), ("mlp.up_proj", 32_000)):
            line = {"name": f"model.layers.{block}.{kind}.weight", "coding": "whole", "bytes": size}
            if block in followers and kind.startswith("mlp"):
                anchor = f"model.layers.{followers[block]}.{kind}.weight"
                line |= {"coding": f"rank 4 on '{anchor}'", "bytes": 2_000}
            matrices.append(line | {"relative_error": 0.0 if line["coding"] == "whole" else 0.4})
    return {
        "linears": {"bits_per_weight": 11.2, "true_ratio": 1.3},
        "matrices": matrices,
        "sharing": {
            "groups": {"2": [3, 4], "5": [6]},
            "form": "low_rank",
            "blocks": blocks,
            "rank": 4,
            "rounds": sharing_rounds(),
            "kl_before_training": 0.025,
            "parameters": {"before": 332_864, "after": 266_048, "reduction": 0.200731},
            "operations": {"before": 626_688, "after": 640_512},
        },
        "training": {
            "tokens": 256,
            "losses": [0.006, -2e-08, 0.0155, 0.0243],
            "curve": [
                {"tokens": 0, "phase": "base", "kl": 0.0045, "ce": 6.17},
                {"tokens": 0, "phase": "start", "kl": 0.025, "ce": 6.18},
                {"tokens": 128, "phase": "train", "kl": 0.021, "ce": 6.18},
                {"tokens": 256, "phase": "train", "kl": 0.019, "ce": 6.18},
            ],
            "probabilities": [0.3, 0.65, 1.0, 1.0],
        },
    }


def sharing_rounds() -> list[dict[str, Any]]:
    """Two rounds of choosing; block 1 is measured again, and in the second round its divergence is no number."""
    return [
        {"kl": {"1": [0, 0.058], "3": [2, 0.006], "4": [3, 0.0094], "6": [5, 0.0008]}, "chosen": [6, 3]},
        {"kl": {"1": [0, None], "4": [2, 0.025]}, "chosen": [4]},
    ]


def make_choice(job: Job, *, index: int, rounds: int, final: bool = False) -> Step:
    """A finished round of choosing which blocks share, the ``rounds``-th of two."""
    groups = {"3": 2, "6": 5} | ({"4": 2} if rounds == 2 else {})
    return Step.objects.create(
        job=job,
        index=index,
        name=f"choose followers, round {rounds} of 2",
        group="choose",
        kind="deltallm.choose",
        state=StepState.DONE,
        params={
            "by_hand": {},
            "blocks": 8,
            "protect": {"protect_first": 1, "protect_last": 1},
            "count": (2, 1)[rounds - 1],
            "still": (3, 1)[rounds - 1],
            "final": final,
        },
        data={"groups": groups, "rounds": sharing_rounds()[:rounds]} | ({"curve": [_START]} if final else {}),
    )


_START = {"tokens": 0, "phase": "start", "kl": 0.025, "ce": 6.18, "windows": [0.025]}


def make_chunk(job: Job, *, index: int, chunks: int, kind: str = "deltallm.train") -> Step:
    """A finished part of a training of 40 steps, 10 in each part: it tells of all parts so far."""
    curve = [{"tokens": 640 * n, "phase": "train", "kl": 0.025 / n, "ce": 6.1} for n in range(1, chunks + 1)]
    return Step.objects.create(
        job=job,
        index=index,
        name=f"train, steps {10 * chunks - 9} to {10 * chunks}",
        group="train",
        kind=kind,
        state=StepState.DONE,
        params={"total": 40, "config": {"replacement": "progressive"} if kind.startswith("deltallm") else {}},
        data={"curve": [_START, *curve], "losses": [1 / (n + 2) for n in range(10 * chunks)]},
    )


def make_study(
    variant: Checkpoint, ways: Sequence[tuple[str, int | None]] = (("bitdelta", None),), **fields: Any
) -> Study:
    """A study whose compressions are queued; ``ways``: method and bits of each."""
    by = fields.pop("created_by", None) or make_user(Role.ENGINEER)
    values: dict[str, Any] = {"title": f"study of {variant.name}", "config": {}, "queue": "cpu"}
    if "choice_set" not in fields:
        values["text_set"] = SampleSet.objects.filter(kind="text").first() or make_sample_set()
    study = Study.objects.create(variant=variant, created_by=by, **values | fields)
    for index, (method, bits) in enumerate(ways):
        job = make_job(state=JobState.QUEUED, created_by=by, variant=variant, method=method, title=f"{method} {bits}")
        Trial.objects.create(study=study, index=index, method=method, bits=bits, compression=job)
    return study


def measure_trial(trial: Trial, *, perplexity: float = 5.0, bits: float = 4.16, **fields: Any) -> Artifact:
    """Bring a trial to its end: an artifact, and an evaluation of it that found ``perplexity``."""
    study, now = trial.study, timezone.now()
    Job.objects.filter(pk=trial.compression_id).update(state=JobState.SUCCEEDED, started_at=now, finished_at=now)
    trial.compression.refresh_from_db()
    alone = trial.method not in ("bitdelta", "deltadq")
    figures = standalone_figures(bits) if alone else {}
    made = make_artifact(
        study.variant, trial.compression, method=trial.method, alone=alone, bits_per_weight=bits + 2,
        **{"figures": figures, "name": f"{trial.method}-{trial.bits}"} | fields,
    )  # fmt: skip
    trial.evaluation = make_job(JobKind.EVALUATE, created_by=study.created_by, variant=study.variant)
    trial.save()
    results = summary()
    results["metrics"][0]["values"]["compressed"] = value(perplexity, 0.1)
    make_evaluation(made, job=trial.evaluation, text_set=study.text_set, choice_set=study.choice_set, results=results)
    return made


def make_escrow(variant: Checkpoint, **fields: Any) -> Escrow:
    values: dict[str, Any] = {
        "base": variant.base,
        "job": make_job(JobKind.ESCROW, variant=variant),
        "digest": digest(),
        "source_bytes": 5_200_000,
        "escrow_bytes": 800_000,
        "ledger": [{"name": "codes", "bytes": 790_000}, {"name": "manifest", "bytes": 10_000}],
    }
    return Escrow.objects.create(variant=variant, **values | fields)


def make_sample_set(name: str = "letters", kind: str = "text", version: int = 1, **fields: Any) -> SampleSet:
    preview = [{"text": "Once <b>upon</b> a time"}] if kind == "text" else [QUESTION]
    values: dict[str, Any] = {"digest": digest(), "samples": 120, "size_bytes": 40_000, "preview": preview}
    return SampleSet.objects.create(name=name, kind=kind, version=version, **values | fields)


QUESTION = {"question": "2 + 2 = ?", "choices": ["3", "4"], "answer": 1}


def value(middle: float, half: float) -> dict[str, float]:
    return {"value": middle, "low": middle - half, "high": middle + half}


def summary() -> dict[str, Any]:
    """A summary document as the worker writes it."""
    return {
        "targets": ["base", "variant", "compressed"],
        "reference": "variant",
        "metrics": [
            {
                "name": "perplexity",
                "unit": "",
                "higher_is_better": False,
                "samples": 40,
                "values": {"base": value(7.34, 0.3), "variant": value(4.52, 0.2), "compressed": value(4.58, 0.2)},
                "differences": {"base": value(2.82, 0.2), "compressed": value(0.06, 0.03)},
            },
            {
                "name": "kl_divergence",
                "unit": "nats/token",
                "higher_is_better": False,
                "samples": 40,
                "values": {"base": value(0.9, 0.1), "variant": value(0.0, 0.0), "compressed": value(0.02, 0.004)},
                "differences": {"base": value(0.9, 0.1), "compressed": value(0.02, 0.004)},
            },
            {
                "name": "top1_agreement",
                "unit": "",
                "higher_is_better": True,
                "samples": 40,
                "values": {"base": value(0.6, 0.02), "variant": value(1.0, 0.0), "compressed": value(0.95, 0.01)},
                "differences": {"base": value(-0.4, 0.02), "compressed": value(-0.05, 0.01)},
            },
            {
                "name": "choice_accuracy",
                "unit": "",
                "higher_is_better": True,
                "samples": 100,
                "values": {"base": value(0.35, 0.09), "variant": value(0.41, 0.09), "compressed": value(0.40, 0.09)},
                "differences": {
                    "base": value(-0.06, 0.1) | {"p_value": 0.3},
                    "compressed": value(-0.01, 0.05) | {"p_value": 0.8},
                },
            },
        ],
        "generations": [
            {
                "prompt": "The king",
                "answers": {"base": "sat <i>down", "variant": "stood up and spoke", "compressed": "stood up and sang"},
                "word_diff": [["equal", "stood up and "], ["delete", "spoke"], ["insert", "sang"]],
            }
        ],
        "flips": {
            "right_to_wrong": 3,
            "wrong_to_right": 2,
            "examples": [QUESTION | {"variant": 1, "compressed": 0}],
        },
        "config": {},
    }


def make_evaluation(artifact: Artifact, job: Job | None = None, **fields: Any) -> Evaluation:
    values: dict[str, Any] = {"digest": digest(), "results": summary()}
    return Evaluation.objects.create(
        variant=artifact.variant, artifact=artifact, job=job or make_job(JobKind.EVALUATE), **values | fields
    )


def make_policy(rules: list[dict[str, Any]] | None = None) -> Policy:
    """The active policy: the one in force, or a new one with ``rules``."""
    present = Policy.objects.filter(active=True).first()
    if present is not None and rules is None:
        return present
    Policy.objects.filter(active=True).update(active=False)
    version = (Policy.objects.order_by("-version").values_list("version", flat=True).first() or 0) + 1
    return Policy.objects.create(version=version, rules=rules or RULES, digest=digest(), active=True)


def make_approval(evaluation: Evaluation, state: ApprovalState = ApprovalState.PENDING, **fields: Any) -> Approval:
    artifact, policy = evaluation.artifact, make_policy()
    assert artifact is not None
    decided = state not in (ApprovalState.PENDING, ApprovalState.EXPIRED)
    values: dict[str, Any] = {
        "artifact_digest": artifact.digest,
        "evaluation_digest": evaluation.digest,
        "base_fingerprint": artifact.base.fingerprint,
        "policy_digest": policy.digest,
        "requested_by": artifact.job.created_by,
        "submitted_by": artifact.job.created_by,
        "expires_at": timezone.now() + timedelta(days=7),
        "decided_by": make_user(Role.MANAGER) if decided else None,
        "decided_at": timezone.now() if decided else None,
        "reason": "evidence is good" if decided else "",
    }
    return Approval.objects.create(
        artifact=artifact, evaluation=evaluation, policy=policy, state=state, **values | fields
    )


def make_certificate(variant: Checkpoint) -> RollbackCertificate:
    return RollbackCertificate.objects.create(
        variant=variant,
        job=make_job(JobKind.REHEARSE, variant=variant),
        digest=variant.digest,
        seconds=1.4,
        details={},
        expires_at=timezone.now() + timedelta(hours=24),
    )


def make_environment(name: str = "production") -> Environment:
    """The environment ``name``, made if the installation has not made it."""
    made, _new = Environment.objects.get_or_create(name=name, defaults={"alias": f"{name}-model"})
    return made


def deploy(
    environment: Environment, variant: Checkpoint, approval: Approval | None = None, *, rollback: bool = False
) -> Deployment:
    """Move the pointer as a service would: a row of the next generation, then the environment."""
    artifact = approval.artifact if approval else None
    kind = DeploymentKind.COMPRESSED if artifact else DeploymentKind.FULL_PRECISION
    made = Deployment.objects.create(
        environment=environment,
        generation=environment.generation + 1,
        kind=DeploymentKind.ROLLBACK if rollback else kind,
        variant=variant,
        base=artifact.base if artifact else None,
        artifact=artifact,
        approval=approval,
        replaces=environment.active,
        digest=artifact.digest if artifact else variant.digest,
        state=DeploymentState.LIVE,
        reason="because",
        created_by=make_user(Role.OPS),
        live_at=timezone.now() + timedelta(seconds=1),
    )
    environment.generation, environment.active = made.generation, made
    environment.save()
    return made


def make_report(environment: Environment, server: str = "server-1", **fields: Any) -> ServerReport:
    now = timezone.now()
    values: dict[str, Any] = {"generation": environment.generation, "state": "serving", "answers": 12}
    return ServerReport.objects.create(
        server=server, environment=environment.name, started_at=now, reported_at=now, **values | fields
    )


def make_worker(name: str = "worker-1") -> Worker:
    now = timezone.now()
    return Worker.objects.create(name=name, queues="cpu", pid=1, started_at=now, seen_at=now)


def make_sweep(state: SweepState = SweepState.PREVIEWED, blobs: int = 2, **fields: Any) -> Sweep:
    """A preview that lists ``blobs`` leftovers of a kilobyte each."""
    now = timezone.now()
    totals = {"leftover": {"blobs": blobs, "bytes": 1000 * blobs}}
    values: dict[str, Any] = {"looked_at": now, "older_than": now - timedelta(days=7), "totals": totals}
    values |= {"blobs": blobs, "bytes": 1000 * blobs, "store_blobs": 10, "store_bytes": 10_000}
    sweep = Sweep.objects.create(state=state, **values | fields)
    for _ in range(blobs):
        SweepBlob.objects.create(sweep=sweep, digest=digest(), kind="leftover", size=1000)
    return sweep


def make_world() -> SimpleNamespace:
    """One of everything, linked as in real work."""
    engineer = make_user(Role.ENGINEER, username="alice")
    base = make_checkpoint("smol-base")
    variant = make_checkpoint(
        "support-ja", base, differences=[{"tensor": "lm_head.weight", "kind": "shape", "base": [9], "variant": [8]}]
    )
    job = make_job(created_by=engineer, variant=variant, method="bitdelta", title="bitdelta support-ja")
    make_steps(job)
    make_log(job)
    running = make_job(
        state=JobState.RUNNING, created_by=engineer, variant=variant, method="bitdelta", title="running one"
    )
    make_steps(running)
    make_log(running)
    failed = make_job(
        state=JobState.FAILED,
        created_by=engineer,
        error="layers.3.q_proj has another shape",
        error_code="shape_mismatch",
    )
    text, choice = make_sample_set(), make_sample_set("quiz", "choice")
    artifact = make_artifact(variant, job)
    evaluation = make_evaluation(artifact, text_set=text, choice_set=choice)
    approval = make_approval(evaluation, ApprovalState.APPROVED)
    pending = make_approval(
        make_evaluation(make_artifact(variant, name="second try"), text_set=text, choice_set=choice)
    )
    certificate = make_certificate(variant)
    escrow = make_escrow(variant)
    production = make_environment()
    deploy(production, variant)
    deploy(production, variant, approval)
    make_report(production)
    make_worker()
    sweep = make_sweep()
    study = make_study(variant, [("bitdelta", None), ("deltadq", 4)], text_set=text)
    measure_trial(study.trials.get(index=0))
    return SimpleNamespace(**locals())
