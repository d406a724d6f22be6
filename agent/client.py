"""A running agent's API, as the command line uses it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
from yarl import URL

from agent.errors import AgentError, ConfigurationError
from agent.logs import printable
from agent.settings import Settings

_LATER = frozenset({408, 429, 502, 503, 504})
_MOST_CHARACTERS = 2000


class AgentRefused(AgentError):
    """The agent answered with an error, or not at all; `status` is the HTTP status, None without an answer."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.transient = status is None or status in _LATER


class Client:
    """Talks to an agent: on this host it is found through its data directory.

    `if_refused` says what to do about a 401.
    """

    def __init__(self, address: str, token: str, if_refused: str = "AGENT_ADMIN_TOKEN must be the agent's") -> None:
        self._address = address
        self._if_refused = if_refused
        self._http = aiohttp.ClientSession(
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
        running = _running(settings.agent.address_file)
        if settings.agent.admin_token is not None:
            return cls(running or _configured(settings), settings.agent.admin_token.get_secret_value())
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

    async def post(self, *path: str, body: Any = None, query: Mapping[str, str | None] | None = None) -> Any:
        """Ask for something to be done."""
        return await self._json("POST", path, dict(query or {}), body)

    async def stream(
        self, *path: str, on_headers: Callable[[Mapping[str, str]], None] = lambda _: None, **query: str | None
    ) -> AsyncIterator[bytes]:
        """Read bytes as they come; a container may be silent for hours. `on_headers` is told what came before them."""
        silent = aiohttp.ClientTimeout(total=None, connect=10, sock_read=None)
        try:
            async with self._http.get(
                self._url(path), params=_given(query), timeout=silent, allow_redirects=False
            ) as response:
                await self._check(response)
                on_headers(response.headers)
                async for piece in response.content.iter_any():
                    yield piece
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._away(error) from None

    def _url(self, path: tuple[str, ...]) -> str:
        return self._address + "".join(f"/{quote(part, safe='')}" for part in path)

    async def _json(self, method: str, path: tuple[str, ...], query: dict[str, str | None], body: Any = None) -> Any:
        try:
            async with self._http.request(
                method, self._url(path), params=_given(query), json=body, allow_redirects=False
            ) as response:
                await self._check(response)
                return await response.json()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._away(error) from None

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status < 300:  # noqa: PLR2004 HTTP's own number
            return
        try:
            detail = str((await response.json())["errors"]["detail"])[:_MOST_CHARACTERS]
        except (ValueError, KeyError, TypeError, aiohttp.ClientError):
            detail = f"{self._address} answers {response.status} {response.reason}: is it an agent?"
        if response.status == 401:  # noqa: PLR2004 HTTP's own number
            detail += f": {self._address} does not take this one; {self._if_refused}"
        raise AgentRefused(printable(detail), status=response.status)  # names in it come from strangers

    def _away(self, error: Exception) -> AgentRefused:
        return AgentRefused(f"no agent answers at {self._address} ({type(error).__name__}): is it running?")


def agent_address(settings: Settings) -> str:
    """Return where the agent listens that runs with these settings.

    Raises:
        AgentRefused: no agent of this data directory runs, and the settings name no address of another. Whoever
            listens at the usual one is not to see a token.
    """
    if running := _running(settings.agent.address_file):
        return running
    fields = type(settings.agent).model_fields
    if all(getattr(settings.agent, name) == fields[name].default for name in ("host", "port")):
        raise AgentRefused(
            f"no agent runs on {settings.agent.data_dir}: name yours with --url http://HOST:PORT, or start one here"
            " with `ovation-agent serve`"
        )
    return _configured(settings)


def web_address(text: str) -> URL:
    """Return an address that a person typed, without a slash at its end.

    Raises:
        ConfigurationError: it is none, or carries what should not be on a command line.
    """
    try:
        found = URL(text.strip())
        usable = found.scheme in {"http", "https"} and bool(found.host) and found.port is not None
    except (ValueError, IndexError):  # the second for `https://[]@`
        usable = False
    if not usable:
        raise ConfigurationError(f"{printable(text)!r} is no address such as https://agent.example.org")
    if found.user or found.password or found.query_string or found.fragment:
        raise ConfigurationError("the address must carry no user name, password, query or fragment")
    return found.with_path(found.raw_path.rstrip("/"), encoded=True)


def front_address(text: str) -> str:
    """Return the address before the agent's own paths, of one that may end in `/hpc_run`.

    Raises:
        ConfigurationError: see `web_address`.
    """
    return str(web_address(text)).rstrip("/").removesuffix("/hpc_run").rstrip("/")


def _configured(settings: Settings) -> str:
    host = settings.agent.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.agent.port}"


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


def _given(query: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in query.items() if value is not None}
