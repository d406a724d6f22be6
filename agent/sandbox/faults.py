"""Faults on order: what the sandbox does wrong, where, how often, and the wrong answers themselves.

A fault is programmed for a pattern of paths of the API, the store or the webhook sender, in process through
`FaultBook` or from another process through `POST /_sandbox/faults`. Its fields are those of `Fault`.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

log = structlog.get_logger(__name__)


class FaultKind(StrEnum):
    """What goes wrong."""

    STATUS = "status"  # `status`, `headers` and `body` at once, instead of the answer
    LATENCY = "latency"  # the answer comes after `seconds`
    BLACK_HOLE = "black_hole"  # the request is taken and nothing ever comes back; after `seconds` the line is cut
    RESET = "reset"  # the connection is reset after `after_bytes` of the answer's body
    CLOSE = "close"  # the same, but closed in order: fewer bytes than Content-Length says
    TRUNCATE = "truncate"  # a flawless answer whose body, and Content-Length, stop at `after_bytes`
    CORRUPT = "corrupt"  # the right length, but one byte is wrong: the one at `after_bytes`
    DRIP = "drip"  # the body at `bytes_per_second`
    EXPIRED_URL = "expired_url"  # API: a presigned URL that has expired already; store: `Request has expired`
    RESET_REQUEST = "reset_request"  # the connection is reset after `after_bytes` of the request's body were read
    LOST_ANSWER = "lost_answer"  # the work is done and the connection is reset before the answer
    DROP = "drop"  # webhooks: the event is never sent
    DUPLICATE = "duplicate"  # webhooks: it is sent twice


IN_THE_BODY = frozenset({FaultKind.RESET, FaultKind.CLOSE, FaultKind.TRUNCATE, FaultKind.CORRUPT, FaultKind.DRIP})
AROUND_THE_WORK = frozenset({FaultKind.LATENCY, FaultKind.BLACK_HOLE, FaultKind.RESET_REQUEST, FaultKind.LOST_ANSWER})
OF_WEBHOOKS = frozenset({FaultKind.DROP, FaultKind.DUPLICATE})
# any: the API and the store
TARGETS = frozenset({"api", "store", "webhooks", "any"})


@dataclass(slots=True)
class Fault:
    """One programmed fault: the first `skip` matches pass, the next `times` (all, when None) go wrong."""

    kind: FaultKind
    path: str = ".*"  # searched for in `METHOD /path?query`, decoded; for webhooks in `METHOD URL`
    target: str = "any"
    times: int | None = None
    skip: int = 0
    probability: float = 1.0
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    seconds: float | None = None
    after_bytes: int = 0
    bytes_per_second: int = 1024
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    hits: int = 0

    def __post_init__(self) -> None:
        self.kind = FaultKind(self.kind)
        if self.target not in TARGETS:
            raise ValueError(f"target is none of {', '.join(sorted(TARGETS))}")
        if (self.target == "webhooks") != (self.kind in OF_WEBHOOKS) and self.kind is not FaultKind.LATENCY:
            raise ValueError(f"{self.kind} does not happen to the target {self.target}")
        re.compile(self.path)

    def document(self) -> dict[str, Any]:
        """Return the fault as JSON."""
        return asdict(self)


class FaultBook:
    """The programmed faults, in the order in which they were programmed; the first that matches is used."""

    def __init__(self, seed: int = 0) -> None:
        self.faults: list[Fault] = []
        self._random = random.Random(seed)  # noqa: S311 - chance for tests, repeatable by its seed

    def add(self, kind: FaultKind | str, path: str = ".*", **options: Any) -> Fault:
        """Program a fault; `options` are the other fields of `Fault`."""
        fault = Fault(FaultKind(kind), path, **options)
        self.faults.append(fault)
        return fault

    def add_document(self, document: dict[str, Any]) -> Fault:
        """Program a fault from JSON.

        Raises:
            ValueError: the document is not a fault; the message says why.
        """
        unknown = document.keys() - {one.name for one in fields(Fault)}
        if unknown:
            raise ValueError(f"a fault has no {', '.join(sorted(unknown))}")
        try:
            fault = Fault(**{"kind": None, **document})
        except (TypeError, re.error) as error:
            raise ValueError(str(error)) from error
        self.faults.append(fault)
        return fault

    def remove(self, fault_id: str | None = None) -> None:
        """Forget one fault, or all of them."""
        self.faults = [fault for fault in self.faults if fault_id not in {None, fault.id}]

    def match(self, target: str, method: str, where: str) -> Fault | None:
        """Return the fault that this request meets, and count it."""
        for fault in self.faults:
            if fault.target not in ({target} if target == "webhooks" else {target, "any"}) or fault.times == 0:
                continue
            if not re.search(fault.path, f"{method} {where}") or self._random.random() > fault.probability:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if fault.times is not None:
                fault.times -= 1
            fault.hits += 1
            log.info("fault", kind=fault.kind, target=target, method=method, hits=fault.hits)
            return fault
        return None


FAULT: web.RequestKey[Fault] = web.RequestKey("fault", Fault)


def fault_middleware(book: FaultBook, target: str, refuse: Callable[[web.Request], None]) -> Middleware:
    """Return what makes requests go wrong; `refuse` raises the target's own form of a refusal, if it has one."""

    @web.middleware
    async def meet(request: web.Request, handler: Handler) -> web.StreamResponse:
        exempt = request.path.startswith(("/_sandbox", "/healthz"))
        fault = None if exempt else book.match(target, request.method, request.path_qs)
        if fault is None:
            return await handler(request)
        if fault.kind in AROUND_THE_WORK:
            return await _around(request, handler, fault)
        request[FAULT] = fault
        refuse(request)
        if fault.kind is FaultKind.STATUS:
            return web.Response(status=fault.status, headers=fault.headers, text=fault.body)
        return await _spoil(request, await handler(request), fault)

    return meet


