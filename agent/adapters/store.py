"""The object store: clients with temporary credentials, what its errors mean, and whether it has what was sent."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import botocore.exceptions
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from yarl import URL

from agent.adapters.circuit import Circuit, ask, retry_after_seconds
from agent.adapters.ovation import Credentials
from agent.errors import StorageError, StorageExpired, StorageMismatch, StorageRefused, StorageUnavailable
from agent.settings import AwsSettings

ATTEMPTS = 4
_CONNECT_SECONDS = 10
_STALL_SECONDS = 30
_EXPIRED = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestExpired",
        "TokenRefreshRequired",
    }
)
_TRANSIENT = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout"})
_CHANGED_ON_THE_WAY = frozenset({"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})
_PARTS_ARE_GONE = frozenset({"NoSuchUpload", "InvalidPart"})
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
_ANY = (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, TimeoutError, ConnectionError)
_MD5 = re.compile(r'"?([0-9a-f]{32}(?:-[0-9]+)?)"?')


class Store:
    """Opens clients. The session keeps the service's model, which takes 100 ms to load; a client then takes 5."""

    def __init__(self, settings: AwsSettings, circuit: Circuit | None = None) -> None:
        self._settings = settings
        self._circuit = circuit
        self._session: AioSession = get_session()

    def while_there(self) -> AbstractAsyncContextManager[None]:
        """Enter to use the store: refused while it is away, and how that ends tells whether it is."""
        if self._circuit is None:
            return nullcontext()
        address = self._settings.endpoint_url_s3 or f"https://s3.{self._settings.default_region}.amazonaws.com"
        origin = str(URL(address).origin())
        return self._circuit.guard(origin, partial(ask, origin, StorageUnavailable))

    def client(self, credentials: Credentials, *, attempts: int = ATTEMPTS) -> AbstractAsyncContextManager[Any]:
        """Return a client with these credentials that sends each request up to `attempts` times."""
        opened: AbstractAsyncContextManager[Any] = self._session.create_client(
            "s3",
            region_name=self._settings.default_region,
            endpoint_url=self._settings.endpoint_url_s3,
            aws_access_key_id=credentials.access_key_id,
            aws_secret_access_key=credentials.secret_access_key,
            aws_session_token=credentials.session_token,
            config=AioConfig(
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_STALL_SECONDS,
                retries={"mode": "standard", "total_max_attempts": attempts},
            ),
        )
        return opened


def target(credentials: Credentials) -> dict[str, str]:
    """Return how requests name the object."""
    return {"Bucket": credentials.bucket, "Key": credentials.key}


@contextmanager
def translated(credentials: Credentials) -> Iterator[None]:
    """Turn what a client raises into the agent's own errors, which name the object and no secret.

    Raises:
        StorageUnavailable: the store is away.
        StorageExpired: the credentials are good no longer, or never were.
        StorageMismatch: the store has other bytes than were sent, or not all.
        StorageRefused: the store refuses for good.
    """
    name = credentials.key.rpartition("/")[2]
    try:
        yield
    except StorageMismatch as error:
        raise StorageMismatch(f"{name}: {error}") from None
    except _ANY as error:
        kind, said = _meaning(error)
        if kind is StorageUnavailable:
            raise StorageUnavailable(f"{name}: {said}", retry_after_seconds=_retry_after_seconds(error)) from None
        raise kind(f"{name}: {said}") from None


def is_away(error: BaseException) -> bool:
    """Say whether a client's error means that the store is away for now."""
    return isinstance(error, _ANY) and _meaning(error)[0] is StorageUnavailable


def code_of(error: botocore.exceptions.ClientError) -> str:
    """Return S3's own word for an error."""
    return str(error.response.get("Error", {}).get("Code", "?"))


def _meaning(error: Exception) -> tuple[type[StorageError], str]:
    if isinstance(error, botocore.exceptions.ClientError):
        return _refusal(error)
    if isinstance(error, _AWAY):
        return StorageUnavailable, f"the object store cannot be reached ({type(error).__name__})"
    # Only its kind is told: what it says may repeat what it was given.
    return StorageRefused, f"no request can be made for it ({type(error).__name__})"


