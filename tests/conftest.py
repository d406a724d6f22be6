"""What tests share: a PostgreSQL with a fresh database each, a sandbox, an agent that serves."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from hypothesis import settings

from agent.db.database import Database
from tests.chaos.recovery import print_table
from tests.postgres import debian_server

settings.register_profile("quick", max_examples=60, deadline=None, database=None)
settings.register_profile("ci", max_examples=150, deadline=None, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "quick")


def pytest_configure(config: pytest.Config) -> None:
    """Give each test session a directory of its own.

    pytest's usual one is shared by all sessions of a user and closed again by each of them, which shuts out an
    embedded PostgreSQL that runs as a user of its own when root runs the tests.
    """
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # a shell's background command; programs under test inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A worker's below the session's would be too long a path for PostgreSQL's socket.
    if config.option.basetemp is None or hasattr(config, "workerinput"):
        config.option.basetemp = tempfile.mkdtemp(prefix="ovation-tests-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))
    if not os.environ.get("CHAOS_SEED"):  # chosen once, for all processes that tests run in
        long = os.environ.get("CHAOS") == "long"
        os.environ["CHAOS_SEED"] = str(secrets.randbelow(1_000_000)) if long else "1"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how long the chaos suite's recoveries took."""
    print_table(terminalreporter, os.environ["CHAOS_SEED"])


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of them."""
    for name in list(os.environ):
        if name.startswith(("OVATION_", "AGENT_", "JWT_", "AWS_", "APPTAINER", "SINGULARITY")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """Debian's PostgreSQL, for the tests' session."""
    with debian_server() as url:
        yield url


@pytest.fixture(scope="session")
def embedded_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded PostgreSQL, for the tests' session."""
    from agent.db.embedded import EmbeddedServer

    server = EmbeddedServer._start(tmp_path_factory.mktemp("pg") / "postgres")
    try:
        yield server.dsn
    finally:
        asyncio.run(server.stop())


def with_database(url: str, name: str) -> str:
    """Return the address of another database on the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture(params=["embedded", "server"])
async def empty_database_url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A fresh, empty database on each kind of server in turn."""
    async with fresh_database(request.getfixturevalue(f"{request.param}_url")) as url:
        yield url


@pytest.fixture
async def database_url(server_url: str) -> AsyncIterator[str]:
    """A fresh, empty database on Debian's server."""
    async with fresh_database(server_url) as url:
        yield url


@asynccontextmanager
async def fresh_database(server_url: str) -> AsyncIterator[str]:
    """Make an empty database on a server, and drop it in the end; meanwhile the server may be restarted."""
    name = f"test_{uuid.uuid4().hex}"
    await _execute(server_url, f"CREATE DATABASE {name}")
    yield with_database(server_url, name)
    await _execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


async def _execute(server_url: str, statement: str) -> None:
    connection = await asyncpg.connect(server_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def database(empty_database_url: str) -> AsyncIterator[Database]:
    """A migrated database on each kind of server in turn."""
    opened = await Database.open(empty_database_url, "the test database")
    try:
        await opened.migrate()
        yield opened
    finally:
        await opened.close()
