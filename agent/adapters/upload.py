"""Put one output's bytes into the object store with the temporary credentials that Ovation gave for it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import mimetypes
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import botocore.exceptions
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session

from agent.adapters.ovation import Credentials
from agent.errors import StorageRefused, StorageUnavailable
from agent.settings import AwsSettings

_SINGLE_MAX_BYTES = 16 << 20
_PART_MIN_BYTES = 16 << 20
_MAX_PARTS = 10_000
_EXPIRED = frozenset({"ExpiredToken", "RequestExpired", "InvalidAccessKeyId", "InvalidToken"})
_TRANSIENT = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "BadDigest"})


def content_type(name: str) -> str:
    """Guess a content type from a file name, as the released client does."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


class Uploader:
    """Uploads verified objects: the store is told each body's CRC32 and refuses bytes that changed on the way."""

    def __init__(self, settings: AwsSettings) -> None:
        self._settings = settings
        self._session: AioSession = get_session()

    async def upload(
        self,
        descriptor: int,
        size: int,
        credentials: Credentials,
        kind: str,
        progress: Callable[[int], None] = lambda _: None,
    ) -> str:
        """Upload `size` bytes of an open file to the object that `credentials` are good for; return their SHA-256.

        Raises:
            StorageUnavailable: the store is away or the credentials have expired; try again with fresh ones.
            StorageRefused: the store refuses for good.
        """
        with _translated(credentials.key):
            async with self._session.create_client(
                "s3",
                region_name=self._settings.default_region,
                endpoint_url=self._settings.endpoint_url_s3,
                aws_access_key_id=credentials.access_key_id,
                aws_secret_access_key=credentials.secret_access_key,
                aws_session_token=credentials.session_token,
                config=AioConfig(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": 4}),
            ) as client:
                target = {"Bucket": credentials.bucket, "Key": credentials.key}
                options = {"ContentType": kind, "ServerSideEncryption": "AES256"}
                if size <= _SINGLE_MAX_BYTES:
                    body = await asyncio.to_thread(_read, descriptor, 0, size)
                    await client.put_object(**target, **options, Body=body, ChecksumCRC32=_crc32(body))
                    progress(size)
                    return hashlib.sha256(body).hexdigest()
                return await self._in_parts(client, target, options, descriptor, size, progress)

    async def _in_parts(
        self,
        client: Any,
        target: dict[str, str],
        options: dict[str, str],
        descriptor: int,
        size: int,
        progress: Callable[[int], None],
    ) -> str:
        part_bytes = max(_PART_MIN_BYTES, math.ceil(size / _MAX_PARTS))
        started = await client.create_multipart_upload(**target, **options, ChecksumAlgorithm="CRC32")
        upload = {**target, "UploadId": started["UploadId"]}
        parts = []
        sha256 = hashlib.sha256()
        try:
            for number, offset in enumerate(range(0, size, part_bytes), start=1):
                length = min(part_bytes, size - offset)
                body = await asyncio.to_thread(_read, descriptor, offset, length)
                sha256.update(body)
                checksum = _crc32(body)
                done = await client.upload_part(**upload, PartNumber=number, Body=body, ChecksumCRC32=checksum)
                parts.append({"PartNumber": number, "ETag": done["ETag"], "ChecksumCRC32": checksum})
                progress(length)
            await client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except BaseException:
            await asyncio.shield(_abort(client, upload))
            raise
        return sha256.hexdigest()


async def _abort(client: Any, upload: dict[str, str]) -> None:
    try:
        await client.abort_multipart_upload(**upload)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError):
        return  # the bucket's own rule for unfinished uploads clears it


def _read(descriptor: int, offset: int, length: int) -> bytes:
    pieces = []
    while length > 0:
        piece = os.pread(descriptor, length, offset)
        if not piece:
            raise StorageUnavailable("an output became shorter while it was read")
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return b"".join(pieces)


def _crc32(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


@contextmanager
def _translated(key: str) -> Iterator[None]:
    name = key.rpartition("/")[2]
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _EXPIRED or code in _TRANSIENT or status >= 500 or status == 429:  # noqa: PLR2004 HTTP's own numbers
            raise StorageUnavailable(f"{name}: the object store answers {code}") from None
        raise StorageRefused(f"{name}: the object store refuses: {code}") from None
    except (botocore.exceptions.BotoCoreError, TimeoutError, ConnectionError) as error:
        raise StorageUnavailable(f"{name}: the object store cannot be reached ({type(error).__name__})") from None
