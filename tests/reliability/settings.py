"""The environment in which the sweep and the soak load Django: made before anything of the dashboard is imported."""

from __future__ import annotations

import os
from pathlib import Path

OWNER_PASSWORD = "owner-of-a-tiny-world"
DATABASE = "deltaworks"


def prepare_environment(folder: Path, port: int) -> None:
    """Settings of a tiny world below ``folder`` whose Postgres listens on ``port``. Loads Django and every model."""
    os.environ.update(
        {
            "SECRET_KEY": "a key for a world that lives for minutes",
            "ARTIFACT_ROOT": str(folder / "store"),
            "IMPORT_ROOTS": f"models={folder / 'models'}",
            "CELERY_BROKER_URL": os.environ.get("CELERY_BROKER_URL", "memory://"),
            "DATABASE_URL": f"postgres://deltaworks:{OWNER_PASSWORD}@127.0.0.1:{port}/{DATABASE}",
            "PLAIN_STATIC": "1",
            "DJANGO_SETTINGS_MODULE": "dashboard.settings",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "STEP_DEVICE": "cpu",
            "LOG_LEVEL": "INFO",
        }
    )
    import django

    django.setup()


def import_everything() -> None:
    """What forked processes need, imported once."""
    import torch
    import transformers

    import dashboard.tasks
    import dashboard.urls  # noqa: F401

    torch.set_num_threads(1)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
