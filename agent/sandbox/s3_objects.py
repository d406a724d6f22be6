"""Single objects: PUT, GET with ranges and conditions, HEAD, DELETE."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from email.utils import formatdate
from typing import TYPE_CHECKING

from aiohttp import web

from agent.sandbox.bodies import receive
from agent.sandbox.errors import S3Error
from agent.sandbox.faults import FAULT, deliver
from agent.sandbox.objects import Blob, ObjectStore, StoredObject

if TYPE_CHECKING:
    from agent.sandbox.s3 import Call

INLINE_BYTES = 64 * 1024
READ_BYTES = 256 * 1024
KEPT_HEADERS = frozenset(
    {
        "content-type",
        "content-disposition",
        "content-encoding",
        "content-language",
        "cache-control",
        "expires",
        "x-amz-server-side-encryption",
        "x-amz-storage-class",
    }
)


def kept_headers(call: Call) -> dict[str, str]:
    """Return the request's headers that belong to the object: its type, its encryption and the user's metadata."""
    kept = {
        name.lower(): value
        for name, value in call.request.headers.items()
        if name.lower() in KEPT_HEADERS or name.lower().startswith("x-amz-meta-")
    }
    encodings = [one.strip() for one in kept.get("content-encoding", "").split(",")]
    encoding = ",".join(one for one in encodings if one and one != "aws-chunked")
    kept.pop("content-encoding", None)
    if encoding:
        kept["content-encoding"] = encoding
    kept.setdefault("content-type", "binary/octet-stream")
    if kept.setdefault("x-amz-server-side-encryption", "AES256") != "AES256":
        raise S3Error(501, "NotImplemented", "The sandbox's store knows AES256 only")
    return kept


def written_headers(stored: StoredObject) -> dict[str, str]:
    """Return the headers that answer a write."""
    headers = {
        "ETag": f'"{stored.etag}"',
        "x-amz-version-id": stored.version,
        "x-amz-server-side-encryption": stored.headers["x-amz-server-side-encryption"],
    }
    return headers | {f"x-amz-checksum-{name}": value for name, value in stored.checksums.items()}


def check_write_conditions(call: Call) -> None:
    """Raise 412 when the object is not what the writer expects to replace."""
    there = call.store.stat(call.bucket, call.key)
    if call.request.headers.get("If-None-Match") == "*" and there is not None:
        raise _precondition_failed("If-None-Match")
    wanted = call.request.headers.get("If-Match")
    if wanted is not None:
        if there is None:
            raise no_such_key(call.key)
        if not _matches(wanted, there.etag):
            raise _precondition_failed("If-Match")


async def put_object(call: Call) -> web.StreamResponse:
    """Store the body whole."""
    check_write_conditions(call)
    headers = kept_headers(call)
    with call.store.writer() as writer:
        checksums = await receive(call.request, call.signed, writer)
        blob = writer.finish()
    stored = StoredObject(
        bucket=call.bucket,
        key=call.key,
        etag=blob.md5,
        size=blob.size,
        version=secrets.token_urlsafe(24),
        modified=call.settings.clock(),
        headers=headers,
        checksums=checksums,
        blobs=(blob,),
    )
    call.store.put(stored)
    return web.Response(headers=written_headers(stored))


async def delete_object(call: Call) -> web.StreamResponse:
    """Delete the object; there need not be one."""
    call.store.delete(call.bucket, call.key)
    return web.Response(status=204)


async def get_object(call: Call) -> web.StreamResponse:
    """Answer GET and HEAD."""
    stored = call.store.stat(call.bucket, call.key)
    if stored is None:
        raise no_such_key(call.key)
    if call.query.get("versionId", stored.version) != stored.version:
        raise S3Error(404, "NoSuchVersion", "The specified version does not exist.")
    _check_read_conditions(call.request, stored)
    headers = _read_headers(call, stored)
    if _not_modified(call.request, stored):
        return web.Response(status=304, headers=headers)
    wanted = _range(call.request, stored)
    start, count = wanted or (0, stored.size)
    status = 200
    if wanted is not None:
        status = 206
        headers["Content-Range"] = f"bytes {start}-{start + count - 1}/{stored.size}"
    elif call.request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED":
        headers |= {f"x-amz-checksum-{name}": value for name, value in stored.checksums.items()}
    headers["Content-Length"] = str(count)
    if call.request.method == "HEAD":
        return web.Response(status=status, headers=headers)
    return await _send(call, stored, start, count, web.StreamResponse(status=status, headers=headers))


def no_such_key(key: str) -> S3Error:
    """Return the answer for an object that is not there."""
    return S3Error(404, "NoSuchKey", "The specified key does not exist.", fields={"Key": key})


def _read_headers(call: Call, stored: StoredObject) -> dict[str, str]:
    headers = {
        **stored.headers,
        "ETag": f'"{stored.etag}"',
        "Last-Modified": formatdate(stored.modified, usegmt=True),
        "Accept-Ranges": "bytes",
        "x-amz-version-id": stored.version,
    }
    if len(stored.blobs) > 1 or "-" in stored.etag:
        headers["x-amz-mp-parts-count"] = str(len(stored.blobs))
    for name, value in call.query.items():
        if name.startswith("response-"):
            headers[name.removeprefix("response-")] = value.replace("\r", " ").replace("\n", " ")
    return headers


async def _send(
    call: Call, stored: StoredObject, start: int, count: int, response: web.StreamResponse
) -> web.StreamResponse:
    request = call.request
    fault = request.get(FAULT)
    if fault is not None:
        async with aclosing(_chunks(call.store, stored, start, count)) as chunks:  # also when the client goes away
            return await deliver(request, response, chunks, count, fault)
    if count <= INLINE_BYTES:
        body = b"".join([chunk async for chunk in _chunks(call.store, stored, start, count)])
        return web.Response(status=response.status, headers=response.headers, body=body)
    await response.prepare(request)
    loop = asyncio.get_running_loop()
    for blob, offset, length in _slices(stored.blobs, start, count):
        if request.transport is None:
            raise ConnectionResetError("the client went away")
        with call.store.path(blob).open("rb") as file:
            await loop.sendfile(request.transport, file, offset, length)
    await response.write_eof()
    return response


async def _chunks(store: ObjectStore, stored: StoredObject, start: int, count: int) -> AsyncGenerator[bytes, None]:
    for blob, offset, length in _slices(stored.blobs, start, count):
        with store.path(blob).open("rb") as file:
            file.seek(offset)
            remaining = length
            while remaining:
                chunk = file.read(min(READ_BYTES, remaining))
                if not chunk:
                    raise ConnectionResetError("the object's file is shorter than its record")
                remaining -= len(chunk)
                yield chunk


def _slices(blobs: tuple[Blob, ...], start: int, count: int) -> list[tuple[Blob, int, int]]:
    """Return which bytes of which files make up the range: blob, offset, length."""
    slices = []
    position = 0
    for blob in blobs:
        low, high = max(start, position), min(start + count, position + blob.size)
        if low < high:
            slices.append((blob, low - position, high - low))
        position += blob.size
    return slices


def _range(request: web.Request, stored: StoredObject) -> tuple[int, int] | None:
    """Return start and count of a single range; None to send all, as S3 does for what it does not understand."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "").strip())
    if found is None or found.groups() == ("", ""):
        return None
    if_range = request.headers.get("If-Range")
    if if_range is not None and not _matches(if_range, stored.etag):
        return None
    first, last = found.groups()
    if first == "":
        start, end = max(0, stored.size - int(last)), stored.size - 1
    else:
        start, end = int(first), min(int(last or stored.size), stored.size - 1)
        if last != "" and int(last) < int(first):
            return None
    if start >= stored.size or end < start:
        raise S3Error(
            416,
            "InvalidRange",
            "The requested range is not satisfiable",
            fields={"RangeRequested": request.headers["Range"], "ActualObjectSize": str(stored.size)},
            headers={"Content-Range": f"bytes */{stored.size}"},
        )
    return start, end - start + 1


def _check_read_conditions(request: web.Request, stored: StoredObject) -> None:
    wanted = request.headers.get("If-Match")
    if wanted is not None:
        if not _matches(wanted, stored.etag):
            raise _precondition_failed("If-Match")
        return
    since = request.if_unmodified_since
    if since is not None and int(stored.modified) > since.timestamp():
        raise _precondition_failed("If-Unmodified-Since")


def _not_modified(request: web.Request, stored: StoredObject) -> bool:
    unwanted = request.headers.get("If-None-Match")
    if unwanted is not None:
        return _matches(unwanted, stored.etag)
    since = request.if_modified_since
    return since is not None and int(stored.modified) <= since.timestamp()


def _matches(wanted: str, etag: str) -> bool:
    given = {one.strip().removeprefix("W/").strip('"') for one in wanted.split(",")}
    return "*" in given or etag in given


def _precondition_failed(condition: str) -> S3Error:
    message = "At least one of the pre-conditions you specified did not hold"
    return S3Error(412, "PreconditionFailed", message, fields={"Condition": condition})
