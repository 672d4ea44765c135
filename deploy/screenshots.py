"""Screenshots of a running demo for the README: `python -m deploy.screenshots` beside `make run`.

Gives the demo's people new passwords (and prints them), waits until the demo waits for an approval, and writes
overview, job, evaluation, approval and release in light, dark and narrow into docs/screenshots.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Browser, Page

from deploy.chromium import chromium, sign_in
from deploy.home import Home
from deploy.local import ROOT

FOLDER = ROOT / "docs" / "screenshots"
LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 400, "height": 860}, "color_scheme": "light"},
}
READERS = {
    "overview": "Engineer",
    "job": "Engineer",
    "evaluation": "Engineer",
    "approval": "Manager",
    "release": "Operations",
}
PATIENCE_SECONDS = 600


def new_passwords() -> dict[str, tuple[str, str]]:
    """Role -> (name, password) of the demo's people."""
    command = [sys.executable, "-m", "deploy.manage", "demo", "passwords"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    sys.stdout.write(done.stdout)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    return {words[0]: (words[-2], words[-1]) for words in lines}


def first_link(page: Page, address: str, listing: str, pattern: str) -> str:
    """The address of the first link on ``listing`` that matches ``pattern``."""
    page.goto(address + listing)
    links = [str(link.get_attribute("href")) for link in page.get_by_role("main").get_by_role("link").all()]
    return address + next(link for link in links if re.fullmatch(pattern, link))


def find_pages(page: Page, address: str) -> dict[str, str]:
    """Which address shows what, once the demo has come as far as its approval."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            approval = first_link(page, address, "/approvals/?state=pending", r"/approvals/\d+/")
            break
        except StopIteration:
            if time.monotonic() > deadline:
                sys.exit("the demo has no approval waiting: look at its jobs")
            time.sleep(2)
    return {
        "overview": f"{address}/",
        "job": first_link(page, address, "/jobs/?kind=compress&state=succeeded", r"/jobs/\d+/"),
        "evaluation": first_link(page, address, "/evaluations/", r"/evaluations/\d+/"),
        "approval": approval,
        "release": f"{address}/releases/production/",
    }


def shoot(browser: Browser, address: str, people: dict[str, tuple[str, str]]) -> None:
    """Every page in every look."""
    with browser.new_page() as page:
        sign_in(page, address, *people["Engineer"])
        pages = find_pages(page, address)
    for look, options in LOOKS.items():
        for name, reader in READERS.items():
            with browser.new_context(**options) as context:  # type: ignore[arg-type]
                page = context.new_page()
                sign_in(page, address, *_person(people, reader))
                page.goto(pages[name])
                page.screenshot(path=FOLDER / f"{name}-{look}.png", full_page=look != "narrow")


def _person(people: dict[str, tuple[str, str]], role: str) -> tuple[str, str]:
    return next(person for label, person in people.items() if label.startswith(role[:3]))


def main() -> None:
    status = Home(Path(os.environ.get("DELTAWORKS_HOME") or ROOT / ".deltaworks")).read("status.json")
    if not status.get("ready"):
        sys.exit("nothing runs here: start it with 'make run' first")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        shoot(browser, status["address"], new_passwords())
    sys.stdout.write(f"written: {FOLDER}\n")


if __name__ == "__main__":
    main()
