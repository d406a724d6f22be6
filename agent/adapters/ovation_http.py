"""Calls to Ovation over HTTP: the token and where it may go, what is asked again, and what an answer means."""

from __future__ import annotations

import asyncio
import math
import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import tenacity
from yarl import URL

from agent.adapters import documents
from agent.adapters.origins import Origins
from agent.errors import OvationError, OvationNotFound, OvationRefused, OvationUnavailable
from agent.settings import OvationSettings

_ATTEMPTS = 4
_RETRY_AFTER_MAX_SECONDS = 10.0  # asked for more, the call ends and its step waits
_REFRESH_EARLY_SECONDS = 60.0
_TOKEN_SECONDS = 3600.0  # where the answer does not say
_MAX_BODY_BYTES = 64 << 20
_PARSED_AT_ONCE_BYTES = 1 << 20
_ERROR_BYTES = 500
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_TOKEN = re.compile(r"[!-~]+")


class Connection:
    """Calls Ovation with one token: a fixed one, or a service account's, fetched and renewed as needed."""

    def __init__(self, settings: OvationSettings, http: aiohttp.ClientSession, user_token: str | None = None) -> None:
        self._api = URL(settings.api_url)
        self._http = http
        self._settings = settings
        self.origins = Origins(settings.api_url, settings.hosts)
        self._token = user_token or (settings.token.get_secret_value() if settings.token else None)
        self._renewable = self._token is None
        self._refresh_at = self._expires_at = 0.0
        self._fetching: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._fetching is not None:
            self._fetching.cancel()
        await self._http.close()

    def address(self, path: str) -> URL:
        """Return where a link of Ovation's leads.

        Raises:
            OvationError: it is no address, or leads to a stranger.
        """
        try:
            url = self._api.join(URL(path))
        except ValueError:
            raise OvationError("Ovation points to an address that cannot be read") from None
        if url not in self.origins:
            raise OvationError(f"Ovation points to {url.host}, which is not one of its own hosts (OVATION_HOSTS)")
        return url

    async def call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: dict[str, str] | None = None,
        repeatable: bool | None = None,
        token_in_query: bool = False,
    ) -> dict[str, Any]:
        """Call Ovation with the token, again when that may help, and return the JSON object that it answers.

        Args:
            method: HTTP's.
            path: a path, or an address at one of Ovation's own origins.
            json: the body.
            params: the query.
            repeatable: whether asking twice does no harm; by default everything but POST.
            token_in_query: send the token as `?token=` too, as the released client does for files.

        Raises:
            OvationUnavailable, OvationRefused, OvationNotFound, OvationError: see `agent.errors`.
        """
        url = self.address(path)
        again = method != "POST" if repeatable is None else repeatable

        async def once(token: str) -> dict[str, Any]:
            query = {**(params or {}), **({"token": token} if token_in_query else {})}
            headers = {"Authorization": f"Bearer {token}"}
            return await self._retried(method, url, repeatable=again, headers=headers, json=json, params=query)

        token = await self._bearer()
        try:
            return await once(token)
        except OvationRefused as error:
            if error.status != 401 or not self._renewable:  # noqa: PLR2004 HTTP's own number
                raise
            # A service token may be revoked before it expires. What is refused was not done: also a POST goes again.
            return await once(await self._bearer(refused=token))

    async def _bearer(self, refused: str | None = None) -> str:
        if self._renewable and (self._token in {None, refused} or time.monotonic() > self._refresh_at):
            try:
                await self._fetched()
            except OvationUnavailable:
                if self._token in {None, refused} or time.monotonic() > self._expires_at:
                    raise
        if self._token is None:
            raise OvationRefused("no token: set OVATION_TOKEN, or OVATION_CLIENT_ID and OVATION_CLIENT_SECRET")
        if not _TOKEN.fullmatch(self._token):
            raise OvationRefused("the token has spaces, line breaks or other characters that no token has", status=401)
        return self._token

    async def _fetched(self) -> None:
        """Fetch a token, once for all that wait for it; one of them going away does not stop it for the others."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch(), name="service token")
            self._fetching.add_done_callback(self._forget)
        await asyncio.shield(self._fetching)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._fetching = None
        if not task.cancelled():
            task.exception()  # those that wait have it, and perhaps nobody waits any more

    async def _fetch(self) -> None:
        settings = self._settings
        if settings.client_id is None or settings.client_secret is None:
            return
        body = {
            "client_id": settings.client_id,
            "client_secret": settings.client_secret.get_secret_value(),
            "audience": settings.audience,
            "grant_type": "client_credentials",
        }
        url = URL(settings.auth_domain) / "oauth/token"
        try:
            answer = await self._retried("POST", url, repeatable=True, headers={}, json=body, params={})
        except OvationUnavailable:
            raise
        except OvationError as error:
            # What the answer says is left out: it may repeat what it was sent.
            raise OvationRefused(
                f"{url.host} gives no token ({error.status}): check OVATION_CLIENT_ID, OVATION_CLIENT_SECRET,"
                " OVATION_AUDIENCE and OVATION_AUTH_DOMAIN",
                status=error.status,
            ) from None
        token = answer.get("access_token")
        if not isinstance(token, str) or not token:
            raise OvationRefused(f"{url.host} answers without a token: check OVATION_AUTH_DOMAIN")
        seconds = _lifetime_seconds(answer.get("expires_in"))
        now = time.monotonic()
        self._token = token
        self._expires_at = now + seconds
        self._refresh_at = now + seconds - min(_REFRESH_EARLY_SECONDS, seconds / 4)

    async def _retried(self, method: str, url: URL, *, repeatable: bool, **request: Any) -> dict[str, Any]:
        """Ask again after what may pass.

        What must not happen twice is asked for again only when it certainly did not happen: no connection, 429, or a
        503 that says when to come back. A bare 503 proves nothing, because there are routers that answer so when they
        lose patience with a server that goes on working; the step that wanted it looks before it asks again.
        """

        def worth_it(error: BaseException) -> bool:
            return (
                isinstance(error, OvationUnavailable)
                and (repeatable or error.not_done)
                and (error.retry_after_seconds or 0) <= _RETRY_AFTER_MAX_SECONDS
            )

        def wait_seconds(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after_seconds if isinstance(error, OvationUnavailable) else None
            return (asked or 0.0) + backoff(state)

        backoff = tenacity.wait_random_exponential(multiplier=0.2, max=3)
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=wait_seconds,
            retry=tenacity.retry_if_exception(worth_it),
            reraise=True,
        )
        answer: dict[str, Any] = await retrying(self._send, method, url, request)
        return answer

    async def _send(self, method: str, url: URL, request: dict[str, Any]) -> dict[str, Any]:
        what = f"{method} {url.path}"
        try:
            async with self._http.request(method, url, allow_redirects=False, **request) as response:
                if response.status >= 300:  # noqa: PLR2004 HTTP's own number
                    raise _refusal(what, response, await response.content.read(_ERROR_BYTES), self._secrets(request))
                body = await _read(response, what)
            return await _object(body, what, response.status)
        except aiohttp.ConnectionTimeoutError:
            raise OvationUnavailable(f"Ovation cannot be reached for {what} in time", not_done=True) from None
        except TimeoutError:
            raise OvationUnavailable(f"Ovation does not answer {what} in time") from None
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or type(error).__name__
            raise OvationUnavailable(f"Ovation cannot be reached for {what}: {reason}", not_done=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise OvationUnavailable(f"Ovation broke off {what}: {type(error).__name__}") from None

    def _secrets(self, request: dict[str, Any]) -> list[str]:
        authorization = request["headers"].get("Authorization", "")
        secret = self._settings.client_secret
        return [authorization.removeprefix("Bearer "), secret.get_secret_value() if secret else ""]


async def _read(response: aiohttp.ClientResponse, what: str) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise OvationError(f"Ovation's answer to {what} is too large", status=response.status)
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


def _refusal(what: str, response: aiohttp.ClientResponse, body: bytes, secrets: list[str]) -> OvationError:
    status = response.status
    if status in _TRANSIENT:
        seconds = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
        not_done = status == 429 or (status == 503 and seconds is not None)  # noqa: PLR2004 HTTP's own numbers
        message = f"Ovation answers {what} with {status}"
        return OvationUnavailable(message, status=status, retry_after_seconds=seconds, not_done=not_done)
    if status < 400:  # noqa: PLR2004 HTTP's own number
        message = f"Ovation redirects {what}; the token does not go along: set OVATION_API_URL to where the API is"
        return OvationError(message, status=status)
    if status in {401, 403}:
        return OvationRefused(f"Ovation refuses {what} with {status}: is the token valid for it?", status=status)
    if status == 404:  # noqa: PLR2004 HTTP's own number
        return OvationNotFound(f"Ovation has nothing at {what}, or hides it from this token", status=status)
    said = body.decode(errors="replace")
    for secret in filter(None, secrets):
        said = said.replace(secret, "[redacted]")
    return OvationError(f"Ovation answers {what} with {status}: {' '.join(said.split())}", status=status)


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """Return how long a `Retry-After` header asks to wait: seconds or a date; None for what is neither."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    with suppress(ValueError, OverflowError):
        date = parsedate_to_datetime(value)
        aware = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (aware - now).total_seconds())
    return None


def _lifetime_seconds(given: object) -> float:
    try:
        seconds = float(given) if isinstance(given, int | float | str) else _TOKEN_SECONDS
    except ValueError:
        return _TOKEN_SECONDS
    return seconds if math.isfinite(seconds) and seconds > 0 else _TOKEN_SECONDS
