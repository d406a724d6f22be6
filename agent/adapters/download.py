"""One Revision's bytes to disk, whole and verified, or not at all.

Small objects and those of strangers come in one stream; large ones of the object store in ranges over several
connections (`agent.adapters.ranged`), and what came of those is gone on with after an interruption.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from agent import __version__
from agent.adapters.circuit import Circuit, ask
from agent.adapters.lane import CONNECT_SECONDS, KEPT_SECONDS, STALL_SECONDS
from agent.adapters.lanes import Lanes, in_thread
from agent.adapters.objects import Vouched, WrongBytes, refuse
from agent.adapters.origins import UNREADABLE
from agent.adapters.part import Part, bytes_on_disk
from agent.adapters.ranged import FAR_SECONDS, Address, RangedDownload, range_bytes
from agent.adapters.remote import RemoteGuard
from agent.adapters.stream import beginning, save
from agent.adapters.traffic import CONNECTIONS, Traffic
from agent.errors import StorageError, StorageMismatch, StorageRefused, StorageUnavailable

RANGED_FROM_BYTES = 8 << 20
"""From this size on an object comes in ranges, if its server can send them."""

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_OK, _PARTIAL, _NO_SUCH_RANGE = 200, 206, 416
_SENDABLE = re.compile(r"[!-~]+")
_SIZE_OF_ALL = re.compile(r"bytes 0-0/(\d+)")


@dataclass(frozen=True, slots=True)
class Fetched:
    """What arrived."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be fetched: the arguments of `fetch`."""

    address: Address
    path: Path
    remote: bool
    progress: Callable[[int], None]
    found: Callable[[int], None]
    size: int | None
    job: str

    @property
    def part(self) -> Path:
        return part_of(self.path)


@dataclass(frozen=True, slots=True)
class _Large:
    """An object that comes in ranges."""

    size: int
    vouched: Vouched
    etag: str
    answer_seconds: float = 0.0  # how long its server took to answer, with the connection


