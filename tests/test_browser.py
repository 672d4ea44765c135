"""The whole loop in a browser, as the people who work it: import, job, evaluation, approval, release, rollback.

Everything is real: the stack of `make run`, its worker, its server, and the demo's pair of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from compression_worker.catalog import METHODS
from deploy.chromium import chromium, sign_in
from tests.stack import ROOT, RunningStack, until

pytestmark = [pytest.mark.browser, pytest.mark.stack]

PASSWORD = "a long enough password"
SETS = ROOT / "deploy" / "demo" / "sets"
JOB_SECONDS = 180


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    stack = RunningStack(tmp_path_factory.mktemp("browser") / "home")
    stack.start()
    stack.drive("people", password=PASSWORD)
    stack.drive("rooms")
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Person:
    """Somebody at a browser of their own. What the page's console complains about is kept in ``complaints``."""

    def __init__(self, browser: Browser, address: str, name: str) -> None:
        self.address = address
        self.complaints: list[str] = []
        self.page: Page = browser.new_context(locale="en-GB").new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        sign_in(self.page, address, name, PASSWORD)

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def visit(self, path: str) -> None:
        answer = self.page.goto(self.address + path)
        assert answer is not None
        assert answer.ok, f"{path}: {answer.status}"

    def click(self, name: str, role: str = "button") -> None:
        self.page.get_by_role("main").get_by_role(role, name=name).first.click()  # type: ignore[arg-type]

    def fill(self, label: str, text: str) -> None:
        self.page.get_by_label(label, exact=True).fill(text)

    def choose(self, label: str, option: str | re.Pattern[str]) -> None:
        """Choose the first option of the list ``label`` that says ``option``."""
        field = self.page.get_by_label(label, exact=True)
        words = field.locator("option", has_text=option).first.inner_text()
        field.select_option(label=words)

    def follow_job(self, then: str) -> str:
        """Watch a job page until its result is there, and open it; returns the path of the job."""
        job = self.page.url.removeprefix(self.address)
        result = self.page.get_by_role("main").get_by_role("link", name=then)
        until(
            lambda: result.is_visible() or self.complaints,
            seconds=JOB_SECONDS,
            what=f"{job} ends with '{then}'",
            wait=lambda: self.page.wait_for_timeout(250),
        )
        assert self.complaints == []
        result.click()
        return job

    def post(self, path: str, **values: str) -> tuple[int, str]:
        """Send a form that the page does not offer, with a valid token; returns the status and the page."""
        token = next(c["value"] for c in self.page.context.cookies() if c["name"] == "csrftoken")
        answer = self.page.context.request.post(
            self.address + path, form={**values, "csrfmiddlewaretoken": token}, headers={"Referer": self.address}
        )
        return answer.status, answer.text()


def test_the_whole_loop_from_import_to_rollback(stack: RunningStack, browser: Browser) -> None:
    address = stack.status()["address"]
    engineer = Person(browser, address, "engineer")
    import_pair(engineer)
    upload_sets(engineer)
    artifact = compress(engineer)
    evaluate(engineer, artifact)
    approval = ask_for_approval(engineer, artifact)
    self_approval_is_refused(browser, engineer, approval)
    approve(browser, address, approval)
    ops = Person(browser, address, "ops")
    generation = deploy(ops)
    compressed = stack.answers_from("model-production", generation)
    roll_back(ops, generation)
    full = stack.answers_from("model-production", generation + 1)
    assert compressed["x-deltaworks-digest"] != full["x-deltaworks-digest"]
    the_history_says_who_and_why(ops)
    assert engineer.complaints + ops.complaints == []


def import_pair(engineer: Person) -> None:
    for folder, name in (("base", "verse-base"), ("variant", "verse")):
        engineer.visit("/registry/")
        engineer.click("Import a checkpoint", "link")
        engineer.choose("Folder", re.compile(f"^{folder}$"))
        engineer.fill("Name", name)
        if folder == "variant":
            engineer.choose("Base model", "verse-base")
        engineer.fill("Licence", "Apache-2.0")
        engineer.click("Import")
        engineer.follow_job("Open the checkpoint")
        expect(engineer.page.get_by_role("heading", level=1, name=name)).to_be_visible()


def upload_sets(engineer: Person) -> None:
    for name in ("shakespeare-calibration", "shakespeare-heldout"):
        engineer.visit("/evaluations/sets/")
        engineer.click("Upload a set", "link")
        engineer.fill("Name", name)
        engineer.choose("Kind", re.compile("text", re.IGNORECASE))
        engineer.page.get_by_label("File", exact=True).set_input_files(SETS / f"{name}.jsonl")
        engineer.click("Check and store")
        expect(engineer.page.get_by_role("heading", level=1, name=name)).to_be_visible()


