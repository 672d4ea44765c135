"""The one folder of an embedded stack: its secrets, its ports, its lock, and what runs in it right now."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import Any

from deploy.processes import free_port

SECRETS = ("secret_key", "postgres", "owner", "server", "broker")
PORTS = {"web": 8000, "server": 8100, "postgres": None, "broker": None}


class RunsAlready(Exception):
    """Another supervisor holds this folder."""


class Home:
    """``folder`` with everything of one stack: database, messages, artifacts, logs. Nobody else may read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.logs = self.folder / "logs"
        self.imports = self.folder / "imports"
        for path in (self.folder, self.logs, self.imports):
            path.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._lock = (self.folder / "lock").open("a")

    def lock(self) -> None:
        """Hold the folder until this process ends. Raises :class:`RunsAlready` when another one does."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            status = self.read("status.json")
            raise RunsAlready(
                f"Deltaworks runs already in {self.folder}: {status.get('address', 'starting')} "
                f"(process {status.get('pid', 'unknown')})"
            ) from None

    def secrets(self) -> dict[str, str]:
        """The passwords of this stack, made once."""
        known = self.read("secrets.json")
        if missing := [name for name in SECRETS if name not in known]:
            known |= {name: secrets.token_urlsafe(32) for name in missing}
            self.write("secrets.json", known)
        return known

    def choose_ports(self) -> dict[str, int]:
        """The ports of this start: those of the last start where they are still free, else others."""
        known = self.read("ports.json")
        chosen = {name: free_port(known.get(name, usual)) for name, usual in PORTS.items()}
        self.write("ports.json", chosen)
        return chosen

    def read(self, name: str) -> dict[str, Any]:
        """The JSON file ``name`` of this folder; empty when there is none."""
        try:
            value: dict[str, Any] = json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return {}
        return value

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Replace the JSON file ``name`` in one move, readable by its owner only."""
        path = self.folder / f"{name}.new"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(value, file, indent=2)
        path.rename(self.folder / name)