def abort(request: web.Request) -> web.Response:
    """Reset the connection (RST); the response that is returned reaches nobody."""
    transport = request.transport
    if transport is not None:
        raw = transport.get_extra_info("socket")
        if raw is not None:
            # no lingering: the kernel sends a reset and throws away what is still unsent
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response(status=500)


async def deliver(
    request: web.Request, response: web.StreamResponse, chunks: AsyncIterator[bytes], length: int, fault: Fault
) -> web.StreamResponse:
    """Send a body the way the fault says; `length` is what it would have been."""
    limit = length
    if fault.kind in {FaultKind.RESET, FaultKind.CLOSE, FaultKind.TRUNCATE}:
        limit = min(length, fault.after_bytes)
    response.content_length = limit if fault.kind is FaultKind.TRUNCATE else length
    await response.prepare(request)
    if request.transport is not None:
        request.transport.set_write_buffer_limits(high=0)
    sent = 0
    async for whole in chunks:
        chunk = _corrupted(whole, sent, fault) if fault.kind is FaultKind.CORRUPT else whole
        chunk = chunk[: limit - sent]
        await _write(response, chunk, fault)
        sent += len(chunk)
        if sent >= limit:
            break
    if fault.kind is FaultKind.RESET:
        abort(request)
    elif fault.kind is FaultKind.CLOSE:
        if request.transport is not None:
            request.transport.close()
    else:
        await response.write_eof()
    return response


async def _write(response: web.StreamResponse, chunk: bytes, fault: Fault) -> None:
    if fault.kind is not FaultKind.DRIP:
        await response.write(chunk)
        return
    step = max(1, fault.bytes_per_second // 10)
    for start in range(0, len(chunk), step):
        await response.write(chunk[start : start + step])
        await asyncio.sleep(step / fault.bytes_per_second)


def _corrupted(chunk: bytes, position: int, fault: Fault) -> bytes:
    index = fault.after_bytes - position
    if not 0 <= index < len(chunk):
        return chunk
    return chunk[:index] + bytes([chunk[index] ^ 0xFF]) + chunk[index + 1 :]


async def _spoil(request: web.Request, response: web.StreamResponse, fault: Fault) -> web.StreamResponse:
    if fault.kind not in IN_THE_BODY or response.prepared or not isinstance(response, web.Response):
        return response
    body = response.body if isinstance(response.body, bytes) else b""
    headers = {name: value for name, value in response.headers.items() if name.lower() != "content-length"}

    async def whole() -> AsyncIterator[bytes]:
        yield body

    return await deliver(
        request, web.StreamResponse(status=response.status, headers=headers), whole(), len(body), fault
    )


async def _around(request: web.Request, handler: Handler, fault: Fault) -> web.StreamResponse:
    if fault.kind is FaultKind.LATENCY:
        await asyncio.sleep(fault.seconds or 0)
        return await handler(request)
    if fault.kind is FaultKind.LOST_ANSWER:
        await handler(request)
        return abort(request)
    await (_black_hole if fault.kind is FaultKind.BLACK_HOLE else _read_some)(request, fault)
    return abort(request)


async def _black_hole(request: web.Request, fault: Fault) -> None:
    loop = asyncio.get_running_loop()
    deadline = None if fault.seconds is None else loop.time() + fault.seconds
    while request.transport is not None and (deadline is None or loop.time() < deadline):  # noqa: ASYNC110 - aiohttp has no event for a client that went away
        await asyncio.sleep(0.05)


async def _read_some(request: web.Request, fault: Fault) -> None:
    remaining = fault.after_bytes
    while remaining > 0:
        chunk = await request.content.read(min(remaining, 64 * 1024))
        if not chunk:
            break
        remaining -= len(chunk)
