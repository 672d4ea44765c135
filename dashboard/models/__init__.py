"""The tables: what people see, decide and remember. Postgres is the truth; everything else only wakes or computes."""

from dashboard.models.accounts import User
from dashboard.models.escrows import Escrow
from dashboard.models.evaluations import Evaluation, SampleSet
from dashboard.models.jobs import Attempt, Job, LogLine, Priority, Step, Worker
from dashboard.models.recovery import Recovery
from dashboard.models.registry import Artifact, Checkpoint
from dashboard.models.releases import (
    Approval,
    Deployment,
    Environment,
    Policy,
    RollbackCertificate,
    ServerReport,
)
from dashboard.models.storage import Damage, Scrub, Sweep, SweepBlob
from dashboard.models.studies import Study, Trial

__all__ = [
    "Approval",
    "Artifact",
    "Attempt",
    "Checkpoint",
    "Damage",
    "Deployment",
    "Environment",
    "Escrow",
    "Evaluation",
    "Job",
    "LogLine",
    "Policy",
    "Priority",
    "Recovery",
    "RollbackCertificate",
    "SampleSet",
    "Scrub",
    "ServerReport",
    "Step",
    "Study",
    "Sweep",
    "SweepBlob",
    "Trial",
    "User",
    "Worker",
]
