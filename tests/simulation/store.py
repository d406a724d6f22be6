# ruff: noqa: N803 - the names are botocore's
"""The simulated object store: bytes by key, for presigned addresses and for temporary credentials."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import botocore.exceptions

from agent.adapters.sums import Sums, composite, sums
from tests.simulation.session import Reply, Request
from tests.simulation.wire import Broken, Wire
from tests.simulation.world import Fate, World

STORE = "https://store.test"
_ADDRESS_SECONDS = 900.0
_CREDENTIALS_SECONDS = 3600.0


_EXPIRED = Reply(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
_Answer = dict[str, Any]


@dataclass(slots=True)
class Upload:
    """An object that is being sent in parts."""

    key: str
    until: float  # when the credentials expire that it could be thrown away with
    parts: dict[int, bytes] = field(default_factory=dict)


class Store:
    """Objects in memory."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.objects: dict[str, bytes] = {}
        self.wholes: dict[str, Sums] = {}  # of those that came in parts
        self.uploads: dict[str, Upload] = {}
        self.uploads_begun = 0
        self.spoilt = 0.0  # how probable it is that a download arrives otherwise than it was sent
        self.spoils: dict[str, int] = {}

    def upload(self, upload_id: str) -> Upload:
        """Return what is being sent in parts."""
        if upload_id not in self.uploads:
            raise _refusal("NoSuchUpload", 404)
        return self.uploads[upload_id]

    def presigned(self, key: str) -> str:
        """Return an address that anybody may read for a while."""
        return f"{STORE}/{key}?X-Amz-Expires={self._world.now + _ADDRESS_SECONDS}"

    def grant(self, key: str) -> dict[str, str]:
        """Return credentials for one object."""
        until = str(self._world.now + _CREDENTIALS_SECONDS)
        return {
            "access_key_id": "ASIA",
            "secret_access_key": "a-secret",
            "session_token": until,
            "bucket": "ovation",
            "key": key,
        }

    def serve(self, request: Request) -> Reply:
        """Answer a download, or take a body."""
        if request.method == "PUT":
            return self._take(request)
        if "X-Amz-Expires" not in request.url.query:
            return Reply(403, b"<Code>AccessDenied</Code>")
        if float(request.url.query["X-Amz-Expires"]) < self._world.now:
            return _EXPIRED
        key = request.url.path.lstrip("/")
        content = self.objects.get(key)
        if content is None:
            return Reply(404)
        headers = {"Content-Length": str(len(content)), "ETag": f'"{hashlib.md5(content).hexdigest()}"'}  # noqa: S324 it is S3's
        return self._spoilt(key, content, headers) or Reply(200, content, headers)

    def _take(self, request: Request) -> Reply:
        """Take an object, or a part of one."""
        key, query = request.url.path.lstrip("/"), request.url.query
        if float(request.headers["X-Amz-Security-Token"]) < self._world.now:
            return _refused("ExpiredToken", 400)
        found = sums(request.body)
        if request.headers["x-amz-checksum-crc32"] != found.crc32:
            return _refused("BadDigest", 400)
        if "uploadId" not in query:
            self.objects[key] = request.body
        elif query["uploadId"] in self.uploads:
            self.uploads[query["uploadId"]].parts[int(query["partNumber"])] = request.body
        else:
            return _refused("NoSuchUpload", 404)
        told = {"ETag": f'"{found.etag}"', "x-amz-checksum-crc32": found.crc32}
        return Reply(200, b"", {**told, "x-amz-server-side-encryption": "AES256"})

    def _spoilt(self, key: str, content: bytes, headers: dict[str, str]) -> Reply | None:
        """Return what arrives instead, now and then; not so often that an input could be taken for broken."""
        chance = self._world.chance
        if self._world.is_calm or self.spoils.get(key, 0) >= 3 or not chance.happens(self.spoilt, f"spoilt {key}"):
            return None
        self.spoils[key] = self.spoils.get(key, 0) + 1
        self._world.note("store", f"{key} arrives spoilt")
        match chance.one_of(("half", "short", "other", "expired"), f"how spoilt {key}"):
            case "half":
                return Reply(200, content, headers, breaks_off=True)
            case "short":
                return Reply(200, content[:-1], headers)
            case "other":  # never the same twice: that would be the store's own
                return Reply(200, bytes(each ^ 1 << self.spoils[key] for each in content), headers)
        return _EXPIRED


class Clients:
    """What aiobotocore's session is to the uploader."""

    def __init__(self, store: Store, wire: Wire) -> None:
        self._store = store
        self._wire = wire

    def create_client(self, service: str, *, aws_session_token: str, **_: Any) -> AbstractAsyncContextManager[_Client]:
        """Return a client for S3 with temporary credentials."""
        assert service == "s3"
        return _open(_Client(self._store, self._wire, float(aws_session_token)))


