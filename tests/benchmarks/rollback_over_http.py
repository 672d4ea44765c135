"""A rollback as operations does it: from POSTing the button's form to the last answer of the compressed model.

    python tests/benchmarks/rollback_over_http.py --rounds 50 --clients 4

Everything is the stack of `make run` in a folder of its own: web, Postgres, worker, server, the demo's pair. Each round
asks for, grants and deploys an approval, waits until the compressed model answers, and POSTs the rollback form while
clients ask without a pause. Prints one line of JSON; exits 1 when an answer failed
or was mixed (its text is not what the digest in its header says greedily), or when p99 is above two seconds.
"""

from __future__ import annotations

import argparse
import http.cookiejar
import json
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.stack import RunningStack, until

ALIAS = "model-production"
PASSWORD = "a long enough password"
LIMIT_SECONDS = 2.0


class Answer(NamedTuple):
    """One answer: when it was whole, its status, the digest that spoke, and what it said."""

    at: float
    status: int
    digest: str
    text: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deltaworks-rollback-") as folder:
        stack = RunningStack(Path(folder) / "home")
        stack.start()
        try:
            return judge(args.rounds, args.clients, *measure(stack, args.rounds, args.clients))
        finally:
            stack.stop()


def judge(rounds: int, clients: int, waits: list[float], seen: list[Answer]) -> int:
    """Print the figures and say whether they are good enough."""
    good = [answer for answer in seen if answer.status == 200]
    said: dict[str, set[str]] = {}
    for answer in good:
        said.setdefault(answer.digest, set()).add(answer.text)
    mixed = sum(len(texts) - 1 for texts in said.values())  # greedy: one digest has one answer
    if len({text for texts in said.values() for text in texts}) < 2:
        raise AssertionError("both models say the same: this prompt cannot show a mixed answer")
    p99 = statistics.quantiles(waits, n=100, method="inclusive")[98]
    figures = {
        "rounds": rounds,
        "clients": clients,
        "p50_seconds": round(statistics.median(waits), 3),
        "p99_seconds": round(p99, 3),
        "max_seconds": round(max(waits), 3),
        "answers": len(seen),
        "failed_answers": len(seen) - len(good),
        "mixed_answers": mixed,
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if len(good) < len(seen) or mixed or p99 > LIMIT_SECONDS else 0


def measure(stack: RunningStack, rounds: int, clients: int) -> tuple[list[float], list[Answer]]:
    """The wait of each rollback, and every answer."""
    artifact = prepare(stack)
    ops = Session(stack.status()["address"], "ops")
    waits: list[float] = []
    with load(stack, clients) as seen:
        for number in range(rounds):
            approval = stack.drive("ask", artifact=artifact)
            until(lambda: stack.drive("certified", artifact=artifact), seconds=120, what="the rehearsal")
            stack.drive("approve", approval=approval)
            generation = stack.drive("deploy", artifact=artifact, approval=approval)
            digest = stack.answers_from(ALIAS, generation)["x-deltaworks-digest"]
            posted = time.monotonic()
            ops.roll_back(generation, f"round {number}")
            stack.answers_from(ALIAS, generation + 1)
            settle(seen, clients, digest)
            waits.append(max([0.0, *(one.at - posted for one in seen if one.digest == digest)]))
    return waits, seen


def settle(seen: list[Answer], clients: int, digest: str) -> None:
    """Wait for as many other answers in a row as there are clients, twice: none still runs on the old handle."""
    mark = len(seen)
    until(
        lambda: len(seen) >= mark + 2 * clients and all(one.digest != digest for one in seen[-clients:]),
        seconds=60,
        what="answers at full precision",
    )


def prepare(stack: RunningStack) -> int:
    """People, environments, the demo's pair, an artifact and its evaluation; returns the artifact's number."""
    stack.drive("people", password=PASSWORD)
    stack.drive("rooms")
    text = stack.drive("sample_set", name="shakespeare-heldout", kind="text")
    base = stack.finish(stack.drive("import_checkpoint", folder="base", name="base"))["checkpoint"]
    variant = stack.finish(stack.drive("import_checkpoint", folder="variant", name="variant", base=base))["checkpoint"]
    job = stack.drive("compress", variant=variant, config={"distill_steps": 0}, calibration=text)
    artifact: int = stack.finish(job)["artifact"]
    stack.finish(stack.drive("evaluate", artifact=artifact, text=text), seconds=300)
    return artifact


@contextmanager
def load(stack: RunningStack, clients: int) -> Iterator[list[Answer]]:
    """Clients that ask without a pause from the first deployment on; yields the growing list of answers."""
    seen: list[Answer] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            status, headers, body = stack.complete(ALIAS)
            if status == 404 or (status == 503 and not seen):
                time.sleep(0.2)  # nothing is deployed yet
                continue
            text = body["choices"][0]["text"] if status == 200 else ""
            seen.append(Answer(time.monotonic(), status, headers.get("x-deltaworks-digest", ""), text))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(ask) for _ in range(clients)]
        try:
            yield seen
        finally:
            stop.set()
        for client in running:
            client.result()


class Session:
    """Somebody signed in, as a browser without JavaScript."""

    def __init__(self, address: str, name: str) -> None:
        self.address = address
        self.opener = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()), urllib.request.ProxyHandler({})
        )
        self.submit("/sign-in/", "/sign-in/", username=name, password=PASSWORD)
        self.token = self.find_token("/releases/production/")

    def find_token(self, page: str) -> str:
        with self.opener.open(self.address + page, timeout=30) as answer:
            found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', answer.read().decode())
        assert found is not None, f"{page} has no form"
        return found[1]

    def submit(self, page: str, action: str, **values: str) -> None:
        """Open ``page``, then send one of its forms."""
        self.post(action, self.find_token(page), **values)

    def post(self, action: str, token: str, **values: str) -> None:
        body = urllib.parse.urlencode({**values, "csrfmiddlewaretoken": token}).encode()
        request = urllib.request.Request(self.address + action, body, {"Referer": self.address + action})
        with self.opener.open(request, timeout=30) as answer:
            assert answer.status == 200, answer.status

    def roll_back(self, generation: int, reason: str) -> None:
        self.post("/releases/production/rollback/", self.token, seen_generation=str(generation), reason=reason)


if __name__ == "__main__":
    sys.exit(main())