def compress(engineer: Person) -> str:
    """Returns the path of the artifact's page."""
    engineer.visit("/jobs/new/")
    engineer.click("Set up BitDelta", "link")
    engineer.choose("Variant", re.compile("^verse"))
    engineer.choose("Calibration text", re.compile("shakespeare-calibration"))
    engineer.fill("Distillation steps", "25")
    engineer.click("Queue BitDelta")
    job = engineer.follow_job("Open the artifact")
    artifact = engineer.page.url.removeprefix(engineer.address)
    expect(engineer.page.get_by_role("main")).to_contain_text("Published")
    the_log_has_an_address_of_its_own(engineer, job)
    return artifact


def the_log_has_an_address_of_its_own(engineer: Person, job: str) -> None:
    engineer.visit(f"{job}log/")
    lines = engineer.page.get_by_role("main").locator("ol > li")
    assert lines.count() > 0
    assert lines.first.inner_text().strip()


def evaluate(engineer: Person, artifact: str) -> None:
    engineer.visit(artifact)
    engineer.click("Evaluate", "link")
    engineer.choose("Text set", re.compile("shakespeare-heldout"))
    engineer.click("Queue the evaluation")
    engineer.follow_job("Open the evaluation")
    table = engineer.page.get_by_role("table").first
    for metric in ("Perplexity", "KL divergence", "Top-1 agreement"):
        row = table.get_by_role("row").filter(has_text=metric)
        expect(row).to_contain_text(re.compile(r"\d"))


def ask_for_approval(engineer: Person, artifact: str) -> str:
    engineer.visit(artifact)
    engineer.click("Ask for approval", "link")
    engineer.fill("Note for the approver", "Please look at the generations.")
    engineer.click("Ask for approval")
    expect(engineer.page.get_by_role("status").first).to_contain_text("a manager decides")
    return engineer.page.url.removeprefix(engineer.address)


def self_approval_is_refused(browser: Browser, engineer: Person, approval: str) -> None:
    """As an engineer there is no right to it; promoted to manager, it is still one's own request."""
    expect(engineer.page.get_by_role("button", name="Approve")).to_be_disabled()
    status, _page = engineer.post(f"{approval}decide/", decision="approve", reason="mine")
    assert status == 403
    admin = Person(browser, engineer.address, "admin")
    change_role(admin, "Manager")
    engineer.visit(approval)
    expect(engineer.page.get_by_role("main")).to_contain_text("You asked for this approval")
    status, page = engineer.post(f"{approval}decide/", decision="approve", reason="mine")
    assert status == 422
    assert "somebody else has to decide" in page
    change_role(admin, "Engineer")
    assert admin.complaints == []


def change_role(admin: Person, role: str) -> None:
    admin.visit("/users/")
    row = admin.page.get_by_role("row").filter(has=admin.page.get_by_role("rowheader", name="engineer"))
    row.get_by_label("Role").select_option(label=role)
    row.get_by_label("Reason").fill("to show that it does not help")
    row.get_by_role("button").click()
    expect(admin.page.get_by_role("status").first).to_contain_text(f"engineer is {role} now")


def approve(browser: Browser, address: str, approval: str) -> None:
    manager = Person(browser, address, "manager")
    manager.visit("/approvals/")
    manager.page.get_by_role("main").locator(f"a[href='{approval}']").click()
    expect(manager.page.get_by_role("main")).to_contain_text("Rehearsed", timeout=JOB_SECONDS * 1000)
    manager.fill("Reason", "A fifth of the size, and the verse still scans.")
    manager.click("Approve: ops may deploy it")
    expect(manager.page.get_by_role("main")).to_contain_text("Approved")
    assert manager.complaints == []


def deploy(ops: Person) -> int:
    """Returns the generation that production points at afterwards."""
    ops.visit("/releases/production/")
    section = ops.page.locator("#deploy")
    field = section.get_by_label("Approved artifact")
    field.select_option(index=1)
    section.get_by_label("Reason").first.fill("The approved verse model.")
    section.get_by_role("button", name="Deploy to production").click()
    return confirmed(ops)


def roll_back(ops: Person, generation: int) -> None:
    ops.visit("/releases/production/")
    section = ops.page.locator("#rollback")
    section.get_by_label("Reason").fill("refusals up")
    section.get_by_role("button", name="Roll production back to full precision").click()
    assert confirmed(ops) == generation + 1


def confirmed(ops: Person) -> int:
    """Wait until the page says that every server answers from the generation that it has just named."""
    words = ops.page.get_by_role("status").first.inner_text()
    found = re.search(r"generation (\d+)", words)
    assert found, words
    expect(ops.page.locator("#release")).to_contain_text("1/1 server confirms", timeout=60_000)
    expect(ops.page.locator("#release")).to_contain_text(f"generation {found[1]}")
    return int(found[1])


def the_history_says_who_and_why(ops: Person) -> None:
    ops.visit("/releases/production/")
    row = ops.page.get_by_role("row").filter(has_text="refusals up")
    expect(row.first).to_contain_text("ops")
    ops.visit("/history/")
    expect(ops.page.get_by_role("main")).to_contain_text("refusals up")