def _refusal(error: botocore.exceptions.ClientError) -> tuple[type[StorageError], str]:
    code = code_of(error)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    hint = f"; {_HINTS[code]}" if code in _HINTS else ""
    if code in _EXPIRED:
        return StorageExpired, f"the object store does not take its upload credentials: {code}{hint}"
    if code in _TRANSIENT or status >= 500 or status == 429:  # noqa: PLR2004 HTTP's own numbers
        return StorageUnavailable, f"the object store answers {code}"
    if code in _CHANGED_ON_THE_WAY:
        return StorageMismatch, f"other bytes arrived in the object store than were sent ({code})"
    if code in _PARTS_ARE_GONE:
        return StorageMismatch, f"what was sent is gone from the object store ({code})"
    return StorageRefused, f"the object store refuses: {code}{hint}"


def _retry_after_seconds(error: Exception) -> float | None:
    if not isinstance(error, botocore.exceptions.ClientError):
        return None
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return retry_after_seconds(headers.get("retry-after"), datetime.now(UTC))


class Sums(NamedTuple):
    """What the store says of bytes that it has: their CRC32 in base64, their MD5 as an ETag without quotes."""

    crc32: str
    etag: str


def sums(body: bytes) -> Sums:
    """Return what the store is to say of these bytes."""
    crc32 = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
    return Sums(crc32, hashlib.md5(body, usedforsecurity=False).hexdigest())


def composite(parts: Sequence[Sums]) -> Sums:
    """Return what the store is to say of an object that was sent in these parts: the sums of their sums."""
    whole = sums(b"".join(base64.b64decode(part.crc32) for part in parts))
    digest = hashlib.md5(b"".join(bytes.fromhex(part.etag) for part in parts), usedforsecurity=False)
    return Sums(f"{whole.crc32}-{len(parts)}", f"{digest.hexdigest()}-{len(parts)}")


def confirm(answer: Mapping[str, Any], sent: Sums) -> bool:
    """Compare what the store says it has with what was sent; return whether it said anything that tells.

    An ETag is an MD5 unless the object is encrypted with a key of somebody's own.

    Raises:
        StorageMismatch: it has other bytes.
    """
    in_parts = "-" in sent.crc32
    told = False
    crc32 = answer.get("ChecksumCRC32")
    if crc32 is not None and not (in_parts and answer.get("ChecksumType") == "FULL_OBJECT"):
        told = True
        if crc32.partition("-")[0] != sent.crc32.partition("-")[0]:
            raise StorageMismatch(f"the object store has bytes with CRC32 {crc32}, sent were {sent.crc32}")
    etag = _MD5.fullmatch(str(answer.get("ETag", "")))
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256"
    if etag is not None and plain and ("-" in etag[1]) == in_parts:
        told = True
        if etag[1] != sent.etag:
            raise StorageMismatch(f"the object store has bytes with MD5 {etag[1]}, sent were {sent.etag}")
    return told


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file that go to the store in one request."""

    body: bytes = field(repr=False)
    sums: Sums


class Source:
    """A file on its way, in pieces of `length` bytes; the last may be shorter."""

    def __init__(self, descriptor: int, size: int, length: int) -> None:
        self._descriptor = descriptor
        self._length = max(1, length)
        self.size = size

    @property
    def numbers(self) -> range:
        """The numbers of the pieces, from 1; a file without bytes is one piece."""
        return range(1, max(1, -(-self.size // self._length)) + 1)

    async def piece(self, number: int, sha256: hashlib._Hash) -> Piece:
        """Read a piece and let `sha256` see it.

        Raises:
            StorageMismatch: the file is shorter than it was.
        """
        return await asyncio.to_thread(self._read, number, sha256)

    def check(self) -> None:
        """Go on only if the file still has its size.

        Raises:
            StorageMismatch: it has not.
        """
        size = os.fstat(self._descriptor).st_size
        if size != self.size:
            raise StorageMismatch(f"it has {size} bytes now, {self.size} when its delivery began: it was changed")

    def _read(self, number: int, sha256: hashlib._Hash) -> Piece:
        offset = (number - 1) * self._length
        end = min(offset + self._length, self.size)
        read = []
        while offset < end:
            some = os.pread(self._descriptor, end - offset, offset)
            if not some:
                raise StorageMismatch("it became shorter while it was read")
            read.append(some)
            offset += len(some)
        body = b"".join(read)
        sha256.update(body)
        return Piece(body, sums(body))
