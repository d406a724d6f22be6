"""Bring one Revision's bytes to disk, whole and verified, or not at all."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from agent import __version__
from agent.adapters.circuit import Circuit, ask, retry_after_seconds
from agent.adapters.remote import RemoteGuard
from agent.errors import StorageError, StorageMismatch, StorageRefused, StorageUnavailable

_CHUNK_BYTES = 1 << 20
# No byte for so long: cut; a slow link is not a stall. Half a minute, so that what hung in a store is fetched again
# within a minute of its coming back to life.
_STALL_SECONDS = 30.0
_CONNECT_SECONDS = 20.0
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SENDABLE = re.compile(r"[!-~]+")
_ERROR_BYTES = 4096
_CODE = re.compile(rb"<Code>(\w{1,64})</Code>")
_PLAIN_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


@dataclass(frozen=True, slots=True)
class Fetched:
    """What arrived."""

    size: int
    sha256: str


class Downloader:
    """Fetches from the object store, and from strangers' servers with more caution.

    How many transfers there are at once is the callers' business: waiting here for a connection would look like an
    outage. With a circuit, nothing is fetched from the object store while it is away; strangers' servers have none.
    """

    def __init__(
        self,
        remote_hosts: Sequence[str] = (),
        stall_seconds: float = _STALL_SECONDS,
        remote_max_bytes: int | None = None,
        circuit: Circuit | None = None,
    ) -> None:
        self._stall_seconds = stall_seconds
        self._remote_max_bytes = remote_max_bytes
        self._guard = RemoteGuard(remote_hosts)
        self._circuit = circuit
        self._store = self._session(aiohttp.TCPConnector(limit=0))
        self._remote = self._session(aiohttp.TCPConnector(limit=0, resolver=self._guard, force_close=True))

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS, sock_read=self._stall_seconds),
            headers={"Accept-Encoding": "identity", "User-Agent": f"ovation-agent/{__version__}"},
            # Where a server compresses all the same, the bytes are kept as sent: those are what it vouches for.
            auto_decompress=False,
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._circuit is not None:
            await self._circuit.close()
        await self._store.close()
        await self._remote.close()

    async def fetch(
        self, url: str, path: Path, *, remote: bool, name: str, progress: Callable[[int], None] = lambda _: None
    ) -> Fetched:
        """Fetch `url` to `path` by way of a `.part` file, verified and renamed; after a failure there is neither.

        Args:
            url: presigned, or a stranger's; carries no Ovation token and is never logged.
            path: where the file goes; its directory exists.
            remote: the address is a stranger's.
            name: what people call the file, for messages.
            progress: told the number of bytes of each piece as it arrives.

        Raises:
            StorageUnavailable: the object store is away or broke off, or the address has expired; try again.
            StorageMismatch: the bytes did not arrive whole, are not the ones that the store says it has, or a
                stranger's server is away.
            StorageRefused: the server refuses, or the address may not be read.
            OSError: this machine's disk refuses.
        """
        try:
            address = _address(url)
            async with self._while_there(address, remote=remote), self._translated(remote=remote):
                return await self._fetch(address, path, remote=remote, progress=progress)
        except StorageError as error:
            if not (isinstance(error, StorageUnavailable) and error.away):  # that is no matter of this one file
                error.args = (f"{name}: {error}",)
            raise

    def _while_there(self, address: URL, *, remote: bool) -> AbstractAsyncContextManager[None]:
        if remote or self._circuit is None or not address.host:
            return nullcontext()
        origin = str(address.origin())
        return self._circuit.guard(origin, functools.partial(ask, origin, StorageUnavailable))

    @asynccontextmanager
    async def _translated(self, *, remote: bool) -> AsyncIterator[None]:
        away = StorageMismatch if remote else StorageUnavailable
        try:
            yield
        except aiohttp.ConnectionTimeoutError:
            raise away(f"no connection to its server within {_CONNECT_SECONDS:.0f} s") from None
        except TimeoutError:
            raise away(f"no byte arrived for {self._stall_seconds:g} s") from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise StorageRefused("its address is not one that can be read") from None
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or type(error).__name__
            raise away(f"its server cannot be reached ({reason})") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise away(f"the transfer broke off ({type(error).__name__})") from None

    async def _fetch(self, address: URL, path: Path, *, remote: bool, progress: Callable[[int], None]) -> Fetched:
        session = self._remote if remote else self._store
        for _ in range(_MAX_REDIRECTS + 1):
            if remote:
                self._guard.check(address)
            async with session.get(address, allow_redirects=False) as response:
                if response.status in _REDIRECTS and remote:
                    address = address.join(_address(response.headers.get("Location", "")))
                    continue
                await _check_status(response, remote=remote)
                most_bytes = self._remote_max_bytes if remote else None
                return await _save(response, path, progress, vouched=not remote, most_bytes=most_bytes)
        raise StorageRefused(f"more than {_MAX_REDIRECTS} redirects")


def _address(url: str) -> URL:
    """Return a presigned address as it was signed; what no request line can hold is quoted."""
    try:
        return URL(url, encoded=_SENDABLE.fullmatch(url) is not None)
    except ValueError:
        raise StorageRefused("its address is not one that can be read") from None


async def _check_status(response: aiohttp.ClientResponse, *, remote: bool) -> None:
    status = response.status
    if status == 200:  # noqa: PLR2004 HTTP's own number
        return
    whose = "its server" if remote else "the object store"
    if status >= 500 or status in {408, 425, 429}:  # noqa: PLR2004 HTTP's own number
        if remote:
            raise StorageMismatch(f"{whose} answers {status}")
        seconds = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
        raise StorageUnavailable(f"{whose} answers {status}", retry_after_seconds=seconds)
    said = b"" if remote else await _beginning(response)
    if status in {400, 403} and b"expired" in said.lower():
        raise StorageUnavailable(f"its address had expired ({whose} answers {status})")  # the next try has a fresh one
    code = _CODE.search(said)
    answer = f"{status} {code[1].decode()}" if code else str(status)
    raise StorageRefused(f"its bytes are not there ({whose} answers {answer})")


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """Return how an error's body begins; that it does not come is no error of its own."""
    said = bytearray()
    with suppress(TimeoutError, aiohttp.ClientError):
        while len(said) < _ERROR_BYTES and (chunk := await response.content.read(_ERROR_BYTES - len(said))):
            said += chunk
    return bytes(said)


