"""The one object that a test of the chaos suite uses: Ovation's side, agents that come and go, and the promise."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import shlex
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from agent.adapters.apptainer import find_program
from agent.db.database import Database
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import SandboxSettings, WebhookSettings
from tests.agents import WEBHOOK_KEY, AgentProcess, agent_environment
from tests.chaos.points import Plan
from tests.chaos.promise import Expected, Scene, check_promise
from tests.chaos.recovery import PROMISED_SECONDS, Recovery, note
from tests.chaos.remains import processes_of
from tests.chaos.work import SMALL, Work
from tests.chaos.zygote import Life, Zygote
from tests.conftest import fresh_database
from tests.lab import Lab

_PATIENCE_SECONDS = 180.0  # for the figure in the table, when the promise is broken
# Below those that the kernel gives to connections: an agent's port is free again for its next life. Each process that
# runs tests has its own.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(
    random.sample(range(20_000 + _PROCESS, 32_000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))), k=1000)
)


class Agent(AgentProcess):
    """One life of an agent."""

    def __init__(self, life: Life, log: Path, record: Path) -> None:
        super().__init__(life, log)
        self._record = record

    async def died(self, seconds: float) -> bool:
        """Wait for its end, but not for longer than that; return whether it has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.process.wait()
        return self.process.returncode is not None

    @property
    def points(self) -> list[str]:
        """The points that it has reached, in order; none unless they are recorded."""
        return self._record.read_text().splitlines() if self._record.exists() else []


