"""An agent as a real `serve` process, and waiting for what it does."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import aiohttp

WEBHOOK_KEY = "the-webhook-key"
ADMIN_TOKEN = "the-admin-token"
_T = TypeVar("_T")
TERMINAL = {"succeeded", "failed", "cancelled"}


class Process(Protocol):
    """What is asked of an agent's process: asyncio's has it, and so has one that was forked."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def kill(self) -> None: ...
    def send_signal(self, number: int, /) -> None: ...
    async def wait(self) -> int: ...


class AgentProcess:
    """One `ovation-agent serve`, its log and its API."""

    def __init__(self, process: Process, log: Path) -> None:
        self.process = process
        self.log = log
        self.address = ""

    @classmethod
    async def start(cls, environment: dict[str, str], log: Path) -> AgentProcess:
        """Start the agent and wait until it listens.

        Raises:
            AssertionError: it ended, or did not listen in time; carries its log.
        """
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "agent", "serve", env=environment, stdin=asyncio.subprocess.DEVNULL, stderr=stderr
            )
        return await cls(process, log).listening()

    async def listening(self) -> Self:
        """Wait until the agent listens.

        Raises:
            AssertionError: it ended, or did not listen in time; carries its log.
        """
        process, log = self.process, self.log
        deadline = time.monotonic() + 60
        while not (started := [each for each in self.events("agent_started") if each["pid"] == process.pid]):
            assert process.returncode is None, f"the agent ended with {process.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the agent does not listen:\n{log.read_text()}"
            await asyncio.sleep(0.02)
        self.address = started[-1]["address"]
        return self

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the log's lines, of one event if named."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if name is None or line.get("event") == name]

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Call the agent's API as its administrator; return the status and the JSON."""
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}", **options.pop("headers", {})}
        async with (
            aiohttp.ClientSession(self.address) as http,
            http.request(method, path, headers=headers, **options) as response,
        ):
            is_json = response.content_type == "application/json"
            return response.status, await response.json() if is_json else await response.text()

    async def jobs(self, activity_id: str) -> list[dict[str, Any]]:
        """Return an Activity's jobs, newest first."""
        _, answer = await self.call("GET", "/api/jobs", params={"activity_id": activity_id})
        found: list[dict[str, Any]] = answer["jobs"]
        return found

    async def job(self, activity_id: str, *, run: int = 1, states: set[str] | None = None) -> dict[str, Any]:
        """Wait until a run of an Activity is in one of these states (by default: has ended) and return it."""
        wanted = states or TERMINAL

        async def look() -> dict[str, Any] | None:
            for job in await self.jobs(activity_id):
                if job["run"] == run and job["state"] in wanted:
                    return job
            return None

        return await until(look, f"run {run} of {activity_id} in {sorted(wanted)}", self.log)

    async def why(self, activity_id: str, words: str) -> list[str]:
        """Wait until an Activity's judgement has these words, and return its reasons."""

        async def look() -> list[str] | None:
            _, answer = await self.call("GET", f"/api/activities/{activity_id}")
            reasons: list[str] = answer.get("reasons", [])
            return reasons if any(words in reason for reason in reasons) else None

        return await until(look, f"a reason with the words {words!r}", self.log)

    async def kill(self) -> None:
        """Kill the agent without a chance to say goodbye."""
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        """Ask the agent to stop, and return its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 30)


async def until(look: Callable[[], Awaitable[_T | None]], what: str, log: Path, seconds: float = 60) -> _T:
    """Look again and again until there is something, and return it."""
    deadline = time.monotonic() + seconds
    while (found := await look()) is None:
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{log.read_text()[-8000:]}"
        await asyncio.sleep(0.05)
    return found


@asynccontextmanager
async def running_agent(
    sandbox_environment: dict[str, str], directory: Path, **settings: str
) -> AsyncIterator[AgentProcess]:
    """Run an agent against a sandbox; whatever happens, it is stopped and nothing of it is left."""
    environment = agent_environment(sandbox_environment, directory, **settings)
    agent = await AgentProcess.start(environment, directory / "agent.log")
    try:
        yield agent
    finally:
        if agent.process.returncode is None:
            await agent.stop()
        assert not (said := secrets_in((directory / "agent.log").read_text(), environment)), said
        await _stop_postgres(directory / "data" / "postgres" / "postmaster.pid")


def secrets_in(log: str, environment: dict[str, str]) -> list[str]:
    """Return the lines of an agent's log that hold one of its secrets, or what only a signed address has."""
    secret = re.compile(r"TOKEN|SECRET|PASSWORD|WEBHOOK_USERNAME|PUBLIC_KEY")
    values = {value for name, value in environment.items() if secret.search(name) and len(value) > 5}
    signed = re.compile(r"X-Amz-(?:Signature|Security-Token|Credential)=(?!\[redacted\])|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.")
    return [line for line in log.splitlines() if signed.search(line) or any(value in line for value in values)]


async def _stop_postgres(pid_file: Path) -> None:
    """End the embedded PostgreSQL that an agent left which was killed and not started again."""
    if not pid_file.exists():
        return
    os.kill(int(pid_file.read_text().splitlines()[0]), signal.SIGINT)  # PostgreSQL's fast shutdown

    async def gone() -> bool | None:
        return None if pid_file.exists() else True

    await until(gone, "PostgreSQL's end", pid_file.with_name("log"))


def agent_environment(sandbox_environment: dict[str, str], directory: Path, **settings: str) -> dict[str, str]:
    """Return what an agent needs, and nothing of the environment that the tests run in."""
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        **sandbox_environment,
        "AGENT_PORT": "0",
        "AGENT_DATA_DIR": str(directory / "data"),
        "AGENT_WEBHOOK_USERNAME": WEBHOOK_KEY,
        "AGENT_WEBHOOK_PASSWORD": WEBHOOK_KEY,
        "AGENT_ADMIN_TOKEN": ADMIN_TOKEN,
        "AGENT_SETTLE_SECONDS": "0.2",
        "AGENT_DRAIN_SECONDS": "5",  # a test that ends waits for nobody
        **settings,
    }
