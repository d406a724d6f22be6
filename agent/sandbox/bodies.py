"""Bodies of uploads: `aws-chunked` ones taken apart, written as they come, checked against every promise."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from botocore.httpchecksum import _CHECKSUM_CLS

from agent.sandbox.errors import S3Error
from agent.sandbox.objects import BlobWriter
from agent.sandbox.signatures import Signed

CHUNK_BYTES = 256 * 1024
BATCH_BYTES = 1024 * 1024
MAXIMUM_LINE_BYTES = 4096
MAXIMUM_OBJECT_BYTES = 5 * 1024**4
CHECKSUM_PREFIX = "x-amz-checksum-"
# those that this installation of botocore can compute: CRC32C and CRC64NVME only where awscrt is installed
ALGORITHMS: dict[str, Any] = dict(_CHECKSUM_CLS)
SIGNED_CHUNKS = frozenset({"STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"})
UNSIGNED_CHUNKS = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


@dataclass(slots=True)
class Promises:
    """What the request says of its body; trailers are added once they have been read."""

    sha256: str | None
    md5: str | None
    length: int | None
    checksums: dict[str, str] = field(default_factory=dict)
    announced: tuple[str, ...] = ()


def promises(request: web.Request, signed: Signed) -> tuple[Promises, str]:
    """Return what the request promises, and its payload's kind as in `x-amz-content-sha256`."""
    kind = request.headers.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD")
    if signed.claim.lifetime_seconds is not None and not kind.startswith("STREAMING-"):
        kind = "UNSIGNED-PAYLOAD"
    chunked = kind.startswith("STREAMING-")
    if chunked and kind not in SIGNED_CHUNKS and kind != UNSIGNED_CHUNKS:
        raise S3Error(501, "NotImplemented", f"{kind} is not supported")
    length = request.headers.get("x-amz-decoded-content-length" if chunked else "Content-Length")
    if length is None or not length.isdigit():
        raise S3Error(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
    if int(length) > MAXIMUM_OBJECT_BYTES:
        raise S3Error(400, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
    given = {
        name.lower().removeprefix(CHECKSUM_PREFIX): value
        for name, value in request.headers.items()
        if name.lower().startswith(CHECKSUM_PREFIX) and name.lower() not in _NOT_CHECKSUMS
    }
    announced = tuple(
        name.strip().lower().removeprefix(CHECKSUM_PREFIX)
        for name in request.headers.get("x-amz-trailer", "").split(",")
        if name.strip()
    )
    sha256 = kind if kind != "UNSIGNED-PAYLOAD" and not chunked else None
    return Promises(sha256, request.headers.get("Content-MD5"), int(length), given, announced), kind


_NOT_CHECKSUMS = frozenset({f"{CHECKSUM_PREFIX}algorithm", f"{CHECKSUM_PREFIX}mode", f"{CHECKSUM_PREFIX}type"})


async def receive(request: web.Request, signed: Signed, writer: BlobWriter) -> dict[str, str]:
    """Write the body and check it; return its checksums by algorithm, in base64 as S3 gives them.

    Raises:
        S3Error: the body is not what the request said; nothing of it is to be kept.
    """
    promised, kind = promises(request, signed)
    if kind.startswith("STREAMING-"):
        chunks = _unchunked(request, signed if kind in SIGNED_CHUNKS else None, promised)
    else:
        chunks = aiter(request.content.iter_chunked(CHUNK_BYTES))
    sha256 = hashlib.sha256() if promised.sha256 is not None else None
    names = {*promised.checksums, *promised.announced} & ALGORITHMS.keys()
    computed: dict[str, Any] = {name: ALGORITHMS[name]() for name in names}
    hashes = [*computed.values(), *([sha256] if sha256 is not None else [])]
    await _spool(chunks, writer, hashes)
    if writer.size != promised.length:
        message = "You did not provide the number of bytes specified by the Content-Length HTTP header"
        raise S3Error(400, "IncompleteBody", message)
    if sha256 is not None and not hmac.compare_digest(sha256.hexdigest(), str(promised.sha256)):
        message = "The provided 'x-amz-content-sha256' header does not match what was computed."
        raise S3Error(400, "XAmzContentSHA256Mismatch", message)
    _check_md5(promised.md5, writer.md5)
    results = {name: str(checksum.b64digest()) for name, checksum in computed.items()}
    _check_checksums(promised, results)
    return results


async def _spool(chunks: AsyncIterator[bytes], writer: BlobWriter, hashes: list[Any]) -> None:
    """Write and hash in two threads while the next bytes come; the remainder, and small bodies, at once."""

    def digest(data: bytes | bytearray) -> None:
        writer.digest(data)
        for one in hashes:
            one.update(data)

    batch = bytearray()
    busy: asyncio.Future[Any] | None = None
    try:
        async for chunk in chunks:
            batch += chunk
            if len(batch) >= BATCH_BYTES:
                data = bytes(batch)
                batch.clear()
                if busy is not None:
                    await busy
                busy = asyncio.gather(asyncio.to_thread(writer.store, data), asyncio.to_thread(digest, data))
    finally:
        if busy is not None:
            await busy
    writer.store(batch)
    digest(batch)


def _check_checksums(promised: Promises, results: dict[str, str]) -> None:
    for name in promised.announced:
        if name not in promised.checksums:
            raise S3Error(400, "MalformedTrailerError", f"The trailer x-amz-checksum-{name} did not come")
    for name, value in results.items():
        if promised.checksums[name] != value:
            message = f"The {name.upper()} you specified did not match the calculated checksum."
            raise S3Error(400, "BadDigest", message)


def _check_md5(promised: str | None, digest: bytes) -> None:
    if promised is None:
        return
    try:
        wanted = base64.b64decode(promised, validate=True)
    except binascii.Error:
        wanted = b""
    if len(wanted) != len(digest):
        raise S3Error(400, "InvalidDigest", "The Content-MD5 you specified is not valid.")
    if wanted != digest:
        raise S3Error(400, "BadDigest", "The Content-MD5 you specified did not match what we received.")


async def _unchunked(request: web.Request, signed: Signed | None, promised: Promises) -> AsyncIterator[bytes]:
    previous = signed.claim.signature if signed is not None else ""
    while True:
        size, signature = _chunk_header(await _line(request))
        digest = hashlib.sha256()
        remaining = size
        while remaining:
            chunk = await request.content.read(min(remaining, CHUNK_BYTES))
            if not chunk:
                raise S3Error(400, "IncompleteBody", "The request body terminated unexpectedly")
            remaining -= len(chunk)
            if signed is not None:
                digest.update(chunk)
            yield chunk
        if signed is not None:
            previous = _check_signature(signed.chunk_signature(previous, digest.hexdigest()), signature)
        if size == 0:
            break
        if await _line(request) != b"":
            raise _malformed("a chunk is longer than it says")
    await _trailers(request, signed, previous, promised)


async def _trailers(request: web.Request, signed: Signed | None, previous: str, promised: Promises) -> None:
    text = b""
    while line := await _line(request):
        name, _, value = line.decode("latin-1").partition(":")
        name = name.strip().lower()
        if name == "x-amz-trailer-signature":
            if signed is not None:
                digest = hashlib.sha256(text).hexdigest()
                _check_signature(signed.chunk_signature(previous, digest, trailer=True), value.strip())
        else:
            text += line + b"\n"
            promised.checksums[name.removeprefix(CHECKSUM_PREFIX)] = value.strip()


def _chunk_header(line: bytes) -> tuple[int, str]:
    size, _, extension = line.decode("latin-1").partition(";")
    try:
        number = int(size, 16)
    except ValueError:
        number = -1
    if number < 0:
        raise _malformed("a chunk has no size")
    return number, extension.removeprefix("chunk-signature=").strip()


def _check_signature(expected: str, given: str) -> str:
    if not hmac.compare_digest(expected.encode(), given.encode()):
        message = "The request signature we calculated does not match the signature you provided."
        raise S3Error(403, "SignatureDoesNotMatch", message)
    return expected


async def _line(request: web.Request) -> bytes:
    try:
        line = await request.content.readline(max_line_length=MAXIMUM_LINE_BYTES)
    except (ValueError, LineTooLong) as error:
        raise _malformed("a line is too long") from error
    return line.rstrip(b"\r\n")


def _malformed(what: str) -> S3Error:
    return S3Error(400, "InvalidRequest", f"The aws-chunked body is malformed: {what}")
