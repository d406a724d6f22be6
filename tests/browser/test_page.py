"""The page, in a real Chromium on a real agent."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from tests.agents import ADMIN_TOKEN, AgentProcess, agent_environment
from tests.lab import Lab, laboratory

pytestmark = pytest.mark.asyncio(loop_scope="module")
SHOTS = os.environ.get("SCREENSHOTS")
"""A directory to keep pictures in, for whoever wants to look."""
PHONE = {"width": 390, "height": 844}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with laboratory(tmp_path_factory.mktemp("page")) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    program = shutil.which("chromium")
    assert program, "Chromium is missing: `make setup-dev` installs it"
    async with async_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = await playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        await browser.close()


@asynccontextmanager
async def opened(browser: Browser, lab: Lab, **options: Any) -> AsyncIterator[Page]:
    """Open a page as a new visitor; whatever the browser complains of fails the test."""
    context = await browser.new_context(base_url=lab.agent.address, **options)
    page = await context.new_page()
    complaints: list[str] = []

    def noted(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.location["url"].endswith("/favicon.ico"):  # asked for by plain text
            complaints.append(message.text)

    page.on("console", noted)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    yield page
    assert not complaints
    assert all(url.startswith(lab.agent.address) for url in asked), asked
    await context.close()


async def sign_in(page: Page, path: str = "/") -> None:
    await page.goto(path)
    await expect(page).to_have_title(re.compile("Sign in"))
    await page.get_by_label("Admin token").fill(ADMIN_TOKEN)
    await page.keyboard.press("Enter")
    await expect(page).not_to_have_title(re.compile("Sign in"))


async def picture(page: Page, name: str) -> None:
    if SHOTS:
        await page.screenshot(path=Path(SHOTS, f"{name}.png"), full_page=True)


async def test_a_job_is_followed_live_from_its_webhook_to_its_outputs(lab: Lab, browser: Browser) -> None:
    async with opened(browser, lab) as page:
        await sign_in(page)
        await expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
        script = "echo first line; echo a complaint >&2; sleep 4; echo last line; echo x > /outputs/found.txt"
        activity_id = lab.activity(script, name="Penguins <b>& co")
        row = page.get_by_role("row").filter(has_text="Penguins <b>& co")
        await expect(row).to_be_visible(timeout=20_000)  # without a reload
        await expect(row).to_contain_text("running", timeout=30_000)
        await picture(page, "jobs-running")
        await row.get_by_role("link").click()
        await expect(page.locator("#log")).to_contain_text("first line", timeout=20_000)
        await expect(page.locator("h1")).to_contain_text("running")
        await picture(page, "job-running")
        await expect(page.locator("#log")).to_contain_text("last line", timeout=20_000)
        await expect(page.locator("h1")).to_contain_text("succeeded", timeout=30_000)
        await expect(page.get_by_role("img", name=re.compile("queued.*staging.*running"))).to_be_visible()
        await picture(page, "job-succeeded")
        await page.get_by_role("link", name="stderr").click()
        await expect(page.locator("#log")).to_contain_text("a complaint")
        assert "found.txt" in await lab.outputs(activity_id)


async def test_cancel_and_run_again_by_keyboard(lab: Lab, browser: Browser) -> None:
    activity_id = lab.activity("sleep 60", name="Sleeper")
    job = await lab.agent.job(activity_id, states={"running"})
    async with opened(browser, lab) as page:
        await sign_in(page, f"/page/jobs/{job['id']}")  # after signing in, the person is where they wanted to be
        await page.locator("#cancel summary").focus()
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("button", name="End this run")).to_be_focused()
        before = await page.locator(".now").text_content()
        await expect(page.locator(".now")).not_to_have_text(before or "")  # drawn anew: what was opened stays open
        await expect(page.get_by_role("button", name="End this run")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("h1")).to_contain_text("cancelled", timeout=30_000)
        await page.locator("#rerun summary").click()
        await page.get_by_role("button", name="Run again").click()
        await expect(page.locator("h1")).to_contain_text("run 2", timeout=20_000)
    await lab.agent.call("POST", f"/api/jobs/{(await lab.agent.jobs(activity_id))[0]['id']}/cancel")
    await lab.agent.job(activity_id, run=2)


async def test_what_failed_and_what_waits_say_why(lab: Lab, browser: Browser) -> None:
    job, _ = await lab.run("echo 'no such column' >&2; exit 3", name="Broken")
    lab.activity("true", related=[], name="No image")
    async with opened(browser, lab, viewport=PHONE, color_scheme="dark") as page:
        await sign_in(page)
        row = page.get_by_role("row").filter(has_text="Broken")
        await expect(row).to_contain_text("user code")
        await expect(row).to_contain_text("3")
        await expect(page.get_by_text("no related file is a compute image")).to_be_visible(timeout=20_000)
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], "a phone would have to scroll sideways"
        await picture(page, "jobs-phone-dark")
        await page.goto(f"/page/jobs/{job['id']}")
        await expect(page.get_by_role("alert")).to_contain_text("user code")
        assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        await picture(page, "job-phone-dark")


async def test_an_agent_that_goes_away_is_told_and_found_again(tmp_path: Path, browser: Browser) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    async with laboratory(tmp_path, AGENT_PORT=port) as lab:
        page = await browser.new_page(base_url=lab.agent.address)
        await sign_in(page)
        await expect(page.get_by_role("status")).to_have_text("live")
        await lab.agent.stop()
        await expect(page.get_by_role("status")).to_have_text("no connection: trying again")
        environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent", AGENT_PORT=port)
        again = await AgentProcess.start(environment, lab.directory / "again.log")
        try:
            await expect(page.get_by_role("status")).to_have_text("live", timeout=20_000)
            lab.activity("true", name="After it came back")
            again_row = page.get_by_role("row").filter(has_text="After it came back")
            await expect(again_row).to_contain_text("succeeded", timeout=60_000)
        finally:
            await page.close()
            await again.stop()


async def test_without_scripts_the_page_is_whole(lab: Lab, browser: Browser) -> None:
    job, _ = await lab.run("echo said", name="Plain")
    async with opened(browser, lab, java_script_enabled=False) as page:
        await sign_in(page)
        await page.get_by_role("link", name="Plain, run 1").click()
        await expect(page.locator("h1")).to_contain_text("succeeded")
        await page.get_by_role("link", name="whole, as text").click()
        await expect(page.locator("body")).to_contain_text("said")
    assert job["state"] == "succeeded"


async def test_the_wrong_token(lab: Lab, browser: Browser) -> None:
    context = await browser.new_context(base_url=lab.agent.address)
    page = await context.new_page()
    await page.goto("/")
    await page.get_by_label("Admin token").fill("not-it")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_have_text("That is not the admin token.")
    await picture(page, "sign-in")
    await context.close()


async def test_what_stands_against_it_is_a_page(lab: Lab, browser: Browser) -> None:
    context = await browser.new_context(base_url=lab.agent.address)
    page = await context.new_page()
    await sign_in(page)
    await page.goto("/page/jobs/8d1b2a5e-7d5c-4f0a-9c3e-0e6a4a4ce0f1")
    await expect(page.get_by_role("alert")).to_have_text("no such job")
    job, _ = await lab.run("true", name="Signed out meanwhile")
    await page.goto(f"/page/jobs/{job['id']}")
    await context.clear_cookies()
    await page.locator("#rerun summary").click()
    await page.get_by_role("button", name="Run again").click()
    await expect(page).to_have_title(re.compile("Sign in"))
    assert len(await lab.agent.jobs(job["activity_id"])) == 1
    await context.close()


async def test_a_machine_that_is_being_emptied_says_so(lab: Lab, browser: Browser) -> None:
    async with opened(browser, lab) as page:
        await sign_in(page)
        await lab.agent.call("POST", "/api/admission/stop")
        try:
            await expect(page.get_by_role("alert")).to_contain_text("No queued job is let in here")
        finally:
            await lab.agent.call("POST", "/api/admission/start")
        await expect(page.get_by_role("alert")).to_have_count(0)


async def test_another_site_cannot_press_a_button(lab: Lab) -> None:
    activity_id = lab.activity("sleep 60", name="Not theirs")
    job = await lab.agent.job(activity_id, states={"running"})
    target = f"/page/jobs/{job['id']}/cancel"
    jar = aiohttp.CookieJar(unsafe=True)  # so aiohttp calls one that keeps cookies of an IP address
    async with aiohttp.ClientSession(lab.agent.address, cookie_jar=jar) as http:
        async with http.post("/page/login", data={"token": ADMIN_TOKEN}, allow_redirects=False) as answer:
            assert answer.status == 303
            cookie = answer.headers["Set-Cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=Lax" in cookie  # a link in a mail opens the page, and no other site can send a form
        async with http.get(f"/page/jobs/{job['id']}") as answer:
            token = re.findall(r'name="form_token" value="([0-9a-f]+)"', await answer.text())[0]
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        for form, headers in (
            ({}, {}),
            ({"form_token": "0" * 64}, {}),
            ({"form_token": token}, {"Sec-Fetch-Site": "cross-site"}),
        ):
            async with http.post(target, data=form, headers=headers) as answer:
                assert answer.status == 403, (form, headers)
        assert (await lab.agent.jobs(activity_id))[0]["cancel_requested"] is False
        async with http.post(target, data={"form_token": token}, headers={"Sec-Fetch-Site": "same-origin"}) as answer:
            assert answer.status == 200
    await lab.agent.job(activity_id)


async def test_nothing_is_shown_to_whoever_has_not_signed_in(lab: Lab) -> None:
    job, _ = await lab.run("echo secret-of-the-lab", name="Private")
    paths = (f"/page/jobs/{job['id']}/log/stdout", "/page/changes", f"/page/changes?job={job['id']}")
    async with aiohttp.ClientSession(lab.agent.address) as http:
        for cookie in ("", "x", "1.a.b", "99999999999.x.0000"):
            headers = {"Cookie": f"ovation-agent-session={cookie}", "Accept": "text/html"}
            for path in paths:
                async with http.get(path, headers=headers) as answer:
                    assert answer.status == 401, path
            for path in ("/", f"/page/jobs/{job['id']}"):
                async with http.get(path, headers=headers, allow_redirects=False) as answer:
                    assert answer.status == 303, path
                    assert answer.headers["Location"].startswith("/page/login?next=")
        for elsewhere in ("https://evil.example", "//evil.example", "/page/jobs/\\\\evil", "javascript:alert(1)"):
            form = {"token": ADMIN_TOKEN, "next": elsewhere}
            async with http.post("/page/login", data=form, allow_redirects=False) as answer:
                location = answer.headers["Location"]
                assert location == "/" or location.startswith("/page/jobs/"), elsewhere
        async with http.get("/") as answer:  # a program still gets what it always got
            assert await answer.json() == {"status": "alive"}