class Chaos:
    """A Project in Ovation, a database, and agents by name, each with a data directory and an address of its own.

    `settings` are the agents' environment, `environment` is where they find Ovation and the object store: put the
    addresses of a proxy there to have one in between.
    """

    def __init__(self, lab: Lab, zygote: Zygote, database_url: str, settings: Mapping[str, str]) -> None:
        self.lab = lab
        self.database_url = database_url
        self.directory = lab.directory
        self.environment = lab.sandbox.environment()
        self.settings = dict(settings)
        self.expected: dict[str, Expected] = {}
        self.agents: dict[str, Agent] = {}
        self.logs: list[Path] = []
        self.faults = 0
        self._zygote = zygote
        self._ports: dict[str, int] = {}
        self._activities = itertools.count(1)
        self._lives = itertools.count(1)
        self._cleared = time.monotonic()
        self._image = lab.image()
        self._starts = self.directory / "starts"
        self._programs = _counting_apptainer(self.directory / "bin", self._starts)

    def activity(self, work: Work = SMALL, *, inputs: Sequence[str] = ()) -> str:
        """Make an Activity that does this work, as a person would, and expect what it should come to.

        `inputs` are further Revisions that it works on.
        """
        name = f"Activity {next(self._activities)}"
        activity_id = self.lab.activity(work.script(name), inputs=list(inputs), related=[self._image], name=name)
        self.expected[activity_id] = Expected(work.files(name), state=work.state)
        return activity_id

    def begin(self, name: str = "a", *, record: bool = False, kill: str = "", occurrence: int = 1) -> Agent:
        """Begin the next life of an agent and return it at once, before it listens.

        Args:
            name: which agent; each has a data directory and an address of its own.
            record: note each failpoint that it reaches.
            kill: the failpoint at which it dies.
            occurrence: at which time that it is reached.
        """
        home = self.directory / name
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        log = home / f"{next(self._lives)}.log"
        log.touch()
        self.logs.append(log)
        self._listen(name)
        points = log.with_suffix(".points")
        plan = Plan(
            record=str(points) if record else "",
            kill=kill,
            occurrence=occurrence,
            places={"data": str(self.data_dir(name)), "tmp": str(home / "tmp")},
            hosts=self._hosts(),
        )
        life = self._zygote.start(self._environment(name), home, log, plan)
        self._cleared = time.monotonic()
        self.agents[name] = Agent(life, log, points)
        return self.agents[name]

    async def start(self, name: str = "a", **points: Any) -> Agent:
        """Begin the next life of an agent as `begin` does, and wait until it listens."""
        return await self.begin(name, **points).listening()

    async def kill(self, name: str = "a") -> None:
        """Kill an agent without a chance to say goodbye."""
        await self.agents[name].kill()
        self.faults += 1

    async def stop(self) -> None:
        """Ask the agents that live to stop, and wait for it."""
        await asyncio.gather(*(agent.stop() for agent in self.agents.values()))

    def fault_cleared(self) -> None:
        """Say that a fault, other than an agent that was not there, is over as of now; recovery is measured from it."""
        self._cleared = time.monotonic()
        self.faults += 1

    def data_dir(self, name: str = "a") -> Path:
        """Return an agent's data directory."""
        return self.directory / name / "data"

    @asynccontextmanager
    async def database(self) -> AsyncIterator[asyncpg.Connection]:
        """Lend a connection of the test's own."""
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    async def recovered(self, scenario: str) -> float:
        """Wait until every run has ended; note and return how many seconds after the last fault that was.

        Raises:
            AssertionError: it took longer than promised.
        """
        async with self.database() as connection:
            while (left := await self._left(connection)) and self._passed() < _PATIENCE_SECONDS:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        seconds = self._passed()
        note(Recovery(scenario, self.faults, len(self.expected), seconds))
        assert seconds <= PROMISED_SECONDS, f"{scenario}: not within {PROMISED_SECONDS:.0f} s, {left or 'but then'}"
        return seconds

    async def check(self) -> None:
        """Check the promise: see `tests.chaos.promise`."""
        await check_promise(self.scene(), self.expected)

    def scene(self) -> Scene:
        """Return where the promise is to be seen."""
        alive = frozenset(agent.process.pid for agent in self.agents.values() if agent.process.returncode is None)
        homes = [self.directory / name for name in self.agents]
        return Scene(
            lab=self.lab,
            database_url=self.database_url,
            directory=self.directory,
            data_dirs=[home / "data" for home in homes],
            temporary=[home / "tmp" for home in homes],
            starts=self._starts,
            agents=alive,
            logs=self.logs,
        )

    async def close(self) -> None:
        """End everything that runs, also what should not."""
        for agent in self.agents.values():
            agent.process.kill()
            await agent.process.wait()
        for pid in processes_of(self.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def _passed(self) -> float:
        return time.monotonic() - self._cleared

    async def _left(self, connection: asyncpg.Connection) -> list[str]:
        """Say which runs have not ended, or not begun."""
        ended = dict(
            await connection.fetch(
                "SELECT activity_id, count(*) FROM jobs WHERE finished_at IS NOT NULL GROUP BY activity_id"
            )
        )
        states = dict(await connection.fetch("SELECT activity_id, state FROM jobs WHERE finished_at IS NULL"))
        return [
            f"{activity_id} {states.get(activity_id, 'has no job')}"
            for activity_id, wanted in self.expected.items()
            if ended.get(activity_id, 0) < wanted.runs or activity_id in states
        ]

    def _listen(self, name: str) -> None:
        """Give an agent an address that it keeps, and have Ovation send its webhooks there."""
        if name not in self._ports:
            self._ports[name] = _free_port()
            url = f"http://127.0.0.1:{self._ports[name]}/webhooks/ovation"
            self.lab.sandbox.admin.create_webhook(url, "Relation", api_key=WEBHOOK_KEY)

    def _environment(self, name: str) -> dict[str, str]:
        home = self.directory / name
        settings = {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "TMPDIR": str(home / "tmp"),
            "AGENT_DATABASE_URL": self.database_url,
            "AGENT_PORT": str(self._ports[name]),
            "AGENT_MAX_RUNNING": "4",
            "AGENT_KEEP_SECONDS": "0",
            "AGENT_KEEP_FAILED_SECONDS": "0",
            **self.settings,
        }
        return agent_environment(self.environment, home, **settings)

    def _hosts(self) -> dict[str, str]:
        environment = self.environment
        return {
            environment["OVATION_API_URL"]: "api",
            environment["OVATION_HOSTS"]: "files",
            environment["AWS_ENDPOINT_URL_S3"]: "store",
        }


@asynccontextmanager
async def chaos(directory: Path, zygote: Zygote, server_url: str, **settings: str) -> AsyncIterator[Chaos]:
    """Open the harness on a fresh database of a server; at its end nothing of it runs any more.

    `settings` are environment variables that every agent gets.
    """
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    webhooks = WebhookSettings(research_backoff_seconds=lambda attempt: min(2.0, 0.25 * 2**attempt))
    async with fresh_database(server_url) as url:
        database = await Database.open(url, "the chaos suite's database")
        try:
            await database.migrate()
        finally:
            await database.close()
        async with Sandbox(directory / "sandbox", settings=SandboxSettings(webhooks=webhooks)) as sandbox:
            opened = Chaos(Lab(sandbox, directory), zygote, url, settings)
            server = logging.getLogger("aiohttp.server")
            level = server.level
            server.setLevel(logging.CRITICAL)  # it tells of each client that dies
            try:
                yield opened
            finally:
                server.setLevel(level)
                await opened.close()


def _counting_apptainer(programs: Path, record: Path) -> Path:
    """Put an `apptainer` into a directory that notes each start of a container, then becomes the real one.

    It is what tells, independently of all that the agent writes and removes, how often a container was started.
    """
    programs.mkdir()
    script = programs / "apptainer"
    script.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" run "*) printf "%s\\n" "$*" >> {shlex.quote(str(record))} ;; esac\n'
        f'exec {shlex.quote(str(find_program()))} "$@"\n'
    )
    script.chmod(0o755)
    return programs


def _free_port() -> int:
    while True:
        port = next(_PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
