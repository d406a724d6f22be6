"""Bring the schema up to date: numbered, forward-only files, applied under one lock.

A file whose first line says `-- works from: N` changes nothing for programs that were written for migration N or later
one: they may be taken back to, or go on beside newer ones.
"""

from __future__ import annotations

import re
from importlib import resources

import asyncpg

from agent.errors import DatabaseError
from agent.logs import logger

_WORKS_FROM = re.compile(r"-- works from: (\d+)\n")
_LOCK = 0x6F766174  # "ovat": agents that start together migrate one after the other


def migrations() -> list[tuple[int, str, str]]:
    """Return (number, name, SQL) of each migration, in order."""
    folder = resources.files("agent.db").joinpath("migrations")
    return sorted(
        (int(match[1]), match[2], file.read_text())
        for file in folder.iterdir()
        if (match := re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name))
    )


async def version(connection: asyncpg.Connection) -> int:
    """Return the number of the newest migration that the database has; 0 for an empty one."""
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
        return 0
    newest: int | None = await connection.fetchval("SELECT max(number) FROM schema_migrations")
    return newest or 0


async def migrate(connection: asyncpg.Connection) -> list[str]:
    """Apply what is missing and return the names of what was applied; safe to call from many agents at once."""
    applied = []
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations"
            " (number integer PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        await connection.execute("ALTER TABLE schema_migrations ADD COLUMN IF NOT EXISTS works_from integer")
        current = await version(connection)
        for number, name, sql in migrations():
            if number > current:
                await connection.execute(sql)
                await connection.execute(
                    "INSERT INTO schema_migrations (number, name, works_from) VALUES ($1, $2, $3)",
                    *(number, name, works_from(number, sql)),
                )
                applied.append(f"{number:04}_{name}")
    return applied


def works_from(number: int, sql: str) -> int:
    """Return the migration that a program must know at least to work with this one."""
    match = _WORKS_FROM.match(sql)
    return int(match[1]) if match else number


async def check(connection: asyncpg.Connection) -> None:
    """Make sure that this program can work with the schema: its own, or a newer one that says so.

    Raises:
        DatabaseError: it is older (migrate it) or newer (upgrade the agent).
    """
    newest = migrations()[-1][0]
    current = await version(connection)
    if current < newest:
        raise DatabaseError(
            f"the database's schema is at version {current}, this program needs {newest}: run `ovation-agent migrate`"
        )
    if current > newest and not await _works_with(connection, newest):
        raise DatabaseError(
            f"the database's schema is at version {current}, newer than this program's {newest}: upgrade the agent"
        )


async def _works_with(connection: asyncpg.Connection, newest: int) -> bool:
    """Say whether everything that is newer than this program lets it work."""
    known = await connection.fetchval(
        "SELECT EXISTS (SELECT 1 FROM pg_attribute WHERE attrelid = 'schema_migrations'::regclass"
        " AND attname = 'works_from' AND NOT attisdropped)"
    )
    if not known:
        return False
    least: int | None = await connection.fetchval(
        "SELECT max(coalesce(works_from, number)) FROM schema_migrations WHERE number > $1", newest
    )
    if least is None or least > newest:
        return False
    logger().warning("schema_newer", newest=newest, found=await version(connection))
    return True
