"""Bodies on their way to the object store: signed for as botocore does it, carried by whatever carries them best.

A client of aiobotocore takes 5 ms to make, for each object with credentials of its own, and then spends more on a body
than the network does. So it is asked for the few requests without one, and those with one are signed here.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

import aiohttp
import botocore.exceptions
import tenacity
from botocore.auth import UNSIGNED_PAYLOAD, S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from yarl import URL

from agent import __version__
from agent.adapters.lane import CONNECT_SECONDS, KEPT_SECONDS, STALL_SECONDS, Lane, Span
from agent.adapters.lanes import Lanes
from agent.adapters.objects import ERROR_BYTES, code_in
from agent.adapters.ovation import Credentials
from agent.adapters.store import ATTEMPTS, Store, is_away
from agent.adapters.traffic import Traffic
from agent.errors import StorageMismatch

_IN_MEMORY_BYTES = 1 << 20  # up to here a thread of its own costs more than it is worth
_OK = 200
_TOLD = {  # headers, and what botocore calls them
    "ETag": "ETag",
    "x-amz-checksum-crc32": "ChecksumCRC32",
    "x-amz-checksum-type": "ChecksumType",
    "x-amz-server-side-encryption": "ServerSideEncryption",
}


class _Signer(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Signs the headers, the CRC32 of the body among them, and not the body: that would be hashed once more for it."""

    def payload(self, request: AWSRequest) -> str:
        """Return what stands for the body in the signature."""
        del request
        return str(UNSIGNED_PAYLOAD)


class Sender:
    """Sends bodies, each request up to four times."""

    def __init__(self, store: Store, traffic: Traffic, lanes: Lanes) -> None:
        self._store = store
        self._traffic = traffic
        self._lanes = lanes
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()

    async def put(
        self,
        credentials: Credentials,
        body: Span,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None = None,
        job: str = "",
    ) -> dict[str, Any]:
        """Send a stretch of a file to an object, or to a part of it; return the answer with botocore's names.

        Raises:
            ClientError: botocore's own: the store refuses.
            Broken, aiohttp.ClientError, TimeoutError: the store is away.
            StorageMismatch: the file became shorter.
        """
        address = _with_query(await self._store.address(credentials), query or {})
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=3),
            retry=tenacity.retry_if_exception(is_away),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                async with self._traffic.connection(job):
                    signed = self._signed(address, credentials, headers)
                    if body.length <= _IN_MEMORY_BYTES:
                        return await self._put_small(address, signed, body)
                    work = partial(self._put, address=address, headers=signed, body=body)
                    return await self._lanes.use(address.origin(), work)
        raise AssertionError("tenacity returns or raises")

    def _signed(self, address: URL, credentials: Credentials, headers: Mapping[str, str]) -> dict[str, str]:
        request = AWSRequest("PUT", str(address), headers=dict(headers))
        given = ReadOnlyCredentials(credentials.access_key_id, credentials.secret_access_key, credentials.session_token)
        _Signer(given, "s3", self._store.region).add_auth(request)
        return {**request.headers, "User-Agent": f"ovation-agent/{__version__}"}

    def _put(self, lane: Lane, address: URL, headers: Mapping[str, str], body: Span) -> dict[str, Any]:
        """Send it through a lane, in its thread."""

        def sent(count: int) -> None:
            if seconds := self._traffic.delay_seconds(count, "up"):
                lane.pause(seconds)

        try:
            response = lane.put(address.raw_path_qs, headers, body, sent)
        except EOFError:
            raise StorageMismatch("it became shorter while it was read") from None
        said = lane.read_all(response, ERROR_BYTES)
        return _answer(response.status, dict(response.headers), said)

    async def _put_small(self, address: URL, headers: Mapping[str, str], body: Span) -> dict[str, Any]:
        content = os.pread(body.descriptor, body.length, body.offset)
        if len(content) != body.length:
            raise StorageMismatch("it became shorter while it was read")
        if seconds := self._traffic.delay_seconds(len(content), "up"):
            await asyncio.sleep(seconds)
        going = _Body(content)
        sending = asyncio.create_task(self._request(address, headers, going))
        try:
            while not sending.done():
                left = going.taken_at + CONNECT_SECONDS + STALL_SECONDS - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait({sending}, timeout=left)
            return sending.result()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _request(self, address: URL, headers: Mapping[str, str], body: _Body) -> dict[str, Any]:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=STALL_SECONDS),
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        async with self._http.request("PUT", address, headers=headers, data=body, allow_redirects=False) as response:
            return _answer(response.status, response.headers, await response.content.read(ERROR_BYTES))


class _Body(io.BytesIO):
    """Bytes on their way: it is known when some were last taken.

    aiohttp's own limit on silence begins when all are sent. A store that takes none would be waited for for ever.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.taken_at = time.monotonic()

    def read(self, size: int | None = -1, /) -> bytes:
        self.taken_at = time.monotonic()
        return super().read(size)


def _with_query(address: URL, query: Mapping[str, str]) -> URL:
    """Add a query as it is signed: everything quoted that may be, in order."""
    pairs = [f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in sorted(query.items())]
    return URL(f"{address}?{'&'.join(pairs)}", encoded=True) if pairs else address


def _answer(status: int, headers: Mapping[str, str], said: bytes) -> dict[str, Any]:
    """Return what an answer says as botocore's clients do.

    Raises:
        ClientError: it is a refusal.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    if status == _OK:
        return {name: lower[header.lower()] for header, name in _TOLD.items() if header.lower() in lower}
    told = {"HTTPStatusCode": status, "HTTPHeaders": lower}
    raise botocore.exceptions.ClientError(
        {"Error": {"Code": code_in(said) or str(status)}, "ResponseMetadata": told}, "PutObject"
    )
