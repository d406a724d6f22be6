"""PostgreSQL cuts connections, is restarted, and is away: what was under way is gone on with."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.db.embedded import EmbeddedServer
from tests.chaos import harness
from tests.chaos.harness import Chaos
from tests.chaos.play import at_once
from tests.chaos.told import attempts, lines
from tests.chaos.work import SMALL, Work
from tests.chaos.zygote import Zygote

_AGENTS_CONNECTIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name = 'ovation-agent'"
)
_LEASE_SECONDS = 3


class Server:
    """A PostgreSQL server of a test's own, which it may stop and start."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._embedded = EmbeddedServer._start(directory)
        self.address = self._embedded.dsn

    async def stop(self, number: signal.Signals) -> None:
        """Stop it: SIGINT lets statements end with an error, SIGQUIT lets go of everything at once."""
        pid_file = self._directory / "postmaster.pid"
        pid = int(pid_file.read_text().splitlines()[0])
        os.kill(pid, number)
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110 another's process has no event
            await asyncio.sleep(0.01)

    async def start(self) -> None:
        """Start it again, at the same address."""
        await asyncio.to_thread(self._embedded._server.ensure_postgres_running)

    async def end(self) -> None:
        """Stop it for good."""
        await self._embedded.stop()


@contextmanager
def _server(directory: Path) -> Iterator[Server]:
    server = Server(directory)
    try:
        yield server
    finally:
        asyncio.run(server.end())


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with _server(tmp_path_factory.mktemp("own") / "postgres") as opened:
        yield opened


@pytest.mark.timeout(1800)
async def test_postgresql_is_not_always_there(
    tmp_path: Path, zygote: Zygote, embedded_url: str, server: Server, seed: int, *, long_form: bool
) -> None:
    rounds = 10 if long_form else 1

    async def cut() -> None:
        chance = random.Random(seed)  # noqa: S311 repeatable, not secret
        async with harness.chaos(tmp_path / "cut", zygote, embedded_url) as one:
            await one.start()
            for _ in range(rounds):
                await _cut(one, chance)

    async def restart() -> None:
        settings = {} if long_form else {"CHAOS_LEASE_SECONDS": str(_LEASE_SECONDS)}
        async with harness.chaos(tmp_path / "restart", zygote, server.address, **settings) as one:
            await one.start()
            for _ in range(rounds):
                await _restart(one, server, away_seconds=20 if long_form else _LEASE_SECONDS + 2)

    await at_once({"connections are cut": cut(), "the server is restarted": restart()})


async def _cut(one: Chaos, chance: random.Random) -> None:
    """Cut all connections of the agent, again and again, while Activities come."""
    async with one.database() as connection:
        for number in range(16):
            if number % 4 == 0:
                one.activity(chance.choice([SMALL, Work(commands="sleep 1")]))
            await asyncio.sleep(chance.uniform(0.02, 0.5))
            async with connection.transaction():
                if number % 2:  # so that statements are cut in the middle, for they wait
                    await connection.execute("LOCK TABLE jobs, watched IN ACCESS EXCLUSIVE MODE")
                    await asyncio.sleep(0.1)
                await connection.execute(_AGENTS_CONNECTIONS)
    one.fault_cleared()
    await one.recovered("PostgreSQL cuts connections")
    await _told_each_once(one)
    await one.check()


async def _restart(one: Chaos, server: Server, away_seconds: float) -> None:
    """Restart the server, then have it away until leases have run out, while runs are in all states."""
    one.activity(Work(commands=f"sleep {away_seconds / 2}"))
    one.activity(Work(commands=f"sleep {away_seconds + 4}"))
    await asyncio.sleep(1)
    await server.stop(signal.SIGINT)
    await server.start()
    one.activity()
    await asyncio.sleep(1)
    before = len(lines(one, "database_away"))
    await server.stop(signal.SIGQUIT)
    one.activity()
    await asyncio.sleep(away_seconds)
    await server.start()
    one.fault_cleared()
    await one.recovered("PostgreSQL is away")
    assert len(lines(one, "database_away")) == before + 1
    await _told_each_once(one)
    assert 503 in {sent["status"] for sent in one.lab.sandbox.webhooks.log()}, "a webhook came while it was away"
    await one.check()


async def _told_each_once(one: Chaos) -> None:
    """Each time that it went is told by one line, and so is each time that it came back; no attempt was used."""
    told = [line["event"] for line in lines(one) if line["event"] in {"database_away", "database_back"}]
    assert told == ["database_away", "database_back"] * (len(told) // 2)
    assert told
    assert await attempts(one) == 0
