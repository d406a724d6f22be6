"""A TCP proxy that can be away as a server is: gone, dumb, or cut off in the middle of what it says."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 16


class Proxy:
    """Passes bytes on to the server at an address (http://host:port), from a port of its own, as long as it is there.

    An async context manager; at its end no connection is open.
    """

    def __init__(self, address: str) -> None:
        target = urlsplit(address)
        self._target = (str(target.hostname), int(target.port or 80))
        self._server: asyncio.Server | None = None
        self._port = 0
        self._speaks = _set()
        self._open: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        """Where it listens; the same after it was closed for a while."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Listen, at the address from before if there was one."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Refuse connections from now on, and cut those that are open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection, whatever is being said on it."""
        for writer in list(self._writers):
            writer.transport.abort()

    def hush(self) -> None:
        """Say nothing any more; connections are taken, and stay open."""
        self._speaks.clear()

    def speak(self) -> None:
        """Pass bytes on again, those that came meanwhile first."""
        self._speaks.set()

    def speak_to_new_ones(self) -> None:
        """Pass bytes on again, but never a word more on the connections that are open now."""
        self._speaks = _set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            # asyncio's own callback complains about a task that was cancelled.
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._join(reader, writer)
        finally:
            self._open.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        speaks = self._speaks
        there, back = await asyncio.open_connection(*self._target)
        ours = {writer, back}
        self._writers |= ours
        try:
            await asyncio.gather(_pass_on(reader, back, speaks), _pass_on(there, writer, speaks))
        finally:
            self._writers -= ours
            for each in ours:
                each.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, speaks: asyncio.Event) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        await speaks.wait()
        writer.write(chunk)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
