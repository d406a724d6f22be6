"""A running agent's API, as the command line uses it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp

from agent.errors import AgentError, ConfigurationError
from agent.logs import printable
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
            connector=aiohttp.TCPConnector(socket_factory=_kept_alive),
        )

    @classmethod
    def find(cls, settings: Settings) -> Self:
        """Return a client for the agent that runs with these settings.

        Raises:
            ConfigurationError: its admin token is not to be had.
            AgentRefused: the agent of this data directory does not run.
        """
        host = settings.agent.host
        address = f"http://{f'[{host}]' if ':' in host else host}:{settings.agent.port}"
        running = _running(settings.agent.address_file)
        if settings.agent.admin_token is not None:
            return cls(running or address, settings.agent.admin_token.get_secret_value())
        try:
            token = settings.agent.admin_token_file.read_text().strip()
        except OSError as error:
            raise ConfigurationError(
                f"no admin token: {settings.agent.admin_token_file}: {error.strerror}; run this where the agent runs,"
                " with its AGENT_DATA_DIR, or set AGENT_ADMIN_TOKEN"
            ) from None
        if running is None:  # whoever listens there now is not to see the token
            raise AgentRefused(
                f"the agent of {settings.agent.data_dir} is not running: start it with `ovation-agent serve`"
            )
        return cls(running, token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def get(self, *path: str, **query: str | None) -> Any:
        """Read JSON."""
        return await self._json("GET", path, query)

    async def post(self, *path: str) -> Any:
        """Ask for something to be done."""
        return await self._json("POST", path, {})

    async def stream(self, *path: str, **query: str | None) -> AsyncIterator[bytes]:
        """Read bytes as they come; a container may be silent for hours."""
        silent = aiohttp.ClientTimeout(total=None, connect=10, sock_read=None)
        try:
            async with self._http.get(_path(path), params=_given(query), timeout=silent) as response:
                await self._check(response)
                async for piece in response.content.iter_any():
                    yield piece
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._away(error) from None

    async def _json(self, method: str, path: tuple[str, ...], query: dict[str, str | None]) -> Any:
        try:
            async with self._http.request(method, _path(path), params=_given(query), allow_redirects=False) as response:
                await self._check(response)
                return await response.json()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._away(error) from None

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.ok:
            return
        try:
            detail = str((await response.json())["errors"]["detail"])
        except (ValueError, KeyError, TypeError, aiohttp.ClientError):
            detail = f"{self._address} answers {response.status} {response.reason}: is it an agent?"
        if response.status == 401:  # noqa: PLR2004 HTTP's own number
            detail += f": {self._address} does not take this one; AGENT_ADMIN_TOKEN must be the agent's"
        raise AgentRefused(printable(detail))  # names in it come from strangers

    def _away(self, error: Exception) -> AgentRefused:
        return AgentRefused(f"no agent answers at {self._address} ({type(error).__name__}): is it running?")


def _running(file: Path) -> str | None:
    """Return where the agent that wrote the file listens, while its process lives."""
    try:
        written = json.loads(file.read_text())
        address, pid = str(written["address"]), int(written["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:  # it lives, as another user
        return address
    except (ProcessLookupError, OverflowError):
        return None
    return address


def _kept_alive(address: aiohttp.AddrInfoType) -> socket.socket:
    """Make a socket that notices when the other machine is gone, however silent the agent is."""
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    return made


def _path(parts: tuple[str, ...]) -> str:
    return "/" + "/".join(quote(part, safe="") for part in parts)


def _given(query: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in query.items() if value is not None}
