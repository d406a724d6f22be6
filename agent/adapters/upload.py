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
from agent.errors import StorageMismatch, StorageRefused, StorageUnavailable
from agent.settings import AwsSettings

_SINGLE_MAX_BYTES = 16 << 20
_PART_MIN_BYTES = 16 << 20
_MAX_PARTS = 10_000
_CONNECT_SECONDS = 10
_STALL_SECONDS = 60
_ABORT_SECONDS = 10.0
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
_TRANSIENT = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout"})
_CHANGED_ON_THE_WAY = frozenset({"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})
_HINTS = {
    "InvalidAccessKeyId": "is AWS_ENDPOINT_URL_S3 the store that Ovation uses?",
    "InvalidToken": "is AWS_ENDPOINT_URL_S3 the store that Ovation uses?",
    "NoSuchBucket": "is AWS_ENDPOINT_URL_S3 the store that Ovation uses?",
    "SignatureDoesNotMatch": "does something on the way change requests?",
    "RequestTimeTooSkewed": "is this machine's clock right?",
    "AuthorizationHeaderMalformed": "is AWS_DEFAULT_REGION the bucket's?",
    "PermanentRedirect": "is AWS_DEFAULT_REGION the bucket's?",
}
_AWAY = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.ResponseStreamingError,
    TimeoutError,
    ConnectionError,
)


def part_bytes(size: int) -> int:
    """Return how long the parts of an object of `size` bytes are: at least S3's least, and at most 10,000 of them."""
    return max(_PART_MIN_BYTES, math.ceil(size / _MAX_PARTS))


def content_type(name: str) -> str:
    """Guess a content type from a file name, as the released client does."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


class Uploader:
    """Uploads verified objects: the store is told each body's CRC32 and refuses bytes that changed on the way."""

    def __init__(self, settings: AwsSettings) -> None:
        self._settings = settings
        # The session keeps the service's model, which takes 100 ms to load; a client then takes 5.
        self._session: AioSession = get_session()
        self._config = AioConfig(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_STALL_SECONDS,
            retries={"mode": "standard", "total_max_attempts": 4},
        )

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
            StorageMismatch: the bytes changed on the way, or the file became shorter while it was read.
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
                config=self._config,
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
        step = part_bytes(size)
        started = await client.create_multipart_upload(**target, **options, ChecksumAlgorithm="CRC32")
        upload = {**target, "UploadId": started["UploadId"]}
        parts = []
        sha256 = hashlib.sha256()
        try:
            for number, offset in enumerate(range(0, size, step), start=1):
                length = min(step, size - offset)
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
        async with asyncio.timeout(_ABORT_SECONDS):
            await client.abort_multipart_upload(**upload)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError):
        return  # the bucket's own rule for unfinished uploads clears it


def _read(descriptor: int, offset: int, length: int) -> bytes:
    pieces = []
    while length > 0:
        piece = os.pread(descriptor, length, offset)
        if not piece:
            raise StorageMismatch("it became shorter while it was read")
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
    except StorageMismatch as error:
        raise StorageMismatch(f"{name}: {error}") from None
    except botocore.exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _EXPIRED or code in _TRANSIENT or status >= 500 or status == 429:  # noqa: PLR2004 HTTP's own numbers
            raise StorageUnavailable(f"{name}: the object store answers {code}") from None
        if code in _CHANGED_ON_THE_WAY:
            raise StorageMismatch(f"{name}: other bytes arrived in the object store than were sent ({code})") from None
        hint = f"; {_HINTS[code]}" if code in _HINTS else ""
        raise StorageRefused(f"{name}: the object store refuses: {code}{hint}") from None
    except _AWAY as error:
        raise StorageUnavailable(f"{name}: the object store cannot be reached ({type(error).__name__})") from None
    except botocore.exceptions.BotoCoreError as error:
        # Only its kind is told: what it says may repeat what it was given.
        raise StorageRefused(f"{name}: no request can be made for it ({type(error).__name__})") from None