@pytest.mark.skipif(len(METHODS) < 2, reason="there is one method, so that none can be chosen instead")
@pytest.mark.parametrize("javascript", [True, False])
def test_another_method_shows_its_own_settings_and_keeps_what_both_ask(
    stack: RunningStack, browser: Browser, javascript: bool
) -> None:
    first, other = list(METHODS)[:2]
    with browser.new_context(java_script_enabled=javascript, locale="en-GB") as context:
        page = context.new_page()
        sign_in(page, stack.status()["address"], "engineer", PASSWORD)
        page.goto(f"{stack.status()['address']}/jobs/new/{first}/?seed=7")
        page.get_by_role("navigation", name="Method").get_by_role("link", name=METHODS[other].label).click()
        expect(page).to_have_url(re.compile(rf"/jobs/new/{other}/\?.*seed=7"))
        expect(page.get_by_role("heading", level=1, name=METHODS[other].label)).to_be_visible()
        expect(page.locator("[name=seed]")).to_have_value("7")
        own = {one.name for one in fields(METHODS[other].config_class())}
        assert {str(one.get_attribute("name")) for one in page.locator("#job-form [name]").all()} >= own


def test_a_base_model_is_quantized_at_two_widths_and_the_study_shows_both(
    stack: RunningStack, browser: Browser
) -> None:
    for name in ("shakespeare-calibration", "shakespeare-heldout"):
        if name not in stack.drive("sets"):
            stack.drive("sample_set", name=name, kind="text")
    base = stack.finish(stack.drive("import_checkpoint", folder="base", name="plain-base"))["checkpoint"]
    stack.finish(stack.drive("import_checkpoint", folder="variant", name="plain", base=base))
    engineer = Person(browser, stack.status()["address"], "engineer")
    engineer.visit("/registry/checkpoints/plain-base/")
    engineer.click("Compare methods", "link")
    only_what_fits_is_offered(engineer)
    ask_for_a_study(engineer)
    follow_the_study(engineer)
    what_a_width_made_stands_alone(engineer)
    assert engineer.complaints == []


def only_what_fits_is_offered(engineer: Person) -> None:
    """As soon as another model is chosen, without a word from the person."""
    ways = engineer.page.locator("#ways")
    expect(ways.get_by_role("rowheader", name="GPTQ", exact=True)).to_be_visible()
    expect(ways.get_by_role("rowheader", name="BitDelta")).to_have_count(0)
    engineer.choose("Model", re.compile("^plain$"))
    expect(ways.get_by_role("rowheader", name="BitDelta")).to_be_visible()
    engineer.choose("Model", re.compile("^plain-base$"))
    expect(ways.get_by_role("rowheader", name="BitDelta")).to_have_count(0)


def ask_for_a_study(engineer: Person) -> None:
    engineer.choose("Calibration text", re.compile("shakespeare-calibration"))
    engineer.choose("Text set", re.compile("shakespeare-heldout"))
    for width in ("8 bits", "4 bits"):
        engineer.page.get_by_role("checkbox", name=f"GPTQ, {width}").check()
    engineer.page.locator("#more-settings summary").click()
    for label, value in (("Windows", "6"), ("Tokens to add", "4")):
        engineer.fill(label, value)
    preview = engineer.page.locator("#preview")
    expect(preview.get_by_role("row").filter(has_text="GPTQ, 8 bits")).to_be_visible()
    expect(preview).to_contain_text("It fits")
    engineer.click("Queue the study")
    expect(engineer.page.get_by_role("heading", level=1)).to_contain_text("Study")


def follow_the_study(engineer: Person) -> None:
    """The page follows by itself: compressions, then the evaluations that nobody had to ask for."""
    main = engineer.page.get_by_role("main")
    expect(main).to_contain_text("2 of 2 measured", timeout=4 * JOB_SECONDS * 1000)
    expect(main).to_contain_text("complete")
    table = main.get_by_role("table").last
    four, eight = (table.get_by_role("row").filter(has_text=f"GPTQ, {bits} bits") for bits in (4, 8))
    expect(four).to_contain_text(re.compile(r"4\.\d"))
    expect(eight).to_contain_text(re.compile(r"8\.\d"))
    for row in (four, eight):
        expect(row).to_contain_text(re.compile(r"\d %"))  # the agreement
        expect(row).to_contain_text(re.compile(r"\d s|min"))
    expect(main.locator("figure svg path.join")).to_have_count(2)


def what_a_width_made_stands_alone(engineer: Person) -> None:
    engineer.page.get_by_role("main").get_by_role("table").last.get_by_role("link", name="GPTQ, 4 bits").click()
    main = engineer.page.get_by_role("main")
    expect(main).to_contain_text("it holds the whole model")
    expect(main.get_by_role("heading", name="Proxy loss, matrix by matrix")).to_be_visible()
    expect(main).to_contain_text("Relative proxy loss between")


def test_pages_can_be_read_without_javascript(stack: RunningStack, browser: Browser, tmp_path: Path) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        sign_in(page, stack.status()["address"], "viewer", PASSWORD)
        for place in ("Registry", "Jobs", "Evaluations", "Approvals", "Releases", "Workers", "Storage", "History"):
            page.get_by_role("navigation", name="Places").get_by_role("link", name=place).click()
            expect(page.get_by_role("heading", level=1)).to_be_visible()
