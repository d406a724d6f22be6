"""Put one output's bytes into the object store with the temporary credentials that Ovation gave for it."""

from __future__ import annotations

import hashlib
import math
import mimetypes
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from agent.adapters import multipart
from agent.adapters.circuit import Circuit
from agent.adapters.lanes import Lanes
from agent.adapters.multipart import Parts, PartsUpload
from agent.adapters.ovation import Credentials
from agent.adapters.sending import Sender
from agent.adapters.store import Store, target, translated
from agent.adapters.sums import Source
from agent.adapters.traffic import CONNECTIONS, Traffic
from agent.errors import StorageExpired, StorageRefused
from agent.settings import AwsSettings

_SINGLE_MAX_BYTES = 16 << 20
_PART_MIN_BYTES = 16 << 20
_MAX_PARTS = 10_000
_MAX_BYTES = 5 << 40  # S3's own limit


def part_bytes(size: int) -> int:
    """Return how long the parts of an object of `size` bytes are: at least S3's least, and at most 10,000 of them."""
    return max(_PART_MIN_BYTES, math.ceil(size / _MAX_PARTS))


def goes_in_parts(size: int) -> bool:
    """Say whether an object of `size` bytes is sent in parts."""
    return size > _SINGLE_MAX_BYTES


def content_type(name: str) -> str:
    """Guess a content type from a file name, as the released client does."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


class Uploader:
    """Uploads verified objects: the store is told each body's CRC32, and what it says it has is compared."""

    def __init__(
        self,
        settings: AwsSettings,
        circuit: Circuit | None = None,
        *,
        traffic: Traffic | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._store = Store(settings, circuit)
        self._traffic = traffic or Traffic()
        self._own_lanes = None if lanes else Lanes(CONNECTIONS)
        self._sender = Sender(self._store, self._traffic, lanes or self._own_lanes or Lanes(CONNECTIONS))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._sender.close()
        if self._own_lanes is not None:
            self._own_lanes.close()

    async def upload(
        self,
        descriptor: int,
        size: int,
        credentials: Credentials,
        kind: str,
        progress: Callable[[int], None] = lambda _: None,
        *,
        parts: Parts | None = None,
        job: str = "",
    ) -> str:
        """Upload an open file of `size` bytes to the object that `credentials` are good for; return its SHA-256.

        Args:
            descriptor: the file's.
            size: bytes.
            credentials: good for the object.
            kind: the content type.
            progress: told of bytes that the store has.
            parts: how to send it in parts so that another process can go on with that: whatever happens, what was
                sent stays in the store. Without it a large object goes in parts that are thrown away on failure.
            job: on whose account it is.

        Raises:
            StorageUnavailable: the store is away.
            StorageExpired: the credentials are good no longer, or never were.
            StorageMismatch: the store has other bytes than were sent, or the file changed its size.
            StorageRefused: the store refuses for good, or would: it takes objects of up to 5 TiB.
        """
        if size > _MAX_BYTES:
            raise StorageRefused(f"it has {size} bytes, and the object store takes {_MAX_BYTES} at most")
        async with self._store.while_there():
            with translated(credentials):
                return await self._upload(descriptor, size, credentials, kind, progress, parts, job)

    async def abort(self, credentials: Credentials, upload_id: str | None) -> None:
        """Throw away what was sent of an object in parts: the upload of that id, and what else a listing shows.

        What the store does not let these credentials do, such as when they have expired, is left undone.

        Raises:
            StorageUnavailable: the store is away.
        """
        with suppress(StorageExpired, StorageRefused):
            async with self._store.while_there():
                with translated(credentials):
                    async with self._store.client(credentials) as client:
                        await multipart.abort_all(client, target(credentials), upload_id)

    async def _upload(
        self,
        descriptor: int,
        size: int,
        credentials: Credentials,
        kind: str,
        progress: Callable[[int], None],
        parts: Parts | None,
        job: str,
    ) -> str:
        if parts is None and not goes_in_parts(size):
            source = Source(descriptor, size, size)
            sha256 = hashlib.sha256()
            piece = await source.piece(1, sha256)
            source.check()
            headers = {
                "Content-Type": kind,
                "x-amz-server-side-encryption": "AES256",
                "x-amz-checksum-crc32": piece.crc32,
            }
            await piece.confirmed(await self._sender.put(credentials, piece.span, headers, job=job))
            progress(size)
            return sha256.hexdigest()
        given = parts or Parts(part_bytes(size))
        options = {"ContentType": kind, "ServerSideEncryption": "AES256"}
        async with self._store.client(credentials) as client:
            at_once = self._traffic.job_connections
            upload = PartsUpload(self._store, self._sender, client, credentials, options, at_once, job)
            try:
                return await upload.send(Source(descriptor, size, given.length), given, progress)
            except BaseException:
                if parts is None:
                    await upload.abort()
                raise