async def _save(
    response: aiohttp.ClientResponse,
    path: Path,
    progress: Callable[[int], None],
    *,
    vouched: bool,
    most_bytes: int | None,
) -> Fetched:
    part = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.part")
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                _write(descriptor, chunk)
                sha256.update(chunk)
                md5.update(chunk)
                size += len(chunk)
                if most_bytes is not None and size > most_bytes:
                    raise StorageRefused(f"it is larger than {most_bytes} bytes (AGENT_REMOTE_MAX_BYTES)")
                progress(len(chunk))
        finally:
            os.close(descriptor)
        _verify(response, size, md5.hexdigest() if vouched else None)
        await asyncio.to_thread(_put_in_place, part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return Fetched(size=size, sha256=sha256.hexdigest())


def _write(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _verify(response: aiohttp.ClientResponse, size: int, md5: str | None) -> None:
    """Compare with what the server says; a stranger's ETag may be anything, so it says nothing."""
    promised = response.headers.get("Content-Length")
    if promised is not None and int(promised) != size:
        raise StorageMismatch(f"{size} of {promised} bytes arrived")
    etag = _PLAIN_MD5.fullmatch(response.headers.get("ETag", ""))
    encrypted_with_a_key = response.headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    if md5 and etag and not encrypted_with_a_key and etag[1] != md5:
        raise StorageMismatch(f"the bytes that arrived have MD5 {md5}, the object store says {etag[1]}")


def _put_in_place(part: Path, path: Path) -> None:
    _sync(part, os.O_RDONLY | os.O_NOFOLLOW)
    part.rename(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
