"""A running agent's API, as the command line uses it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from agent.app import ADDRESS_FILE, ADMIN_TOKEN_FILE
from agent.errors import AgentError, ConfigurationError
from agent.settings import Settings


class AgentRefused(AgentError):
    """The agent answered with an error, or not at all."""


class Client:
    """Talks to the agent that the settings name: on this host it is found through its data directory."""

    def __init__(self, address: str, token: str) -> None:
        self._address = address
        self._http = aiohttp.ClientSession(
            base_url=address,
            headers={"Authorization": f"Bearer {token}"},
            timeout=aiohttp.ClientTimeout(total=None, connect=10, sock_read=60),
        )

    @classmethod
    def find(cls, settings: Settings) -> Self:
        """Return a client for the agent that runs with these settings.

        Raises:
            ConfigurationError: its admin token is not to be had.
        """
        data_dir = Path(settings.agent.data_dir)
        address = f"http://{settings.agent.host}:{settings.agent.port}"
        with contextlib.suppress(OSError, ValueError, KeyError):  # another host's agent: the settings say where
            address = json.loads((data_dir / ADDRESS_FILE).read_text())["address"]
        if settings.agent.admin_token is not None:
            return cls(address, settings.agent.admin_token.get_secret_value())
        try:
            return cls(address, (data_dir / ADMIN_TOKEN_FILE).read_text().strip())
        except OSError as error:
            raise ConfigurationError(
                f"no admin token: {data_dir / ADMIN_TOKEN_FILE}: {error.strerror}; run this where the agent runs,"
                " with its AGENT_DATA_DIR, or set AGENT_ADMIN_TOKEN"
            ) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def get(self, path: str, **query: str | None) -> Any:
        """Read JSON."""
        return await self._json("GET", path, query)

    async def post(self, path: str) -> Any:
        """Ask for something to be done."""
        return await self._json("POST", path, {})

    async def stream(self, path: str, **query: str | None) -> AsyncIterator[bytes]:
        """Read bytes as they come."""
        try:
            async with self._http.get(path, params=_given(query)) as response:
                await _check(response)
                async for piece in response.content.iter_any():
                    yield piece
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._away(error) from None

    async def _json(self, method: str, path: str, query: dict[str, str | None]) -> Any:
        try:
            async with self._http.request(method, path, params=_given(query)) as response:
                await _check(response)
                return await response.json()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._away(error) from None

    def _away(self, error: Exception) -> AgentRefused:
        return AgentRefused(f"no agent answers at {self._address} ({type(error).__name__}): is it running?")


def _given(query: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in query.items() if value is not None}


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.ok:
        return
    try:
        detail = (await response.json())["errors"]["detail"]
    except (ValueError, KeyError, TypeError, aiohttp.ClientError):
        detail = f"{response.status} {response.reason}"
    raise AgentRefused(str(detail))
