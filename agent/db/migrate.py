"""Bring the schema up to date: numbered, forward-only files, applied under one lock."""

from __future__ import annotations

import re
from importlib import resources

import asyncpg

from agent.errors import DatabaseError

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
        current = await version(connection)
        for number, name, sql in migrations():
            if number > current:
                await connection.execute(sql)
                await connection.execute("INSERT INTO schema_migrations (number, name) VALUES ($1, $2)", number, name)
                applied.append(f"{number:04}_{name}")
    return applied


async def check(connection: asyncpg.Connection) -> None:
    """Make sure that the schema is the one that this program was written for.

    Raises:
        DatabaseError: it is older (migrate it) or newer (upgrade the agent).
    """
    newest = migrations()[-1][0]
    current = await version(connection)
    if current < newest:
        raise DatabaseError(
            f"the database's schema is at version {current}, this program needs {newest}: run `ovation-agent migrate`"
        )
    if current > newest:
        raise DatabaseError(
            f"the database's schema is at version {current}, newer than this program's {newest}: upgrade the agent"
        )
