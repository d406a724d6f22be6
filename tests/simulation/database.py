"""The real database under simulated time: one embedded PostgreSQL, one connection, one statement at a time.

A schema before `pg_catalog` in the search path has a `now()` of its own, which reads the simulated clock; so queries
and column defaults tell simulated times with no change to them. A statement is one instant of that time: it is sent,
executed and answered as a request over a wire, and everything else may happen before and after, but not meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

from agent.db import migrate
from agent.db.database import _QUERIES
from agent.db.embedded import EmbeddedServer
from tests.simulation.process import Process
from tests.simulation.wire import Broken, Wire
from tests.simulation.world import Fate, Party, World

_T = TypeVar("_T")
_SILENCE_SECONDS = 10.0  # what the agent gives a statement
_NAMES = {getattr(_QUERIES, name).sql: name for name in _QUERIES.available_queries if not name.endswith("_cursor")}
# What agents ask for time and again while nothing is due. The answer follows from what was written and from the time.
_POLLS = frozenset(name for name in _NAMES.values() if name.startswith(("claim_", "count_", "lapse_")))
_COUNTDOWNS = frozenset({"next_job_due", "next_look_due"})
# What is written without making anything due that was not: leases and the sight of an agent last longer, no less.
_NEUTRAL = frozenset({"renew_leases", "agent_seen", "set_progress", "set_folder", "save_output", "BEGIN", "COMMIT"})
# What has to do with looks alone, and says nothing of jobs.
_LOOKS = frozenset(
    {"take_hints", "claim_watched", "next_look_due", "judge_watched", "note_listed", "look_again_slowly"}
    | {"claim_reconciliation", "end_reconciliation", "make_reconciliation_due"}
)
_NEXT_MOMENT = """
    SELECT extract(epoch FROM min(moment))::float8 FROM (
        SELECT due_at FROM jobs WHERE finished_at IS NULL UNION ALL SELECT lease_until FROM jobs
        UNION ALL SELECT due_at FROM watched UNION ALL SELECT lease_until FROM watched
        UNION ALL SELECT due_at FROM reconciliations UNION ALL SELECT lease_until FROM reconciliations
        UNION ALL SELECT seen_at + interval '60 s' FROM agents
    ) moments (moment) WHERE moment >= now()"""


@dataclass(slots=True)
class _Memo:
    """What polls were answered, and until when that holds unless something is written."""

    until: float = 0.0
    answers: dict[tuple[str, tuple[object, ...]], tuple[float, Any]] = field(default_factory=dict)


class Server:
    """One PostgreSQL for all simulations of a session, empty at the start of each."""

    def __init__(self, directory: Path) -> None:
        """Start it; `directory` is best in memory."""
        self._loop = asyncio.new_event_loop()
        self._embedded = EmbeddedServer._start(directory / "postgres")
        clock = directory / "now"
        self._clock = os.open(clock, os.O_RDWR | os.O_CREAT, 0o644)
        self._connection: asyncpg.Connection = self.run(self._prepare(clock))
        self.statements = 0
        self._memos = {"looks": _Memo(), "jobs": _Memo()}
        self._owner: object | None = None

    async def _prepare(self, clock: Path) -> asyncpg.Connection:
        first = await asyncpg.connect(self._embedded.dsn)
        await first.execute("ALTER SYSTEM SET autovacuum = off")
        await first.execute("ALTER SYSTEM SET fsync = off")
        await first.execute("SELECT pg_reload_conf()")
        await first.execute("CREATE DATABASE simulation")
        await first.close()
        connection = await asyncpg.connect(
            self._embedded.dsn, database="simulation", server_settings={"synchronous_commit": "off", "jit": "off"}
        )
        self.tell(0.0)
        await connection.execute(
            "CREATE SCHEMA sim; CREATE FUNCTION sim.now() RETURNS timestamptz LANGUAGE sql STABLE"
            f" AS $$SELECT pg_catalog.to_timestamp(pg_catalog.pg_read_file('{clock}')::float8)$$;"
            " SET search_path = sim, pg_catalog, public"
        )
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        await migrate.migrate(connection)
        return connection

    def close(self) -> None:
        """Stop it."""
        self.run(self._connection.close())
        self.run(self._embedded.stop())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        os.close(self._clock)

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run real I/O to its end, also from within the virtual loop, where no time passes meanwhile."""
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            return self._loop.run_until_complete(coroutine)
        finally:
            asyncio._set_running_loop(outer)

    def tell(self, wall: float) -> None:
        """Set the clock that the database's `now()` reads."""
        os.pwrite(self._clock, f"{wall:020.6f}".encode(), 0)

    def clear(self, wall: float) -> None:
        """Empty every table, as if the agent was installed now."""
        self.tell(wall)
        self.run(self._clear())
        self._forget("")

    async def _clear(self) -> None:
        rows = await self._connection.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'sim' AND tablename <> 'schema_migrations'"
        )
        names = ", ".join(sorted(row["tablename"] for row in rows))
        await self._connection.execute(f"TRUNCATE {names} RESTART IDENTITY")
        await self._connection.execute("UPDATE schema_migrations SET applied_at = now()")

    def execute(self, wall: float, method: str, sql: str, arguments: tuple[Any, ...], owner: object = None) -> Any:
        """Execute one statement at a time on the wall."""
        if self._owner is not owner:
            raise AssertionError("a statement in the middle of another process's transaction")
        name = _NAMES.get(sql, sql)
        if name in _POLLS or name in _COUNTDOWNS:
            return self._poll(wall, name, method, sql, arguments)
        result = self._do(wall, method, sql, arguments)
        if name not in _NEUTRAL and not sql.startswith("SELECT"):
            self._forget(name)
        return result

    def _do(self, wall: float, method: str, sql: str, arguments: tuple[Any, ...] = ()) -> Any:
        self.tell(wall)
        self.statements += 1
        return self.run(getattr(self._connection, method)(sql, *arguments))

    def _forget(self, name: str) -> None:
        """Forget the answers that may be others since a statement wrote."""
        self._memos["looks"].answers.clear()
        if name not in _LOOKS:
            self._memos["jobs"].answers.clear()

    def _poll(self, wall: float, name: str, method: str, sql: str, arguments: tuple[Any, ...]) -> Any:
        """Answer as before where nothing was written since and no moment has come that the answer depends on."""
        known, result = self.recall(wall, sql, arguments)
        if known:
            return result
        memo = self._memo(name)
        result = self._do(wall, method, sql, arguments)
        if name in _POLLS and result not in ([], None, 0):
            self._forget(name)  # it found something and wrote
            return result
        if not memo.answers:
            moment = self._do(wall, "fetchval", _NEXT_MOMENT)
            memo.until = float("inf") if moment is None else moment
        memo.answers[_key(sql, arguments)] = (wall, result)
        return result

    def recall(self, wall: float, sql: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """Return whether the answer to a poll is known, and the answer."""
        name = _NAMES.get(sql, sql)
        if name not in _POLLS and name not in _COUNTDOWNS:
            return False, None
        memo = self._memo(name)
        if wall >= memo.until:
            memo.answers.clear()
        key = _key(sql, arguments)
        if key not in memo.answers:
            return False, None
        then, result = memo.answers[key]
        return True, result if name in _POLLS or result is None else result - (wall - then)

    def _memo(self, name: str) -> _Memo:
        return self._memos["looks" if name in _LOOKS else "jobs"]

    def begin(self, owner: object, wall: float) -> None:
        """Begin a transaction, in which no other process may be active."""
        if self._owner is not None:
            raise AssertionError("a transaction within another")
        self._do(wall, "execute", "BEGIN")
        self._owner = owner

    def end(self, owner: object, wall: float, *, commit: bool) -> None:
        """End the transaction."""
        assert self._owner is owner
        self._owner = None
        self._do(wall, "execute", "COMMIT" if commit else "ROLLBACK")

    async def fetch(self, sql: str) -> list[Any]:
        """Return rows, within what `run` runs."""
        found: list[Any] = await self._connection.fetch(sql)
        return found

    def rows(self, sql: str, *arguments: object) -> list[dict[str, Any]]:
        """Return what the check wants to know."""
        found = self.run(self._connection.fetch(sql, *arguments))
        return [dict(row) for row in found]


def _key(sql: str, arguments: tuple[Any, ...]) -> tuple[str, tuple[object, ...]]:
    return sql, tuple(tuple(each) if isinstance(each, list) else each for each in arguments)


class Pool:
    """What asyncpg's pool is to `agent.db.database.Database`."""

    def __init__(self, world: World, server: Server, process: Process) -> None:
        self._world = world
        self._server = server
        self._wire = Wire(world, process, Party.DATABASE, _SILENCE_SECONDS)

    @asynccontextmanager
    async def acquire(self, *, timeout: float | None = None) -> AsyncIterator[_Connection]:  # noqa: ASYNC109 asyncpg's
        """Lend a connection."""
        del timeout
        yield _Connection(self._world, self._server, self._wire)

    async def close(self) -> None:
        """Disconnect."""


class _Connection:
    """What asyncpg's connection is to the named queries."""

    def __init__(self, world: World, server: Server, wire: Wire) -> None:
        self._world = world
        self._server = server
        self._wire = wire
        self._in_transaction = False

    def fetch(self, sql: str, *arguments: object) -> Awaitable[Any]:
        return self._statement("fetch", sql, arguments)

    def fetchrow(self, sql: str, *arguments: object) -> Awaitable[Any]:
        return self._statement("fetchrow", sql, arguments)

    def fetchval(self, sql: str, *arguments: object) -> Awaitable[Any]:
        return self._statement("fetchval", sql, arguments)

    def execute(self, sql: str, *arguments: object) -> Awaitable[Any]:
        return self._statement("execute", sql, arguments)

    async def _statement(self, method: str, sql: str, arguments: tuple[Any, ...]) -> Any:
        if self._in_transaction:  # no time passes in one, so that nothing can happen in its middle
            return self._server.execute(self._world.wall, method, sql, arguments, self)
        # What is known beforehand takes no time, for that is most of all statements; unless the database has its moods.
        if self._world.is_sound(Party.DATABASE) and not self._wire.process.is_buried:
            known, result = self._server.recall(self._world.wall, sql, arguments)
            if known:
                return result
        return await self._ask(
            _NAMES.get(sql, sql), lambda: self._server.execute(self._world.wall, method, sql, arguments)
        )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Do what is inside as one instant."""
        await self._ask("begin", lambda: None)
        self._server.begin(self, self._world.wall)
        self._in_transaction = True
        fate = Fate.SERVED
        try:
            yield
            fate = self._world.fate(Party.DATABASE, f"{self._wire.process.name} commit")
            self._server.end(self, self._world.wall, commit=fate.is_done)
        except BaseException:
            if self._server._owner is self:
                self._server.end(self, self._world.wall, commit=False)
            raise
        finally:
            self._in_transaction = False
        if fate is not Fate.SERVED:
            self._world.note(self._wire.process.name, f"database {fate}: commit")
            raise _error(fate)
        await self._ask("committed", lambda: None)

    async def _ask(self, what: str, serve: Any) -> Any:
        try:
            return await self._wire.ask(what, serve)
        except Broken as error:
            raise _error(error.fate) from None


def _error(fate: Fate) -> Any:
    """Return what asyncpg raises."""
    if fate is Fate.REFUSED:
        return ConnectionRefusedError(111, "Connection refused")
    if fate is Fate.BUSY:
        return asyncpg.CannotConnectNowError("the database system is starting up")
    if fate in {Fate.SILENT_BEFORE, Fate.SILENT_AFTER}:
        return TimeoutError()
    return asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
