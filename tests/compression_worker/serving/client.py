"""A plain HTTP client of the server, and a server on a free port in a thread: what the tests here speak through."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette

TIMEOUT = 60
SERVE = [sys.executable, "-m", "compression_worker", "serve"]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        choice = self.json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]

    def events(self) -> list[Any]:
        """The JSON events of a stream; asserts that it ended as it should."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> Answer:
        return self.request("POST", path, body)

    def complete(self, model: str, prompt: str = "The quick", **fields: Any) -> Answer:
        return self.post("/v1/completions", {"model": model, "prompt": prompt, "temperature": 0} | fields)


@contextlib.contextmanager
def running(app: Starlette) -> Iterator[Client]:
    """``app`` under a real uvicorn on a free port, for the length of the block."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Client(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)


def until(true: Callable[[], Any], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    """Wait until ``true()`` holds; fails after ``seconds`` with what ``why()`` says."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, why() or "it did not come true in time"
        time.sleep(0.02)
