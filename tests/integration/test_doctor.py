"""`doctor`: every check says what it found, and what to do when that is not good. Never a secret."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent.sandbox.faults import FaultKind
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import SandboxSettings
from tests.agents import ADMIN_TOKEN, WEBHOOK_KEY, agent_environment, running_agent
from tests.workers import make_job, migrated

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHECKS = [
    *("webhooks", "data directory", "database", "containers", "images", "limits", "Ovation", "token", "object store"),
    *("clock", "deliveries", "agent"),
]


_DAYS = 30 * 86_400.0


class Report(NamedTuple):
    """What `doctor` said, by check; a finding is (good, found, remedy)."""

    code: int
    findings: dict[str, tuple[bool, str, str]]
    text: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path_factory.mktemp("sandbox"), settings=SandboxSettings(token_seconds=_DAYS)) as running:
        yield running


@pytest.fixture
def environment(sandbox: Sandbox, tmp_path: Path, server_url: str) -> dict[str, str]:
    """Return what an agent needs; the database is empty."""
    return agent_environment(sandbox.environment(), tmp_path, AGENT_DATABASE_URL=server_url)


async def examined(environment: dict[str, str]) -> Report:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent", "doctor"),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 100)
    text = out.decode()
    assert err == b"", err.decode()
    for name, value in environment.items():
        if name.endswith(("TOKEN", "SECRET", "PASSWORD")) and len(value) > 5:
            assert value not in text, f"{name} is shown"
    assert WEBHOOK_KEY not in text
    findings: dict[str, tuple[bool, str, str]] = {}
    for line in text.splitlines():
        if line.startswith("     → "):
            last = list(findings)[-1]
            findings[last] = (*findings[last][:2], line.removeprefix("     → "))
        else:
            mark, _, rest = line.partition(" ")
            name, _, found = rest.strip().partition(": ")
            findings[name] = (mark == "ok", found, "")
    assert list(findings) == CHECKS
    assert all(bool(remedy) != good for good, _, remedy in findings.values())
    assert process.returncode == (0 if all(good for good, _, _ in findings.values()) else 1)
    return Report(process.returncode, findings, text)


def failing(report: Report) -> list[str]:
    return [name for name, (good, _, _) in report.findings.items() if not good]


async def test_all_is_well(sandbox: Sandbox, tmp_path: Path) -> None:
    report = await examined(agent_environment(sandbox.environment(), tmp_path))
    assert report.code == 0, report.text
    assert "(embedded), schema up to date" in report.findings["database"][1]
    assert "pptainer" in report.findings["containers"][1]
    assert report.findings["Ovation"][1] == f"{sandbox.api_url}: 0 projects in organization 0"
    assert sandbox.s3_url in report.findings["object store"][1]
    assert "GiB free" in report.findings["data directory"][1]
    assert report.findings["token"][1].startswith("of a service account with read:global, write:global, good until 2")
    assert report.findings["deliveries"][1] == "none has come yet"


async def test_anonymous_webhooks_are_mentioned(environment: dict[str, str]) -> None:
    del environment["AGENT_WEBHOOK_USERNAME"], environment["AGENT_WEBHOOK_PASSWORD"]
    report = await examined({**environment, "AGENT_WEBHOOK_ANONYMOUS": "true"})
    good, found, _ = report.findings["webhooks"]
    assert good
    assert "from anybody" in found
    report = await examined(environment)
    good, found, remedy = report.findings["webhooks"]
    assert (good, found) == (False, "no credentials are set: `serve` will not start")
    assert "AGENT_WEBHOOK_USERNAME" in remedy


async def test_a_data_directory_that_cannot_be_written(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = await examined({**environment, "AGENT_DATA_DIR": str(tmp_path / "file" / "data")})
    good, found, remedy = report.findings["data directory"]
    assert (good, found) == (False, f"{tmp_path}/file/data cannot be written")
    assert "AGENT_DATA_DIR" in remedy


async def test_a_given_database_without_the_schema(environment: dict[str, str]) -> None:
    report = await examined(environment)
    assert failing(report) == ["database"]
    _, found, remedy = report.findings["database"]
    assert "is at version 0" in found
    assert "ovation-agent migrate" in remedy


async def test_a_database_that_is_away(environment: dict[str, str]) -> None:
    report = await examined(
        {**environment, "AGENT_DATABASE_URL": f"postgresql://a:hunter2@127.0.0.1:{closed_port()}/b"}
    )
    assert failing(report) == ["database"]
    assert "cannot be reached" in report.findings["database"][1]
    assert "hunter2" not in report.text


async def test_no_apptainer(environment: dict[str, str], tmp_path: Path) -> None:
    report = await examined({**environment, "PATH": str(tmp_path)})
    assert "containers" in failing(report)
    _, found, remedy = report.findings["containers"]
    assert "Neither apptainer nor singularity is on PATH" in found
    assert "make setup" in remedy


async def test_an_apptainer_that_does_not_work(environment: dict[str, str], tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "apptainer"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\necho 'apptainer version 1.4.5'\n[ \"$1\" = --version ] || { echo 'FATAL: no' >&2; exit 255; }\n"
    )
    fake.chmod(0o755)
    report = await examined({**environment, "PATH": f"{fake.parent}:{os.environ['PATH']}"})
    assert "containers" in failing(report)
    assert "cannot run a container here" in report.findings["containers"][1]


async def test_a_token_that_is_refused(environment: dict[str, str]) -> None:
    report = await examined({**environment, "OVATION_TOKEN": "not-a-token-at-all"})
    assert "Ovation" in failing(report)
    assert "401" in report.findings["Ovation"][1]
    assert "OVATION_TOKEN" in report.findings["Ovation"][2]


async def test_no_token(environment: dict[str, str]) -> None:
    report = await examined({**environment, "OVATION_TOKEN": ""})
    assert "no token" in report.findings["Ovation"][1]


async def test_a_service_account(environment: dict[str, str], sandbox: Sandbox) -> None:
    account = {
        "OVATION_TOKEN": "",
        "OVATION_CLIENT_ID": sandbox.tokens.client_id,
        "OVATION_CLIENT_SECRET": sandbox.tokens.client_secret,
        "OVATION_AUTH_DOMAIN": sandbox.auth_url,
    }
    assert "Ovation" not in failing(await examined({**environment, **account}))
    report = await examined({**environment, **account, "OVATION_CLIENT_SECRET": "a-wrong-secret"})
    assert "Ovation" in failing(report)

    assert (await examined({**environment, **account})).findings["token"][1].endswith("renewed by itself")


@pytest.mark.parametrize(
    ("scopes", "seconds", "words"),
    [
        ("read:global", _DAYS, "a service account without write:global"),
        ("read:global write:global", 86_400, "it expires on 2"),
        ("read:global write:global", -60, "it has expired on 2"),
    ],
)
async def test_a_token_that_will_not_do(
    scopes: str, seconds: float, words: str, environment: dict[str, str], sandbox: Sandbox
) -> None:
    token = sandbox.tokens.for_service(seconds, scopes)
    good, found, remedy = (await examined({**environment, "OVATION_TOKEN": token})).findings["token"]
    assert not good
    assert found.startswith(words)
    assert "read:global and write:global" in remedy


async def test_webhooks_that_do_not_come(environment: dict[str, str], database_url: str) -> None:
    environment = {**environment, "AGENT_DATABASE_URL": database_url}
    async with migrated(database_url) as database, database.connection() as connection:
        await make_job(database, "found-by-a-walk")
        await connection.execute("UPDATE jobs SET trigger = 'reconcile'")
        good, found, remedy = (await examined(environment)).findings["deliveries"]
        assert (good, "1 runs of the last day were found only by walks" in found) == (False, True)
        assert "webhooks test" in remedy
        await connection.execute(
            "INSERT INTO deliveries (source, entity_type, entity_id, received_at)"
            " VALUES ('webhook', 'Activity', 'a', now() - interval '3 hours')"
        )
        report = await examined(environment)
        assert report.findings["deliveries"][:2] == (True, "the last one came 3 hours ago")


async def test_ovation_away(environment: dict[str, str]) -> None:
    report = await examined({**environment, "OVATION_API_URL": f"http://127.0.0.1:{closed_port()}"})
    assert "cannot be reached" in report.findings["Ovation"][1]
    assert "OVATION_API_URL" in report.findings["Ovation"][2]


async def test_an_answer_that_gives_orders_to_the_terminal(environment: dict[str, str], sandbox: Sandbox) -> None:
    fault = sandbox.faults.add(
        FaultKind.STATUS,
        target="api",
        status=418,
        body=f"\x1b]0;owned\x07 Bearer {ADMIN_TOKEN} {environment['OVATION_TOKEN']}",
    )
    try:
        report = await examined(environment)
    finally:
        sandbox.faults.remove(fault.id)
    assert "Ovation" in failing(report)
    assert not {"\x1b", "\x07"} & set(report.text)


async def test_a_store_that_is_away(environment: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    report = await examined({**environment, "AWS_ENDPOINT_URL_S3": url})
    assert "object store" in failing(report)
    assert report.findings["object store"][1].startswith(f"{url} cannot be reached")
    assert "AWS_ENDPOINT_URL_S3" in report.findings["object store"][2]


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_a_clock_that_is_wrong(environment: dict[str, str]) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(headers={"Date": "Thu, 01 Jan 2026 00:00:00 GMT"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        report = await examined({**environment, "AWS_ENDPOINT_URL_S3": str(server.make_url("/")).rstrip("/")})
    good, found, remedy = report.findings["clock"]
    assert not good
    assert "s ahead of the object store's" in found
    assert "NTP" in remedy


async def test_the_agent_that_runs_and_one_that_does_not(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = agent_environment(sandbox.environment(), tmp_path)
    assert (await examined(environment)).findings["agent"][1] == "none runs on this data directory"
    async with running_agent(sandbox.environment(), tmp_path) as agent:
        report = await examined(environment)
        assert report.findings["agent"][:2] == (True, f"listens at {agent.address} and is ready")
        agent.process.send_signal(signal.SIGSTOP)
        try:
            report = await examined(environment)
        finally:
            agent.process.send_signal(signal.SIGCONT)
        assert report.findings["agent"][0] is False
        assert "does not answer" in report.findings["agent"][1]
