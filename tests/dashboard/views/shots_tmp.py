import os

os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
from playwright.sync_api import sync_playwright
from django.test import Client
from tests.dashboard.views.pages import addresses
from dashboard.lifecycle import Role
from dashboard.models import Deployment
import pytest

ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.mark.django_db(transaction=True)
def test_shots(live_server, world, client_as):
    os.makedirs("/tmp/shots", exist_ok=True)
    from tests.factories import deploy

    deploy(world.production, world.variant, rollback=True)
    deploy(world.production, world.variant, world.approval)
    want = os.environ.get("PAGES", "").split(",") if os.environ.get("PAGES") else None
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=ARGS)
        for label, role, width, scheme, lang in [
            tuple(x.split(":")) for x in os.environ.get("MODES", "light:engineer:1280:light:en").split(",")
        ]:
            client = client_as(Role(role))
            u = client.user
            u.language = lang
            u.save()
            ctx = browser.new_context(viewport={"width": int(width), "height": 850}, color_scheme=scheme)
            ctx.add_cookies([{"name": "sessionid", "value": client.cookies["sessionid"].value, "url": live_server.url}])
            page = ctx.new_page()
            page.on("console", lambda m: print("CONSOLE", m.type, m.text))
            page.on("pageerror", lambda m: print("PAGEERROR", m))
            urls = addresses(world)
            urls["job-running"] = urls["job-detail"].replace(str(world.job.pk), str(world.running.pk))
            urls["job-failed"] = urls["job-detail"].replace(str(world.job.pk), str(world.failed.pk))
            urls["approval-approved"] = urls["approval-detail"].replace(str(world.pending.pk), str(world.approval.pk))
            urls.pop("job-log-download")
            for name, url in urls.items():
                if want and name not in want:
                    continue
                r = page.goto(live_server.url + url)
                if r.status != 200:
                    continue
                page.wait_for_timeout(150)
                over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                if over > 0:
                    print("OVERFLOW", label, name, over)
                page.screenshot(path=f"/tmp/shots/{label}-{name}.png", full_page=True)
            ctx.close()
        ctx = browser.new_context(viewport={"width": 1280, "height": 700})
        page = ctx.new_page()
        page.goto(live_server.url + "/sign-in/")
        page.screenshot(path="/tmp/shots/sign-in.png")
        browser.close()
