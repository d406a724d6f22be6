"""Open the database that the settings name: a given server, or the embedded one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent.db.database import CONNECTIONS, Database, target_of
from agent.db.embedded import EmbeddedServer
from agent.settings import AgentSettings


@asynccontextmanager
async def connect(settings: AgentSettings, size: int = CONNECTIONS) -> AsyncIterator[Database]:
    """Open the database, and the embedded server under it when no other is named; close them in turn.

    The schema of an embedded database is brought up to date: nobody else will. A given server's is the operator's.

    Args:
        settings: which database.
        size: connections to a given server at most.

    Raises:
        DatabaseError: it cannot be reached or started.
    """
    if settings.database_url is not None:
        dsn = settings.database_url.get_secret_value()
        database = await Database.open(dsn, target_of(dsn), size=size)
        try:
            yield database
        finally:
            await database.close()
        return
    server = await EmbeddedServer.start(Path(settings.data_dir) / "postgres")
    try:
        database = await Database.open(server.dsn, f"{settings.data_dir}/postgres")
        try:
            await database.migrate()
            yield database
        finally:
            await database.close()
    finally:
        await server.stop()
