"""One answer's body to disk, in one stream, hashed on the way."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import aiohttp

from agent.adapters.lanes import in_thread
from agent.adapters.objects import ERROR_BYTES, Vouched
from agent.adapters.traffic import Traffic
from agent.errors import StorageMismatch, StorageRefused

_CHUNK_BYTES = 1 << 20


async def beginning(response: aiohttp.ClientResponse) -> bytes:
    """Return how an error's body begins; that it does not come is no error of its own."""
    said = bytearray()
    with suppress(TimeoutError, aiohttp.ClientError):
        while len(said) < ERROR_BYTES and (chunk := await response.content.read(ERROR_BYTES - len(said))):
            said += chunk
    return bytes(said)


async def save(
    response: aiohttp.ClientResponse,
    part: Path,
    progress: Callable[[int], None],
    traffic: Traffic,
    *,
    vouched: Vouched,
    most_bytes: int | None,
) -> tuple[int, str]:
    """Write a body to the file `part`, verified and synced, or leave nothing; return its size and its SHA-256.

    Args:
        response: its server's answer.
        part: made anew.
        progress: told the number of bytes of each piece.
        traffic: how fast they may pass.
        vouched: what its server says of the bytes.
        most_bytes: a stranger's server may never stop sending.

    Raises:
        StorageMismatch: they did not arrive whole, or are others.
        StorageRefused: they are too many.
        OSError: the disk refuses.
    """
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with _made(part) as descriptor:
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            _write(descriptor, chunk)
            sha256.update(chunk)
            if vouched.md5 is not None:
                md5.update(chunk)
            size += len(chunk)
            _check_not_endless(size, most_bytes)
            progress(len(chunk))
            if seconds := traffic.delay_seconds(len(chunk), "down"):
                await asyncio.sleep(seconds)
        _check_length(response, size)
        if vouched.md5 is not None:
            vouched.compare(md5.hexdigest())
        os.fchmod(descriptor, 0o644)  # the container's user is another; the directories are closed to everybody else
        await in_thread(os.fsync, descriptor)
    return size, sha256.hexdigest()


@contextmanager
def _made(part: Path) -> Iterator[int]:
    """Make a file and open it; after an error there is none."""
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _check_not_endless(size: int, most_bytes: int | None) -> None:
    if most_bytes is not None and size > most_bytes:
        raise StorageRefused(f"it is larger than {most_bytes} bytes (AGENT_REMOTE_MAX_BYTES)")


def _check_length(response: aiohttp.ClientResponse, size: int) -> None:
    promised = response.headers.get("Content-Length")
    if promised is not None and int(promised) != size:
        raise StorageMismatch(f"{size} of {promised} bytes arrived")


def _write(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]
