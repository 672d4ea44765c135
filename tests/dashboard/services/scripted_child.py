"""A real child process that speaks the step protocol and does what a step's params say: for tests of the parent.

``params["act"]`` is one of done, plan, fail, error, die, disk, sleep, stubborn, stopped, family, orphan, chatter. Every
start of a step is written to the file ``params["starts"]``, so that a test can count them. Run: ``python
scripted_child.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from typing import Any


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def result(spec: dict[str, Any], steps: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    output = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    data = spec["params"].get("data", {})
    return {"type": "result", "output": output, "data": data, "steps": steps or [], "measured": {}, "reused": False}


def act(spec: dict[str, Any], cached: str) -> dict[str, Any]:
    params = spec["params"]
    if starts := params.get("starts"):
        with open(starts, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {spec['kind']}\n")
    if cached:
        return result(spec, params.get("steps")) | {"output": cached, "reused": True}
    say({"type": "progress", "done": 1, "total": 2, "unit": "tensors"})
    match params["act"]:
        case "plan":
            return result(spec, params["steps"])
        case "fail":
            return {"type": "failed", "code": "shape_mismatch", "message": "layers.3 has another shape"}
        case "error":
            return {"type": "errored", "message": "ZeroDivisionError", "traceback": "Traceback: here"}
        case "disk":
            return {"type": "blocked", "reason": "disk", "message": "no space left on device"}
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleep":
            time.sleep(params["seconds"])
        case "stubborn":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(params["seconds"])
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "family":
            grandchildren(2)
            time.sleep(params["seconds"])
        case "orphan":
            grandchildren(1)
            os.kill(os.getpid(), signal.SIGKILL)
        case "chatter":
            for number in range(params["lines"]):
                say({"type": "log", "level": "info", "text": f"line {number}"})
    return result(spec)


def grandchildren(count: int) -> None:
    """Processes that outlive their parent and hold its pipes open."""
    for _ in range(count):
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
            os._exit(0)


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        say(act(message["spec"], message["cached"]))


if __name__ == "__main__":
    main()
