"""What the handlers work with, and the few things that all of them do."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from aiohttp import hdrs, web
from aiohttp.typedefs import LooseHeaders

from agent.adapters.ovation import Ovation
from agent.beats import Beats
from agent.db.database import Database
from agent.db.jobs import Jobs
from agent.db.log_questions import LogQuestions
from agent.db.outputs import Outputs
from agent.db.watched import WatchList
from agent.db.work import Work
from agent.domain.delivery import Delivery, Receipt
from agent.errors import DatabaseError
from agent.logs import logger
from agent.metrics import Metrics
from agent.settings import Settings
from agent.web.refusals import Refusals

MAX_BODY_BYTES = 64 * 1024
MOST_ORGANIZATION = 2**31 - 1
MAX_LISTED = 1000
MAX_SINCE_SECONDS = 366 * 86_400
MAX_TAIL = 1_000_000
MAX_LOG_OFFSET = 2**40  # what any file system can seek to
_BODY_SECONDS = 30.0
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")
_HEADER_TOKEN = re.compile(r"[\x21-\x7e]+")


class Inbox(Protocol):
    """Where webhooks are committed."""

    async def store(self, delivery: Delivery) -> Receipt:
        """Return once the delivery is committed, or could not be taken."""
        ...

    async def close(self) -> None:
        """Write what waits and take nothing more."""
        ...


class Admission(Protocol):
    """Who lets queued jobs in."""

    @property
    def admits(self) -> bool:
        """Whether they are let in."""
        ...

    def admit(self, *, admits: bool) -> None:
        """Let them in, or none."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """The parties that handlers work with."""

    settings: Settings
    database: Database
    watch_list: WatchList
    jobs: Jobs
    outputs: Outputs
    ovation: Ovation
    data_dir: Path
    admin_token: str
    inbox: Inbox
    on_job: Callable[[], None]
    on_cancel: Callable[[str], None]
    work: Work
    worker: Admission
    log_questions: LogQuestions
    metrics: Metrics = field(default_factory=Metrics)
    beats: Beats = field(default_factory=Beats)
    refusals: Refusals = field(default_factory=Refusals)


SERVICES = web.AppKey("services", Services)


def problem(status: int, detail: str, headers: LooseHeaders | None = None) -> web.Response:
    """Return an error in the shape that Ovation's own API uses."""
    return web.json_response({"errors": {"detail": detail}}, status=status, headers=headers)


async def read_json(request: web.Request) -> Any:
    """Return the body's JSON; raises what `read_body` and `parse_json` raise."""
    return parse_json(await read_body(request))


def parse_json(body: bytes) -> Any:
    """Return what a body says.

    Raises:
        web.HTTPException: 400 when it is not JSON, saying where.
    """
    try:
        return json.loads(body, parse_float=_number)
    except UnicodeDecodeError:
        raise failure(400, "the body is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise failure(400, f"the body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError):
        raise failure(400, "the body is not JSON that can be read") from None


def _number(text: str) -> int | float:
    """Read a number that is not written as an integer but may be one: in JSON 3.0 is 3."""
    number = float(text)
    return int(number) if number.is_integer() else number


async def read_body(request: web.Request) -> bytes:
    """Return the body as it came.

    Raises:
        web.HTTPException: 413 above 64 KiB, without reading on; 408 when it does not come; 415 when it is compressed.
    """
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise _too_large()
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise failure(415, "the body is compressed: send it as it is", {hdrs.CONNECTION: "close"})
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        problem = f"the body did not come within {_BODY_SECONDS:.0f} seconds"
        raise failure(408, problem, {hdrs.CONNECTION: "close"}) from None
    except web.RequestPayloadError:
        raise failure(400, "the body does not come as its headers say", {hdrs.CONNECTION: "close"}) from None
    return bytes(body)


def _too_large() -> web.HTTPException:
    return failure(413, f"the body is larger than {MAX_BODY_BYTES} bytes", {hdrs.CONNECTION: "close"})


def failure(status: int, detail: str, headers: LooseHeaders | None = None) -> web.HTTPException:
    """Return an error to raise."""
    kinds: dict[int, type[web.HTTPException]] = {
        400: web.HTTPBadRequest,
        401: web.HTTPUnauthorized,
        403: web.HTTPForbidden,
        404: web.HTTPNotFound,
        408: web.HTTPRequestTimeout,
        409: web.HTTPConflict,
        415: web.HTTPUnsupportedMediaType,
        503: web.HTTPServiceUnavailable,
    }
    text = json.dumps({"errors": {"detail": detail}})
    if status == 413:  # noqa: PLR2004 it alone wants the sizes
        return web.HTTPRequestEntityTooLarge(
            MAX_BODY_BYTES, text=text, content_type="application/json", headers=headers
        )
    return kinds[status](text=text, content_type="application/json", headers=headers)


def same(left: str, right: str) -> bool:
    """Compare two secrets in constant time."""
    # Bytes of a header that are no UTF-8 arrive as lone surrogates.
    return hmac.compare_digest(left.encode(errors="surrogatepass"), right.encode(errors="surrogatepass"))


def bearer(request: web.Request) -> str | None:
    """Return the request's bearer token, if it carries one."""
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and _HEADER_TOKEN.fullmatch(token) else None


def is_id(text: str) -> bool:
    """Say whether this can be an Ovation id: it goes into addresses and into the database."""
    return _ID.fullmatch(text) is not None


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer in JSON also where aiohttp would not, 503 while PostgreSQL is away, and 500 to a bug, which is logged."""
    try:
        return await handler(request)
    except DatabaseError:
        return problem(503, "the agent's database is away; send this again", {hdrs.RETRY_AFTER: "10"})
    except web.HTTPException as error:
        if error.status < 400 or error.content_type == "application/json":  # noqa: PLR2004 HTTP's own number
            raise
        headers = {hdrs.ALLOW: error.headers[hdrs.ALLOW]} if hdrs.ALLOW in error.headers else None
        return problem(error.status, error.reason.lower(), headers)
    except Exception as error:  # noqa: BLE001 a bug: loud in the log, a plain word to the client
        if isinstance(error, ConnectionError) and (request.transport is None or request.transport.is_closing()):
            return web.Response(status=400)  # the client went away; this reaches nobody
        logger().exception("request_failed", method=request.method, path=request.path)
        return problem(500, "the agent failed at this; its log says more")
