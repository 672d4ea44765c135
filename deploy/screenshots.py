"""Screenshots of a running demo for the README: `python -m deploy.screenshots` beside `make run`.

Gives the demo's people new passwords (and prints them), waits until the demo waits for an approval, and writes
overview, job, evaluation and approval in light, dark and narrow into docs/screenshots. Then it works the demo on, so
that the release has a history: approves, deploys, rolls back. Run it on a home of its own.
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

People = dict[str, tuple[str, str]]
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


def new_passwords() -> People:
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


def shoot(browser: Browser, address: str, people: People) -> None:
    """Every page in every look."""
    with browser.new_page() as page:
        sign_in(page, address, *_person(people, "Engineer"))
        pages = find_pages(page, address)
    for name in ("overview", "job", "evaluation", "approval"):
        picture(browser, address, people, name, pages[name])
    with browser.new_page() as page:
        sign_in(page, address, *_person(people, "Manager"))
        approve(page, pages["approval"])
    with browser.new_page() as page:
        sign_in(page, address, *_person(people, "Operations"))
        deploy(page, pages["release"], "Approved for the spring season.")
        roll_back(page, pages["release"], "Readers report odd line breaks.")
    picture(browser, address, people, "release", pages["release"])


def picture(browser: Browser, address: str, people: People, name: str, where: str) -> None:
    """One page in every look, as its reader sees it."""
    for look, options in LOOKS.items():
        with browser.new_context(**options) as context:  # type: ignore[arg-type]
            page = context.new_page()
            sign_in(page, address, *_person(people, READERS[name]))
            page.goto(where)
            page.screenshot(path=FOLDER / f"{name}-{look}.png", full_page=look != "narrow")


def approve(page: Page, where: str) -> None:
    page.goto(where)
    page.get_by_label("Reason").fill("A fifth of the size, equal within the margins, and the way back is rehearsed.")
    page.get_by_role("button", name="Approve").click()
    page.get_by_text("Approved").first.wait_for()


def deploy(page: Page, where: str, reason: str) -> None:
    page.goto(where)
    form = page.locator("#deploy")
    form.get_by_label("Approved artifact").select_option(index=1)
    form.get_by_label("Reason").first.fill(reason)
    form.get_by_role("button", name="Deploy to production").click()
    _confirmed(page)


def roll_back(page: Page, where: str, reason: str) -> None:
    page.goto(where)
    form = page.locator("#rollback")
    form.get_by_label("Reason").fill(reason)
    form.get_by_role("button", name="Roll production back").click()
    _confirmed(page)


def _confirmed(page: Page) -> None:
    page.get_by_role("status").filter(has_text="points at generation").wait_for(timeout=30_000)
    page.locator("#release").get_by_text("1/1 server confirms").wait_for(timeout=60_000)
    page.wait_for_timeout(4_000)  # so that the strip of generations has something to show


def _person(people: People, role: str) -> tuple[str, str]:
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
