"""The object store: clients with temporary credentials, and what its errors mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import quote

import aiohttp
import botocore.exceptions
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from yarl import URL

from agent.adapters.circuit import Circuit, ask, retry_after_seconds
from agent.adapters.lane import Broken
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
    aiohttp.ClientError,
    Broken,
)
_ANY = (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, *_AWAY)
_KEY = "key"


class Store:
    """Opens clients. The session keeps the service's model, which takes 100 ms to load; a client then takes 5."""

    def __init__(self, settings: AwsSettings, circuit: Circuit | None = None) -> None:
        self._settings = settings
        self._circuit = circuit
        self._session: AioSession = get_session()
        self._buckets: dict[str, str] = {}  # the address of each bucket's objects, but for the key

    @property
    def region(self) -> str:
        """What requests are signed for."""
        return self._settings.default_region

    async def address(self, credentials: Credentials) -> URL:
        """Return where the object is."""
        if credentials.bucket not in self._buckets:
            async with self.client(credentials) as client:
                there = {"Bucket": credentials.bucket, "Key": _KEY}
                presigned: str = await client.generate_presigned_url("put_object", Params=there)
            self._buckets[credentials.bucket] = presigned.partition("?")[0].removesuffix(_KEY)
        return URL(self._buckets[credentials.bucket] + quote(credentials.key, safe="/~"), encoded=True)

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
    if isinstance(error, Broken):
        return StorageUnavailable, f"the object store cannot be reached: {error}"
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
