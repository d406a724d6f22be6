"""Bring one Revision's bytes to disk, whole and verified, or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from agent.errors import StorageMismatch, StorageRefused, StorageUnavailable

_CHUNK_BYTES = 1 << 20
_STALL_SECONDS = 60.0  # no byte for so long: cut; a slow link is not a stall
_MAX_REDIRECTS = 5
_PLAIN_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


@dataclass(frozen=True, slots=True)
class Fetched:
    """What arrived."""

    size: int
    sha256: str


class _GuardedResolver(AbstractResolver):
    """Refuses addresses inside the site: a remote Revision may name any host, and DNS may say anything of it."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._inner = aiohttp.resolver.DefaultResolver()
        self._allowed = {host.lower() for host in allowed}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve `host`, leaving out what may not be reached."""
        found = await self._inner.resolve(host, port, family)
        if host.lower() in self._allowed:
            return found
        for result in found:
            refuse_inside(host, result["host"])
        return found

    async def close(self) -> None:
        """Close the resolver."""
        await self._inner.close()


def refuse_inside(host: str, address: str) -> None:
    """Raise `StorageRefused` when `address` is loopback, link-local, private or otherwise not on the open internet."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped:
        number = number.ipv4_mapped
    if not number.is_global or number.is_multicast:
        raise StorageRefused(
            f"the remote file's host {host} is inside this network; an operator may allow it with AGENT_REMOTE_HOSTS"
        )


class Downloader:
    """Fetches from the object store, and from strangers' servers with more caution."""

    def __init__(self, remote_hosts: Sequence[str] = (), stall_seconds: float = _STALL_SECONDS) -> None:
        timeout = aiohttp.ClientTimeout(total=None, connect=20, sock_read=stall_seconds)
        self._remote_hosts = {host.lower() for host in remote_hosts}
        self._store = aiohttp.ClientSession(
            timeout=timeout, auto_decompress=False, connector=aiohttp.TCPConnector(limit=16)
        )
        guarded = aiohttp.TCPConnector(limit=16, resolver=_GuardedResolver(remote_hosts))
        self._remote = aiohttp.ClientSession(
            timeout=timeout, auto_decompress=False, connector=guarded, cookie_jar=aiohttp.DummyCookieJar()
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._store.close()
        await self._remote.close()

    async def fetch(
        self, url: str, path: Path, *, remote: bool, name: str, progress: Callable[[int], None] = lambda _: None
    ) -> Fetched:
        """Fetch `url` to `path` by way of `<path>.part`, verified and renamed.

        Args:
            url: presigned, or a stranger's; carries no Ovation token and is never logged.
            path: where the file goes; its directory exists.
            remote: the address is a stranger's.
            name: what people call the file, for messages.
            progress: told the number of bytes of each piece as it arrives.

        Raises:
            StorageUnavailable: the server is away or broke off; try again.
            StorageMismatch: the bytes did not arrive whole, or are not the ones that the store says it has.
            StorageRefused: the server refuses, or the address may not be read.
        """
        try:
            return await self._fetch(url, path, remote=remote, name=name, progress=progress)
        except TimeoutError:
            raise StorageUnavailable(f"{name}: no byte arrived for {self._stall(remote):.0f} s") from None
        except aiohttp.InvalidURL:
            raise StorageRefused(f"{name}: its address is not one that can be read") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise StorageUnavailable(f"{name}: the transfer broke off ({type(error).__name__})") from None

    def _stall(self, remote: bool) -> float:
        session = self._remote if remote else self._store
        return session.timeout.sock_read or 0.0

    async def _fetch(
        self, url: str, path: Path, *, remote: bool, name: str, progress: Callable[[int], None]
    ) -> Fetched:
        address = URL(url, encoded=True)
        for _ in range(_MAX_REDIRECTS):
            if remote:
                self._check_remote(address)
            session = self._remote if remote else self._store
            async with session.get(address, allow_redirects=False, headers={"Accept-Encoding": "identity"}) as response:
                if response.status in {301, 302, 303, 307, 308} and remote:
                    address = address.join(URL(response.headers.get("Location", ""), encoded=True))
                    continue
                _check_status(response.status, name)
                return await _save(response, path, name, progress)
        raise StorageRefused(f"{name}: too many redirects")

    def _check_remote(self, address: URL) -> None:
        if address.scheme not in {"http", "https"} or address.host is None:
            raise StorageRefused("a remote file's address must begin with http:// or https://")
        host = address.host.lower()
        if host in self._remote_hosts:
            return
        try:
            ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return  # a name: the resolver looks at what it stands for
        refuse_inside(host, host)


def _check_status(status: int, name: str) -> None:
    if status == 200:  # noqa: PLR2004 HTTP's own number
        return
    if status >= 500 or status in {408, 429}:  # noqa: PLR2004 HTTP's own number
        raise StorageUnavailable(f"{name}: the object store answers {status}")
    if status == 403:  # noqa: PLR2004 an address that expired: the next try has a fresh one
        raise StorageMismatch(f"{name}: the object store answers {status}")
    raise StorageRefused(f"{name}: its bytes are not there (the object store answers {status})")


async def _save(response: aiohttp.ClientResponse, path: Path, name: str, progress: Callable[[int], None]) -> Fetched:
    part = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.part")
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            _write(descriptor, chunk)
            sha256.update(chunk)
            md5.update(chunk)
            size += len(chunk)
            progress(len(chunk))
        _verify(response, name, size, md5.hexdigest())
        await asyncio.to_thread(os.fsync, descriptor)
    finally:
        os.close(descriptor)
    await asyncio.to_thread(_put_in_place, part, path)
    return Fetched(size=size, sha256=sha256.hexdigest())


def _write(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _verify(response: aiohttp.ClientResponse, name: str, size: int, md5: str) -> None:
    promised = response.headers.get("Content-Length")
    if promised is not None and int(promised) != size:
        raise StorageMismatch(f"{name}: {size} of {promised} bytes arrived")
    etag = _PLAIN_MD5.fullmatch(response.headers.get("ETag", ""))
    encrypted_with_a_key = response.headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    if etag and not encrypted_with_a_key and etag[1] != md5:
        raise StorageMismatch(f"{name}: the bytes that arrived have MD5 {md5}, the store says {etag[1]}")


def _put_in_place(part: Path, path: Path) -> None:
    part.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
