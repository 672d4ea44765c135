"""`manage.py` against the stack that `make run` keeps running: `python -m deploy.manage demo remove`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from deploy.home import Home
from deploy.local import ROOT, Stack


def main() -> None:
    home = Home(Path(os.environ.get("DELTAWORKS_HOME") or ROOT / ".deltaworks"))
    ports = home.read("status.json").get("ports")
    if ports is None:
        sys.exit(f"nothing runs in {home.folder}: start it with 'make run' first")
    environment = Stack(home, ports).environment()
    os.execve(sys.executable, [sys.executable, str(ROOT / "manage.py"), *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
