"""PgBouncer between the agent and PostgreSQL, as many a managed PostgreSQL has it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.db.database import CONNECTIONS, Database
from agent.errors import DatabaseError
from agent.sandbox.server import Sandbox
from tests.agents import running_agent
from tests.lab import Lab
from tests.postgres import debian_server, pooler


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with debian_server() as url:
        yield url


async def test_an_agent_runs_through_one_that_lends_connections_for_a_session(tmp_path: Path, server_url: str) -> None:
    with pooler(server_url, "session", 2 * CONNECTIONS) as url:
        database = await Database.open(url, "the pooler", timeout_seconds=7)
        try:
            await database.migrate()
            async with database.connection() as connection:
                assert await connection.fetchval("SHOW jit") == "off"
                assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "7s"
        finally:
            await database.close()
        async with (
            Sandbox(tmp_path / "sandbox") as sandbox,
            running_agent(sandbox.environment(), tmp_path, AGENT_DATABASE_URL=url) as agent,
        ):
            lab = Lab(sandbox, tmp_path)
            lab.watch(agent)
            activity_id = lab.activity("echo x > /outputs/x")
            assert (await agent.job(activity_id))["state"] == "succeeded"
            assert (await lab.outputs(activity_id))["x"] == b"x\n"


async def test_one_that_lends_them_for_a_transaction_is_told_of(server_url: str) -> None:
    with pooler(server_url, "transaction", 4) as url:
        database = await Database.open(url, "db.example.org")
        try:
            with pytest.raises(DatabaseError, match=r"^PostgreSQL at db.example.org: .* pool_mode = session"):
                await asyncio.gather(*(_ask_ten_times(database) for _ in range(CONNECTIONS)))
        finally:
            await database.close()


async def _ask_ten_times(database: Database) -> None:
    for _ in range(10):
        async with database.connection() as connection:
            await connection.fetchval("SELECT $1::int", 1)
