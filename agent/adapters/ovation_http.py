"""Calls to Ovation: the token and where it may go, what is asked again, and what is not asked while it is away."""

from __future__ import annotations

import asyncio
import functools
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from typing import Any

import aiohttp
import jwt
import tenacity
from yarl import URL

from agent.adapters.circuit import PATIENCE_SECONDS, Circuit, ask
from agent.adapters.origins import UNREADABLE, Origins
from agent.adapters.ovation_answers import exchange
from agent.errors import OvationError, OvationRefused, OvationUnavailable
from agent.settings import OvationSettings

_ATTEMPTS = 4
_LAST_ATTEMPT_SECONDS = 15.0  # none is begun later, so that a call into a black hole ends within 45 s
_REFRESH_EARLY_SECONDS = 60.0
_TOKEN_SECONDS = 3600.0  # where the answer does not say
_TOKEN = re.compile(r"[!-~]+")
_NOBODY = "00000000-0000-0000-0000-000000000000"  # the id of no entity: nothing is cheaper to ask for


class Connection:
    """Calls Ovation with one token: a fixed one, or a service account's, fetched and renewed as needed.

    With a circuit, calls are refused while Ovation is away; whoever hands out tokens has a circuit of its own then.
    """

    def __init__(
        self,
        settings: OvationSettings,
        http: aiohttp.ClientSession,
        user_token: str | None = None,
        circuit: Circuit | None = None,
        probe: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._api = URL(settings.api_url)
        self._http = http
        self._settings = settings
        self.origins = Origins(settings.api_url, settings.hosts)
        self._token = user_token or (settings.token.get_secret_value() if settings.token else None)
        self._renewable = self._token is None
        self._refresh_at = self._expires_at = 0.0
        self._fetching: asyncio.Task[None] | None = None
        self._for_all = user_token is None  # what is asked of one person is not asked of everybody
        self._probe = probe or self._is_there
        self._circuit = circuit
        self._token_circuit = (
            Circuit("Ovation's token service", OvationUnavailable) if circuit is not None and self._renewable else None
        )

    def for_person(self, token: str) -> Connection:
        """Return a view with a person's own token; it shares connections and circuit."""
        return Connection(self._settings, self._http, token, self._circuit, self._probe)

    async def claims(self) -> Mapping[str, Any] | None:
        """Return what the token says of itself, unverified; nothing of one that is no JSON Web Token.

        Raises:
            OvationRefused, OvationUnavailable: there is none.
        """
        try:
            found: dict[str, Any] = jwt.decode(await self._bearer(), options={"verify_signature": False})
        except jwt.InvalidTokenError:
            return None
        return found

    async def close(self) -> None:
        """Close the connections."""
        if self._fetching is not None:
            self._fetching.cancel()
        for circuit in self._circuits():
            await circuit.close()
        await self._http.close()

    @property
    def away(self) -> bool:
        """Whether calls to the API would be refused now."""
        if self._circuit is not None and self._circuit.refuses(_origin(self._api)):
            return True
        without = self._token is None or time.monotonic() > self._expires_at
        circuit, address = self._token_circuit, _origin(URL(self._settings.auth_domain))
        return circuit is not None and without and circuit.refuses(address)

    def on_back(self, callback: Callable[[], Awaitable[object]]) -> None:
        """Have this called whenever calls that were refused get through again."""
        for circuit in self._circuits():
            circuit.on_back(callback)

    def _circuits(self) -> list[Circuit]:
        return [circuit for circuit in (self._circuit, self._token_circuit) if circuit is not None]

    def address(self, path: str) -> URL:
        """Return where a link of Ovation's leads.

        Raises:
            OvationError: it is no address, or leads to a stranger.
        """
        try:
            url = self._api.join(URL(path))
        except UNREADABLE:
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
            request = {"headers": headers, "json": json, "params": query}
            return await self._guarded(self._circuit, self._probe, method, url, request, repeatable=again)

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
                if self._token == refused:
                    self._token = None  # it opens nothing any more
                if self._token is None or time.monotonic() > self._expires_at:
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
        url, request = self._token_request()
        try:
            answer = await self._guarded(self._token_circuit, self._hands_out, "POST", url, request, repeatable=True)
        except OvationUnavailable:
            raise
        except OvationError as error:
            # What the answer says is left out: it may repeat what it was sent.
            raise OvationRefused(
                f"{url.host} gives no token ({error.status}): check OVATION_CLIENT_ID, OVATION_CLIENT_SECRET,"
                " OVATION_AUDIENCE and OVATION_AUTH_DOMAIN",
                status=error.status,
            ) from None
        self._keep(answer)

    def _token_request(self) -> tuple[URL, dict[str, Any]]:
        secret = self._settings.client_secret
        body = {
            "client_id": self._settings.client_id,
            "client_secret": secret.get_secret_value() if secret else None,
            "audience": self._settings.audience,
            "grant_type": "client_credentials",
        }
        return URL(self._settings.auth_domain) / "oauth/token", {"headers": {}, "json": body}

    def _keep(self, answer: dict[str, Any]) -> None:
        token = answer.get("access_token")
        if not isinstance(token, str) or not token:
            raise OvationRefused(
                f"{URL(self._settings.auth_domain).host} answers without a token: check OVATION_AUTH_DOMAIN"
            )
        seconds = _lifetime_seconds(answer.get("expires_in"))
        now = time.monotonic()
        self._token = token
        self._expires_at = now + seconds
        self._refresh_at = now + seconds - min(_REFRESH_EARLY_SECONDS, seconds / 4)

    async def _hands_out(self, origin: str) -> None:
        """Ask the token service for a token, which is what it is there for; then there is one."""
        del origin
        url, request = self._token_request()
        self._keep(await self._send("POST", url, request))

    async def _is_there(self, origin: str) -> None:
        """Ask the API for an entity that does not exist, and any other address for its root, without a token."""
        if origin != _origin(self._api):
            await ask(origin, OvationUnavailable)
            return
        token = self._token if self._token and _TOKEN.fullmatch(self._token) else None
        organization = self._settings.organizations[0] if self._settings.organizations else 0
        url = self.address(f"/api/v1/o/{organization}/entities/{_NOBODY}?trash=false")
        await self._send("GET", url, {"headers": {"Authorization": f"Bearer {token}"} if token else {}})

    async def _guarded(
        self,
        circuit: Circuit | None,
        probe: Callable[[str], Awaitable[None]],
        method: str,
        url: URL,
        request: dict[str, Any],
        *,
        repeatable: bool,
    ) -> dict[str, Any]:
        """Call while the party is there."""
        origin = _origin(url)
        failed: OvationUnavailable | None = None

        async def attempt() -> dict[str, Any]:
            nonlocal failed
            if circuit is None:
                return await self._send(method, url, request)
            if failed is not None and circuit.refuses(origin):  # others have found that out meanwhile
                failed.away = True
                raise failed
            await circuit.turn(origin)
            try:
                return await self._send(method, url, request)
            except OvationUnavailable as error:
                if self._for_all:
                    circuit.asked(origin, error.retry_after_seconds)
                failed = error
                raise

        guard = circuit.guard(origin, functools.partial(probe, origin), for_all=self._for_all) if circuit else None
        async with guard or nullcontext():
            return await self._retried(attempt, repeatable=repeatable)

    async def _retried(self, attempt: Callable[[], Awaitable[dict[str, Any]]], *, repeatable: bool) -> dict[str, Any]:
        """Ask again after what may pass, for some seconds.

        What must not happen twice is asked for again only when it certainly did not happen: no connection, 429, or a
        503 that says when to come back. A bare 503 proves nothing, because there are routers that answer so when they
        lose patience with a server that goes on working; the step that wanted it looks before it asks again.
        """

        def worth_it(error: BaseException) -> bool:
            return (
                isinstance(error, OvationUnavailable)
                and not error.away
                and (repeatable or error.not_done)
                and (error.retry_after_seconds or 0) <= PATIENCE_SECONDS
            )

        def wait_seconds(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after_seconds if isinstance(error, OvationUnavailable) else None
            return (asked or 0.0) + backoff(state)

        backoff = tenacity.wait_random_exponential(multiplier=0.2, max=3)
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS) | tenacity.stop_before_delay(_LAST_ATTEMPT_SECONDS),
            wait=wait_seconds,
            retry=tenacity.retry_if_exception(worth_it),
            reraise=True,
        )
        answer: dict[str, Any] = await retrying(attempt)
        return answer

    async def _send(self, method: str, url: URL, request: dict[str, Any]) -> dict[str, Any]:
        who = "Ovation" if url in self.origins else str(url.host)
        return await exchange(self._http, who, method, url, request, self._secrets(request))

    def _secrets(self, request: dict[str, Any]) -> list[str]:
        authorization = request["headers"].get("Authorization", "")
        secret = self._settings.client_secret
        return [authorization.removeprefix("Bearer "), secret.get_secret_value() if secret else ""]


def _origin(url: URL) -> str:
    return str(url.origin())


def _lifetime_seconds(given: object) -> float:
    try:
        seconds = float(given) if isinstance(given, int | float | str) else _TOKEN_SECONDS
    except ValueError:
        return _TOKEN_SECONDS
    return seconds if math.isfinite(seconds) and seconds > 0 else _TOKEN_SECONDS