@asynccontextmanager
async def _open(client: _Client) -> AsyncIterator[_Client]:
    yield client


class _Client:
    """What botocore's client is to the uploader; the names are botocore's."""

    def __init__(self, store: Store, wire: Wire, until: float) -> None:
        self._store = store
        self._wire = wire
        self._until = until

    async def generate_presigned_url(self, _: str, *, Params: dict[str, str]) -> str:
        return f"{STORE}/{Params['Key']}?signed"

    async def head_object(self, *, Key: str, **_: Any) -> _Answer:
        def head() -> _Answer:
            if Key not in self._store.objects:
                raise _refusal("404", 404)
            whole = self._store.wholes.get(Key) or sums(self._store.objects[Key])
            return {**_told(whole), "ContentLength": len(self._store.objects[Key])}

        return await self._ask(f"HEAD {Key}", head)

    async def create_multipart_upload(self, *, Key: str, **_: Any) -> _Answer:
        def create() -> _Answer:
            self._store.uploads_begun += 1
            upload_id = f"upload-{self._store.uploads_begun}"
            self._store.uploads[upload_id] = Upload(Key, self._until)
            return {"UploadId": upload_id}

        return await self._ask(f"POST {Key}?uploads", create)

    async def complete_multipart_upload(
        self, *, Key: str, UploadId: str, MultipartUpload: dict[str, Any], **_: Any
    ) -> _Answer:
        def complete() -> _Answer:
            parts = self._store.upload(UploadId).parts
            bodies = [parts[each["PartNumber"]] for each in MultipartUpload["Parts"]]
            del self._store.uploads[UploadId]
            self._store.objects[Key] = b"".join(bodies)
            self._store.wholes[Key] = composite([sums(body) for body in bodies])
            return _told(self._store.wholes[Key])

        return await self._ask(f"POST {Key}?complete", complete)

    async def abort_multipart_upload(self, *, Key: str, UploadId: str, **_: Any) -> _Answer:
        def abort() -> _Answer:
            self._store.upload(UploadId)
            del self._store.uploads[UploadId]
            return {}

        return await self._ask(f"DELETE {Key}?upload", abort)

    def get_paginator(self, name: str) -> _Pages:
        return _Pages(self._pages, name)

    async def _pages(self, name: str, Key: str = "", Prefix: str = "", UploadId: str = "", **_: Any) -> _Answer:
        def list_parts() -> _Answer:
            listed = [
                {"PartNumber": number, "Size": len(body), **_told(sums(body))}
                for number, body in sorted(self._store.upload(UploadId).parts.items())
            ]
            return {"Parts": listed}

        def list_uploads() -> _Answer:
            found = self._store.uploads.items()
            return {"Uploads": [{"UploadId": each, "Key": of.key} for each, of in found if of.key == Prefix]}

        return await self._ask(f"GET {Key or Prefix}?{name}", list_parts if name == "list_parts" else list_uploads)

    async def _ask(self, what: str, serve: Callable[[], _Answer]) -> _Answer:
        def checked() -> _Answer:
            if self._until < self._wire.world.now:
                raise _refusal("ExpiredToken", 400)
            return serve()

        try:
            return await self._wire.ask(what, checked)
        except Broken as broken:
            raise _error(broken.fate) from None


class _Pages:
    def __init__(self, ask: Callable[..., Awaitable[_Answer]], name: str) -> None:
        self._ask = ask
        self._name = name

    async def paginate(self, **what: str) -> AsyncIterator[_Answer]:
        yield await self._ask(self._name, **what)


def _told(found: Sums) -> _Answer:
    return {"ETag": f'"{found.etag}"', "ChecksumCRC32": found.crc32, "ServerSideEncryption": "AES256"}


def _refused(code: str, status: int) -> Reply:
    return Reply(status, f"<Error><Code>{code}</Code></Error>".encode())


def _refusal(code: str, status: int) -> Any:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


def _error(fate: Fate) -> Any:
    """Return what botocore raises once it has tried often enough by itself."""
    if fate is Fate.BUSY:
        return _refusal("SlowDown", 503)
    if fate is Fate.REFUSED:
        return botocore.exceptions.EndpointConnectionError(endpoint_url=STORE)
    if fate in {Fate.SILENT_BEFORE, Fate.SILENT_AFTER}:
        return botocore.exceptions.ReadTimeoutError(endpoint_url=STORE)
    return botocore.exceptions.ConnectionClosedError(endpoint_url=STORE)
