"""Ovation's lab generation of webhooks: subscriptions of a project template. Source: Ovation's support article 350."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import aiohttp

from agent import __version__
from agent.adapters import documents
from agent.adapters.ovation_http import Connection
from agent.errors import OvationError, OvationNotFound
from agent.settings import OvationSettings


@dataclass(frozen=True, slots=True)
class Subscription:
    """One event of one template that is sent to one address. Ovation never shows its password."""

    id: str
    event: str
    target_url: str
    username: str | None = field(default=None, repr=False)


class Subscriptions:
    """The subscriptions of one project template."""

    def __init__(self, connection: Connection, template_id: str) -> None:
        self._call = connection.call
        self._path = f"/api/v3/project_templates/{quote(template_id, safe='')}/webhook_endpoints"

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: OvationSettings, template_id: str) -> AsyncIterator[Subscriptions]:
        """Open a session with the agent's own account; nothing is sent yet."""
        if not template_id.strip("."):
            raise OvationNotFound(f"{template_id!r} is not the id of a project template", status=404)
        http = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=60, connect=10, sock_read=30),
            headers={"Accept": "application/json", "User-Agent": f"ovation-agent/{__version__}"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        connection = Connection(settings, http)
        try:
            yield cls(connection, template_id)
        finally:
            await connection.close()

    async def all(self) -> list[Subscription]:
        """Return every one, in Ovation's order."""
        found = (await self._call("GET", self._path)).get("webhook_endpoints")
        if not isinstance(found, list):
            raise OvationError("Ovation's answer has no webhook_endpoints")
        return [_subscription(each) for each in found]

    async def get(self, subscription_id: str) -> Subscription:
        """Return one.

        Raises:
            OvationNotFound: the template has none of that id.
        """
        return _subscription(documents.inner(await self._call("GET", self._one(subscription_id)), "webhook_endpoint"))

    async def add(
        self, target_url: str, event: str, credentials: tuple[str, str] | None
    ) -> tuple[Subscription, bool, list[Subscription]]:
        """Have an event sent to an address, once, with this user name and password.

        Returns:
            The subscription, whether it was made now, and others that are the same but for their id. One that was
            there gets the credentials: a password cannot be read, so nobody knows whether it had them.
        """
        same = [each for each in await self.all() if (each.target_url, each.event) == (target_url, event)]
        body: dict[str, Any] = {"target_url": target_url, "event": event}
        if credentials is not None:
            body |= {"username": credentials[0], "password": credentials[1]}
        if same:
            await self._call("PUT", self._one(same[0].id), json={"webhook_endpoint": body})
            return replace(same[0], username=body.get("username", same[0].username)), False, same[1:]
        answer = await self._call("POST", self._path, json={"webhook_endpoint": body})
        return _subscription(documents.inner(answer, "webhook_endpoint")), True, []

    async def remove(self, subscription_id: str) -> Subscription:
        """Remove one and return what it was.

        Raises:
            OvationNotFound: the template has none of that id.
        """
        found = await self.get(subscription_id)
        with suppress(OvationNotFound):  # where an answer was lost, the second request finds it gone
            await self._call("DELETE", self._one(subscription_id))
        return found

    def _one(self, subscription_id: str) -> str:
        if not subscription_id.strip("."):
            raise OvationNotFound(f"{subscription_id!r} is not the id of a subscription", status=404)
        return f"{self._path}/{quote(subscription_id, safe='')}"


def _subscription(document: Mapping[str, Any]) -> Subscription:
    found = document.get("id") if isinstance(document, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
        raise OvationError("Ovation's answer has a webhook_endpoint without an id")
    username = document.get("username")
    return Subscription(
        id=str(found),
        event=documents.text(document.get("event"), ""),
        target_url=documents.text(document.get("target_url"), ""),
        username=username if isinstance(username, str) and username else None,
    )
