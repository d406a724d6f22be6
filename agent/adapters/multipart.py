"""An upload in parts: begun once, gone on with by whoever knows its id, and thrown away rather than forgotten."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import tenacity
from botocore.exceptions import BotoCoreError, ClientError

from agent.adapters.ovation import Credentials
from agent.adapters.sending import Sender
from agent.adapters.store import ATTEMPTS, Store, code_of, is_away, target
from agent.adapters.sums import Piece, Source, Sums, composite, confirm
from agent.errors import StorageMismatch

_ABORT_SECONDS = 10.0
_NO_SUCH_UPLOAD = "NoSuchUpload"


async def _forget(upload_id: str) -> None:
    del upload_id


@dataclass(frozen=True, slots=True)
class Parts:
    """How an upload in parts goes on.

    Attributes:
        length: bytes of each part but the last.
        upload_id: of the upload to go on with; without one, one is begun.
        keep: makes the id of one that was begun durable; awaited before the first part is sent.
        is_new: no upload of this object was ever begun, so that no stray one need be looked for.
    """

    length: int
    upload_id: str | None = None
    keep: Callable[[str], Awaitable[None]] = field(default=_forget)
    is_new: bool = True


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A part that the store has."""

    number: int
    etag: str
    sums: Sums


class PartsUpload:
    """One object's upload in parts, up to `at_once` of them at the same time."""

    def __init__(
        self,
        store: Store,
        sender: Sender,
        client: Any,
        credentials: Credentials,
        options: dict[str, str],
        at_once: int,
        job: str,
    ) -> None:
        self._store = store
        self._sender = sender
        self._client = client
        self._job = job
        self._gate = asyncio.Semaphore(at_once)
        self._credentials = credentials
        self._target = target(credentials)
        self._options = options
        self._upload_id: str | None = None

    async def send(self, source: Source, parts: Parts, progress: Callable[[int], None]) -> str:
        """Send what the store does not have yet, have it make the object, and return the SHA-256 of the whole."""
        there: dict[int, dict[str, Any]] | None = None
        if parts.upload_id is not None:
            self._upload_id = parts.upload_id
            there = await self._listed()
            if there is None and (arrived := await self._arrived(source)):
                progress(source.size)
                return arrived
        if there is None:
            await self._begin(parts)
        sha256 = hashlib.sha256()
        arriving: list[asyncio.Task[_Arrived]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for number in source.numbers:
                    piece = await source.piece(number, sha256)  # one after the other, for the digest of the whole
                    await self._gate.acquire()
                    bringing = self._bring(number, piece, (there or {}).get(number), progress)
                    arriving.append(group.create_task(bringing))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        source.check()
        parts_there = [each.result() for each in arriving]
        listed = [
            {"PartNumber": each.number, "ETag": each.etag, "ChecksumCRC32": each.sums.crc32} for each in parts_there
        ]
        await self._complete(listed, composite([each.sums for each in parts_there]), source.size)
        return sha256.hexdigest()

    async def abort(self) -> None:
        """Throw away what was sent, as well as that can be done in a short time."""
        with suppress(BotoCoreError, ClientError, OSError):
            async with asyncio.timeout(_ABORT_SECONDS):
                if self._upload_id is not None:
                    await self._client.abort_multipart_upload(**self._target, UploadId=self._upload_id)

    async def _begin(self, parts: Parts) -> None:
        """Begin an upload and have its id kept.

        The request is not simply repeated: each time might leave an upload behind whose id nobody knows.
        """
        is_new = parts.is_new
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=3),
            retry=tenacity.retry_if_exception(is_away),
            reraise=True,
        )
        async with self._store.client(self._credentials, attempts=1) as once:
            async for attempt in retrying:
                with attempt:
                    if not is_new:
                        await abort_all(once, self._target)
                    is_new = False
                    begun = await once.create_multipart_upload(
                        **self._target, **self._options, ChecksumAlgorithm="CRC32"
                    )
        self._upload_id = str(begun["UploadId"])
        try:
            await parts.keep(self._upload_id)
        except BaseException:
            await self.abort()
            raise

    async def _listed(self) -> dict[int, dict[str, Any]] | None:
        """Return the parts that the store has, by number; None when it knows no such upload, or no longer."""
        try:
            pages = self._client.get_paginator("list_parts").paginate(**self._target, UploadId=self._upload_id)
            return {part["PartNumber"]: part async for page in pages for part in page.get("Parts", [])}
        except ClientError as error:
            if code_of(error) == _NO_SUCH_UPLOAD:
                return None
            raise

    async def _arrived(self, source: Source) -> str | None:
        """Return the SHA-256 if the object is there already: an upload that is completed is known no longer."""
        if not await self._is_there(source.size, None):
            return None
        sha256 = hashlib.sha256()
        pieces = [await source.piece(number, sha256) for number in source.numbers]
        found = [Sums(each.crc32, await each.md5()) for each in pieces]
        return sha256.hexdigest() if await self._is_there(source.size, composite(found)) else None

    async def _bring(
        self, number: int, piece: Piece, listed: dict[str, Any] | None, progress: Callable[[int], None]
    ) -> _Arrived:
        """Send a part, unless the store has it already."""
        try:
            answer, found = listed or {}, None
            if listed is not None and listed.get("Size") == piece.span.length:
                found = await _sums_if_same(listed, piece)
            if found is None:
                query = {"partNumber": str(number), "uploadId": str(self._upload_id)}
                headers = {"x-amz-checksum-crc32": piece.crc32}
                answer = await self._sender.put(self._credentials, piece.span, headers, query, self._job)
                found = await piece.confirmed(answer)
            progress(piece.span.length)
            return _Arrived(number, str(answer["ETag"]), found)
        finally:
            self._gate.release()

    async def _complete(self, sent: list[dict[str, Any]], whole: Sums, size: int) -> None:
        try:
            answer = await self._client.complete_multipart_upload(
                **self._target, UploadId=self._upload_id, MultipartUpload={"Parts": sent}
            )
        except ClientError as error:
            # So the store may answer the second time, when its first answer was lost.
            if code_of(error) == _NO_SUCH_UPLOAD and await self._is_there(size, whole):
                return
            raise
        confirm(answer, whole)

    async def _is_there(self, size: int, whole: Sums | None) -> bool:
        """Say whether the store has the whole object, as far as it lets these credentials ask."""
        try:
            answer = await self._client.head_object(**self._target, ChecksumMode="ENABLED")
        except ClientError as error:
            if is_away(error):
                raise
            return False
        return answer.get("ContentLength") == size and (whole is None or confirm(answer, whole))


async def abort_all(client: Any, object_: dict[str, str], upload_id: str | None = None) -> None:
    """Throw away every upload of an object: the one of that id, and those that a listing shows.

    Credentials for one object may not be good for a listing. What it would have shown has no parts: none is sent
    before its upload's id is known.
    """
    found = [] if upload_id is None else [upload_id]
    try:
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=object_["Bucket"], Prefix=object_["Key"])
        async for page in pages:
            found += [each["UploadId"] for each in page.get("Uploads", []) if each["Key"] == object_["Key"]]
    except ClientError as error:
        if is_away(error):
            raise
    for each in dict.fromkeys(found):
        try:
            await client.abort_multipart_upload(**object_, UploadId=each)
        except ClientError as error:
            if code_of(error) != _NO_SUCH_UPLOAD:
                raise


async def _sums_if_same(listed: dict[str, Any], piece: Piece) -> Sums | None:
    """Return the sums of a part that the store has, if it is the part of the file."""
    try:
        found = await piece.confirmed(listed)
        return found if confirm(listed, found) else None
    except StorageMismatch:
        return None
