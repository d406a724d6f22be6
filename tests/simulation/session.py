"""What aiohttp's session is to the adapters, over a simulated wire."""

from __future__ import annotations

import asyncio
import json as jsonlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Self

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from tests.simulation.wire import Broken, Wire
from tests.simulation.world import Fate

SILENCE_SECONDS = 30.0  # how long the adapters wait for a byte


@dataclass(frozen=True, slots=True)
class Request:
    """What arrives at a server."""

    method: str
    url: URL
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server sends back. `breaks_off`: the connection ends in the middle of the body."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    breaks_off: bool = False

    @classmethod
    def of(cls, document: object, status: int = 200) -> Reply:
        """Return one with a JSON body."""
        return cls(status, jsonlib.dumps(document).encode(), {"Content-Type": "application/json"})


class _Content:
    def __init__(self, reply: Reply) -> None:
        self._left = reply.body[: len(reply.body) // 2] if reply.breaks_off else reply.body
        self._breaks_off = reply.breaks_off

    async def read(self, most: int = -1) -> bytes:
        taken = self._left if most < 0 else self._left[:most]
        self._left = self._left[len(taken) :]
        if not self._left and self._breaks_off:
            raise aiohttp.ClientPayloadError("Response payload is not completed")
        return taken

    async def iter_chunked(self, most: int) -> AsyncIterator[bytes]:
        while chunk := await self.read(most):
            yield chunk
            await asyncio.sleep(0)

    def iter_any(self) -> AsyncIterator[bytes]:
        return self.iter_chunked(1 << 16)


class Response:
    """What aiohttp's response is to the adapters."""

    def __init__(self, reply: Reply) -> None:
        self.status = reply.status
        self.headers = CIMultiDict(reply.headers)
        self.content = _Content(reply)
        length = self.headers.get("Content-Length")
        self.content_length = None if length is None else int(length)

    async def read(self) -> bytes:
        """Return the whole body."""
        return await self.content.read()


class Session:
    """Sends requests over wires to servers; `route` says which."""

    def __init__(self, route: Callable[[Request], tuple[Wire, Callable[[Request], Reply]]]) -> None:
        self._route = route

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def request(
        self,
        method: str,
        url: URL | str,
        *,
        json: Any = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        data: IO[bytes] | None = None,
        **_: Any,
    ) -> AbstractAsyncContextManager[Response]:
        """Send a request; redirects are of no concern here."""
        address = URL(url).update_query(params) if params else URL(url)
        body = b"" if data is None else data.read()
        return self._send(Request(method, address, json, CIMultiDict(headers or {}), body))

    def get(self, url: URL | str, **options: Any) -> AbstractAsyncContextManager[Response]:
        """Send a GET."""
        return self.request("GET", url, **options)

    async def close(self) -> None:
        """Close it."""

    @asynccontextmanager
    async def _send(self, request: Request) -> AsyncIterator[Response]:
        wire, serve = self._route(request)
        try:
            reply = await wire.ask(f"{request.method} {request.url.path}", lambda: serve(request))
        except Broken as broken:
            if broken.fate is not Fate.BUSY:
                raise _error(broken.fate) from None
            reply = _busy(wire, request)
        yield Response(reply)


def _busy(wire: Wire, request: Request) -> Reply:
    chance = wire.world.chance
    what = f"busy {wire.process.name} {request.method} {request.url.path}"
    status = chance.one_of((500, 502, 503, 503, 429), what)
    wait = chance.one_of((None, "1", "7"), what) if status in {503, 429} else None
    return Reply(status, b"{}", {"Retry-After": wait} if wait else {})


def _error(fate: Fate) -> Exception:
    """Return what aiohttp raises."""
    if fate is Fate.REFUSED:
        return aiohttp.ClientConnectorError(None, ConnectionRefusedError(111, "Connection refused"))  # type: ignore[arg-type]
    if fate in {Fate.SILENT_BEFORE, Fate.SILENT_AFTER}:
        return aiohttp.SocketTimeoutError("Timeout on reading data from socket")
    return aiohttp.ServerDisconnectedError()
