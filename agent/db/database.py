"""The connection pool and the named queries; asyncpg's errors become `DatabaseError` here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from typing import Any, Self

import aiosql
import asyncpg

from agent.db import migrate
from agent.errors import DatabaseError

Row = Mapping[str, Any]

_QUERIES = aiosql.from_path(
    str(resources.files("agent.db").joinpath("queries.sql")), "asyncpg", mandatory_parameters=False
)
_AWAY = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InternalClientError,  # a connection that was cut between two messages of the server's
)


@asynccontextmanager
async def translated(target: str) -> AsyncIterator[None]:
    """Turn what asyncpg raises when the server is away into `DatabaseError`; a mistake in SQL stays a bug."""
    try:
        yield
    except TimeoutError:
        raise DatabaseError(f"PostgreSQL at {target} does not answer") from None
    except (asyncpg.InvalidPasswordError, asyncpg.InvalidAuthorizationSpecificationError) as error:
        raise DatabaseError(f"PostgreSQL at {target} refuses the sign-in: {error}") from None
    except asyncpg.InvalidCatalogNameError as error:
        raise DatabaseError(f"PostgreSQL at {target}: {error}; create it with `createdb`") from None
    except (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError):
        raise DatabaseError(
            f"PostgreSQL at {target}: what is between lends a connection for a transaction only. Let it lend them for a"
            " session (PgBouncer: pool_mode = session), or connect to PostgreSQL itself"
        ) from None
    except asyncpg.DataError:
        raise  # a value that does not fit: some of these are InterfaceErrors too, and no outage
    except _AWAY as error:
        raise DatabaseError(f"PostgreSQL at {target} cannot be reached: {error}") from None


CONNECTIONS = 8


class Queries:
    """The queries of queries.sql on one connection, each checked for the lease where it has one."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def rows(self, name: str, **values: object) -> list[Row]:
        """Run a query that returns rows."""
        return [row async for row in getattr(_QUERIES, name)(self._connection, **values)]

    async def row(self, name: str, **values: object) -> Row | None:
        """Run a query that returns one row or none."""
        found: Row | None = await getattr(_QUERIES, name)(self._connection, **values)
        return found

    async def value(self, name: str, **values: object) -> Any:
        """Run a query that returns one value or none, or that returns nothing."""
        return await getattr(_QUERIES, name)(self._connection, **values)


class Database:
    """A pool on one PostgreSQL."""

    def __init__(self, pool: asyncpg.Pool, target: str, timeout_seconds: float) -> None:
        self._pool = pool
        self._target = target
        self._timeout_seconds = timeout_seconds

    @classmethod
    async def open(cls, dsn: str, target: str, *, size: int = CONNECTIONS, timeout_seconds: float = 10) -> Self:
        """Connect.

        Args:
            dsn: what asyncpg connects with; may carry a password.
            target: how errors name the server; carries none.
            size: connections at most.
            timeout_seconds: how long a connection, or one statement, may take.

        Raises:
            DatabaseError: the server cannot be reached or refuses.
        """
        async with translated(target):
            pool = await asyncpg.create_pool(
                dsn,
                min_size=0,
                max_size=size,
                timeout=timeout_seconds,
                command_timeout=timeout_seconds,
                init=partial(_prepare, timeout_seconds),
                reset=_nothing_to_reset,
                server_settings={"application_name": "ovation-agent"},
            )
            try:
                async with pool.acquire(timeout=timeout_seconds):
                    pass
            except BaseException:
                await pool.close()
                raise
        return cls(pool, target, timeout_seconds)

    async def close(self) -> None:
        """Let running statements end and disconnect."""
        await self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """Lend a connection."""
        async with translated(self._target), self._pool.acquire(timeout=self._timeout_seconds) as connection:
            yield connection

    @asynccontextmanager
    async def queries(self) -> AsyncIterator[Queries]:
        """Lend the queries on one connection, each its own transaction."""
        async with self.connection() as connection:
            yield Queries(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Queries]:
        """Lend the queries on one connection, all in one transaction."""
        async with self.connection() as connection, connection.transaction():
            yield Queries(connection)

    async def migrate(self) -> list[str]:
        """Bring the schema up to date and return the names of what was applied."""
        async with self.connection() as connection:
            return await migrate.migrate(connection)

    async def check(self) -> None:
        """Raise `DatabaseError` unless the schema is the one that this program needs."""
        async with self.connection() as connection:
            await migrate.check(connection)


async def _prepare(timeout_seconds: float, connection: asyncpg.Connection) -> None:
    # Not when it connects: a pooler refuses what it does not know there.
    # To compile a statement takes longer than any of these runs, and estimates make them look dear.
    # Who is suspended in the middle of a transaction must not keep its rows from everybody else.
    await connection.execute(f"SET jit = off; SET idle_in_transaction_session_timeout = {int(timeout_seconds * 1000)}")
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)


async def _nothing_to_reset(_connection: asyncpg.Connection) -> None:
    """Spare four statements and a round trip for each time that a connection is lent.

    Nobody leaves a setting, a cursor, a listener or an advisory lock on a connection: whoever needs one keeps it
    within a transaction, and a transaction that is left open is rolled back by the pool whatever this does.
    """


def target_of(dsn: str) -> str:
    """Return how to name the server in messages: no user, no password."""
    tail = dsn.partition("://")[2].rpartition("@")[2]
    return tail.partition("?")[0] or "the default server"