class Downloader:
    """Fetches from the object store, and from strangers' servers with more caution.

    With a circuit, nothing is fetched from the object store while it is away; strangers' servers have none.
    """

    def __init__(
        self,
        remote_hosts: Sequence[str] = (),
        stall_seconds: float = STALL_SECONDS,
        remote_max_bytes: int | None = None,
        circuit: Circuit | None = None,
        *,
        traffic: Traffic | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._stall_seconds = stall_seconds
        self._remote_max_bytes = remote_max_bytes
        self._guard = RemoteGuard(remote_hosts)
        self._circuit = circuit
        self._traffic = traffic or Traffic()
        self._own_lanes = None if lanes else Lanes(CONNECTIONS, stall_seconds=stall_seconds)
        self._lanes = lanes or self._own_lanes or Lanes(CONNECTIONS)
        self._store = self._session(aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS))
        self._remote = self._session(aiohttp.TCPConnector(limit=0, resolver=self._guard, force_close=True))

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # How many requests there are at once is the traffic's business: to wait here would look like an outage.
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=self._stall_seconds),
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
        if self._own_lanes is not None:
            self._own_lanes.close()

    async def fetch(
        self,
        url: str,
        path: Path,
        *,
        remote: bool,
        name: str,
        progress: Callable[[int], None] = lambda _: None,
        found: Callable[[int], None] = lambda _: None,
        size: int | None = None,
        job: str = "",
        renew: Callable[[], Awaitable[str]] | None = None,
    ) -> Fetched:
        """Fetch `url` to `path` by way of a `.part` file, verified, synced and renamed.

        After a failure `path` is as it was. Of a large object of the store what came stays beside it, and the next
        call for the same path and object goes on with it. The name in the directory is the caller's to make durable.

        Args:
            url: presigned, or a stranger's; carries no Ovation token and is never logged.
            path: where the file goes; its directory exists.
            remote: the address is a stranger's.
            name: what people call the file, for messages.
            progress: told the number of bytes of each piece as it arrives; negative, that they are worth nothing.
            found: told the number of bytes that were on the disk already; negative, that they are worth nothing.
            size: bytes, as far as they are known.
            job: on whose account it is.
            renew: returns another presigned address when this one has expired.

        Raises:
            StorageUnavailable: the object store is away or broke off, or the address has expired; try again.
            StorageMismatch: the bytes did not arrive whole, are not the ones that the store says it has, twice, or a
                stranger's server is away.
            StorageRefused: the server refuses, or the address may not be read.
            OSError: this machine's disk refuses.
        """
        try:
            address = Address(_address(url), None if renew is None else functools.partial(_another, renew))
            wanted = _Wanted(address, path, remote, progress, found, size, job)
            async with self._while_there(address.url, remote=remote), self._translated(remote=remote):
                return await self._fetch_twice(wanted)
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
            raise away(f"no connection to its server within {CONNECT_SECONDS:.0f} s") from None
        except TimeoutError:
            raise away(f"no byte arrived for {self._stall_seconds:g} s") from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise StorageRefused("its address is not one that can be read") from None
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or type(error).__name__
            raise away(f"its server cannot be reached ({reason})") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise away(f"the transfer broke off ({type(error).__name__})") from None

    async def _fetch_twice(self, wanted: _Wanted) -> Fetched:
        """Fetch it, and once more when other bytes came than the store vouches for."""
        with suppress(WrongBytes):
            return await self._fetch(wanted)
        return await self._fetch(wanted)

    async def _fetch(self, wanted: _Wanted) -> Fetched:
        arrived = 0

        def progress(count: int) -> None:
            nonlocal arrived
            arrived += count
            wanted.progress(count)

        try:
            large = await self._ask_for_range(wanted)
            come = await self._stream(wanted, progress) if large is None else large
            if isinstance(come, _Large):
                come = await self._ranges(wanted, come, progress)
        except WrongBytes:
            wanted.progress(-arrived)
            raise
        wanted.part.rename(wanted.path)
        return come

    async def _ask_for_range(self, wanted: _Wanted) -> _Large | None:
        """Ask for the first byte of what is known to be large; return what its server says of it if it sends ranges."""
        if wanted.remote or wanted.size is None or wanted.size < RANGED_FROM_BYTES:
            return None
        async with self._traffic.connection(wanted.job), AsyncExitStack() as stack:
            asked = time.monotonic()
            request = self._store.get(wanted.address.url, allow_redirects=False, headers={"Range": "bytes=0-0"})
            response = await stack.enter_async_context(request)
            took = time.monotonic() - asked
            if response.status in {_OK, _NO_SUCH_RANGE}:
                return None
            if response.status != _PARTIAL:
                refuse(response.status, response.headers, await beginning(response), remote=False)
            total = _SIZE_OF_ALL.fullmatch(response.headers.get("Content-Range", ""))
            vouched = Vouched.by(response.headers)
            if total is None or vouched.etag is None:
                return None
            return _Large(int(total[1]), vouched, vouched.etag, took)

    async def _stream(self, wanted: _Wanted, progress: Callable[[int], None]) -> Fetched | _Large:
        """Fetch it in one stream, unless it turns out to be large."""
        session, address = self._remote if wanted.remote else self._store, wanted.address.url
        async with self._traffic.connection(wanted.job):
            for _ in range(_MAX_REDIRECTS + 1):
                if wanted.remote:
                    self._guard.check(address)
                async with session.get(address, allow_redirects=False) as response:
                    if response.status in _REDIRECTS and wanted.remote:
                        address = address.join(_address(response.headers.get("Location", "")))
                        continue
                    if response.status != _OK:
                        said = b"" if wanted.remote else await beginning(response)
                        refuse(response.status, response.headers, said, remote=wanted.remote)
                    if large := _large(wanted, response):
                        return large
                    vouched = Vouched(None, None) if wanted.remote else Vouched.by(response.headers)
                    most_bytes = self._remote_max_bytes if wanted.remote else None
                    size, sha256 = await save(
                        response, wanted.part, progress, self._traffic, vouched=vouched, most_bytes=most_bytes
                    )
                    return Fetched(size, sha256)
        raise StorageRefused(f"more than {_MAX_REDIRECTS} redirects")

    async def _ranges(self, wanted: _Wanted, large: _Large, progress: Callable[[int], None]) -> Fetched:
        """Fetch it in ranges; what came is kept for the next try, unless it is not what the store vouches for."""
        at_once = self._traffic.job_connections
        length = range_bytes(large.size, at_once)
        part = await asyncio.to_thread(Part, wanted.part, large.size, large.etag, length, at_once)
        try:
            wanted.found(part.found)
            download = RangedDownload(
                self._lanes,
                self._traffic,
                wanted.job,
                wanted.address,
                part,
                progress=progress,
                is_far=large.answer_seconds > FAR_SECONDS,
            )
            algorithms = ("sha256",) if large.vouched.md5 is None else ("sha256", "md5")
            sha256, *md5 = await download.run(*algorithms)
            for each in md5:
                large.vouched.compare(each)
            await in_thread(part.sync)
            part.forget()
        except StorageMismatch:
            part.discard()
            wanted.found(-part.found)
            raise
        finally:
            part.close()
        return Fetched(large.size, sha256)


def part_of(path: Path) -> Path:
    """Return where the bytes of a file are before it is whole."""
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.part")


def partly_there(path: Path) -> int:
    """Return how many bytes of a file that was not fetched to its end are on the disk."""
    return bytes_on_disk(part_of(path))


def _large(wanted: _Wanted, response: aiohttp.ClientResponse) -> _Large | None:
    """Return what to fetch in ranges after all, if this answer is the beginning of a large object."""
    length, vouched = response.content_length, Vouched.by(response.headers)
    sends_ranges = response.headers.get("Accept-Ranges") == "bytes"
    # Of what was known to be large, ranges were asked for already, in vain.
    was_asked = wanted.size is not None and wanted.size >= RANGED_FROM_BYTES
    if wanted.remote or was_asked or not sends_ranges or vouched.etag is None or length is None:
        return None
    return _Large(length, vouched, vouched.etag) if length >= RANGED_FROM_BYTES else None


async def _another(renew: Callable[[], Awaitable[str]]) -> URL:
    return _address(await renew())


def _address(url: str) -> URL:
    """Return a presigned address as it was signed; what no request line can hold is quoted."""
    try:
        return URL(url, encoded=_SENDABLE.fullmatch(url) is not None)
    except UNREADABLE:
        raise StorageRefused("its address is not one that can be read") from None
