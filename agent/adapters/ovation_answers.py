"""One request to Ovation over HTTP, and what its answer means."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import aiohttp
from yarl import URL

from agent.adapters import documents
from agent.adapters.circuit import retry_after_seconds
from agent.errors import OvationError, OvationNotFound, OvationRefused, OvationUnavailable

_ANSWER_SECONDS = 30.0  # for an answer, and longer while it arrives at this rate:
_LEAST_BYTES_PER_SECOND = 16_384
_MAX_BODY_BYTES = 64 << 20
_PARSED_AT_ONCE_BYTES = 1 << 20
_SAID_SECONDS = 5.0
_SAID_BYTES = 8192
_SAID_CHARACTERS = 500
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


async def exchange(
    http: aiohttp.ClientSession, who: str, method: str, url: URL, request: dict[str, Any], secrets: Sequence[str]
) -> dict[str, Any]:
    """Send one request and return the JSON object that is answered.

    Args:
        http: the connections.
        who: whom it goes to, for messages.
        method: HTTP's.
        url: where it goes.
        request: the rest of it, as aiohttp takes it.
        secrets: what is taken out of whatever the answer says.

    Raises:
        OvationUnavailable, OvationRefused, OvationNotFound, OvationError: see `agent.errors`.
    """
    what = f"{method} {url.path}"
    try:
        async with (
            asyncio.timeout(_ANSWER_SECONDS) as limit,
            http.request(method, url, allow_redirects=False, **request) as response,
        ):
            if response.status >= 300:  # noqa: PLR2004 HTTP's own number
                raise _refusal(who, what, response, await _said(response, secrets))
            body = await _read(response, what, limit)
        return await _object(body, what, response.status)
    except aiohttp.ConnectionTimeoutError:
        raise OvationUnavailable(f"{who} cannot be reached for {what} in time", not_done=True) from None
    except TimeoutError:
        raise OvationUnavailable(f"{who} does not answer {what} in time") from None
    except aiohttp.ClientConnectorError as error:
        reason = error.os_error.strerror or type(error).__name__
        raise OvationUnavailable(f"{who} cannot be reached for {what}: {reason}", not_done=True) from None
    except (aiohttp.ClientError, OSError) as error:
        raise OvationUnavailable(f"{who} broke off {what}: {type(error).__name__}") from None


async def _read(response: aiohttp.ClientResponse, what: str, limit: asyncio.Timeout) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise OvationError(f"Ovation's answer to {what} is too large", status=response.status)
        limit.reschedule((limit.when() or 0.0) + len(chunk) / _LEAST_BYTES_PER_SECOND)
    return bytes(body)


async def _object(body: bytes, what: str, status: int) -> dict[str, Any]:
    if status == 204:  # noqa: PLR2004 HTTP's own number
        return {}
    try:
        large = len(body) > _PARSED_AT_ONCE_BYTES
        parsed = await asyncio.to_thread(documents.parse, body) if large else documents.parse(body)
    except ValueError:
        found = "not JSON" if body else "empty"
        raise OvationUnavailable(f"Ovation's answer to {what} is {found}", status=status) from None
    if not isinstance(parsed, dict):
        raise OvationError(f"Ovation's answer to {what} is not an object", status=status)
    return parsed


def _refusal(who: str, what: str, response: aiohttp.ClientResponse, said: str) -> OvationError:
    status = response.status
    if status in _TRANSIENT:
        seconds = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
        not_done = status == 429 or (status == 503 and seconds is not None)  # noqa: PLR2004 HTTP's own numbers
        message = f"{who} answers {what} with {status}"
        return OvationUnavailable(message, status=status, retry_after_seconds=seconds, not_done=not_done)
    if status < 400:  # noqa: PLR2004 HTTP's own number
        message = f"{who} redirects {what}; the token does not go along: set OVATION_API_URL to where the API is"
        return OvationError(message, status=status)
    reason = f": {said}" if said else ""
    if status in {401, 403}:
        return OvationRefused(f"{who} refuses {what} with {status}: is the token valid for it?{reason}", status=status)
    if status == 404:  # noqa: PLR2004 HTTP's own number
        return OvationNotFound(f"{who} has nothing at {what}, or hides it from this token", status=status)
    return OvationError(f"{who} answers {what} with {status}{reason}", status=status)


async def _said(response: aiohttp.ClientResponse, secrets: Sequence[str]) -> str:
    """Return what an error's body says, in one line; that it does not come is no error of its own."""
    body = bytearray()
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(_SAID_SECONDS):
            while len(body) < _SAID_BYTES and (chunk := await response.content.read(_SAID_BYTES - len(body))):
                body += chunk
    said = body.decode(errors="replace")
    with suppress(ValueError, TypeError, KeyError):
        said = str(documents.parse(bytes(body))["errors"]["detail"])
    for secret in filter(None, secrets):
        said = said.replace(secret, "[redacted]")
    return " ".join(said.split())[:_SAID_CHARACTERS]
