"""What is sent of a file, in pieces, and what the object store is to say of each and of the whole."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from agent.adapters.lane import Span
from agent.adapters.lanes import in_thread
from agent.errors import StorageMismatch

_READ_BYTES = 1 << 20
_MD5 = re.compile(r'"?([0-9a-f]{32}(?:-[0-9]+)?)"?')


class Sums(NamedTuple):
    """What the store says of bytes that it has: their CRC32 in base64, their MD5 as an ETag without quotes.

    The MD5 is None where nobody needs it: it costs more than all the rest of an upload.
    """

    crc32: str
    etag: str | None


def sums(body: bytes) -> Sums:
    """Return what the store is to say of these bytes."""
    return Sums(_base64(zlib.crc32(body)), hashlib.md5(body, usedforsecurity=False).hexdigest())


def composite(parts: Sequence[Sums]) -> Sums:
    """Return what the store is to say of an object that was sent in these parts: the sums of their sums."""
    crc32 = zlib.crc32(b"".join(base64.b64decode(part.crc32) for part in parts))
    etags = [part.etag for part in parts if part.etag is not None]
    digest = hashlib.md5(b"".join(map(bytes.fromhex, etags)), usedforsecurity=False)
    etag = f"{digest.hexdigest()}-{len(parts)}" if len(etags) == len(parts) else None
    return Sums(f"{_base64(crc32)}-{len(parts)}", etag)


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
    if sent.etag is not None and etag is not None and plain and ("-" in etag[1]) == in_parts:
        told = True
        if etag[1] != sent.etag:
            raise StorageMismatch(f"the object store has bytes with MD5 {etag[1]}, sent were {sent.etag}")
    return told


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file that go to the store in one request."""

    span: Span
    crc32: str

    async def confirmed(self, answer: Mapping[str, Any]) -> Sums:
        """Compare with what the store says of it, and return its sums; the MD5 only if nothing else tells.

        Raises:
            StorageMismatch: the store has other bytes.
        """
        if confirm(answer, Sums(self.crc32, None)):
            return Sums(self.crc32, None)
        found = Sums(self.crc32, await self.md5())
        confirm(answer, found)
        return found

    async def md5(self) -> str:
        """Return the MD5 of these bytes, read once more."""
        return await in_thread(_md5, self.span)


class Source:
    """A file on its way, in pieces of `length` bytes; the last may be shorter. One piece is read at a time."""

    def __init__(self, descriptor: int, size: int, length: int) -> None:
        self._descriptor = descriptor
        self._length = max(1, length)
        self.size = size

    @property
    def numbers(self) -> range:
        """The numbers of the pieces, from 1; a file without bytes is one piece."""
        return range(1, max(1, -(-self.size // self._length)) + 1)

    async def piece(self, number: int, sha256: hashlib._Hash) -> Piece:
        """Look through a piece and let `sha256` see it; what is sent then comes from the system's cache.

        Raises:
            StorageMismatch: the file is shorter than it was.
        """
        return await in_thread(self._look, number, sha256)

    def check(self) -> None:
        """Go on only if the file still has its size.

        Raises:
            StorageMismatch: it has not.
        """
        size = os.fstat(self._descriptor).st_size
        if size != self.size:
            raise StorageMismatch(f"it has {size} bytes now, {self.size} when its delivery began: it was changed")

    def _look(self, number: int, sha256: hashlib._Hash) -> Piece:
        offset = (number - 1) * self._length
        span = Span(self._descriptor, offset, min(offset + self._length, self.size) - offset)
        if offset + self._length < self.size:  # have the disk read on while this piece is looked through
            os.posix_fadvise(self._descriptor, offset + self._length, self._length, os.POSIX_FADV_WILLNEED)
        crc32 = 0
        for some in _read(span):
            sha256.update(some)
            crc32 = zlib.crc32(some, crc32)
        return Piece(span, _base64(crc32))


def _read(span: Span) -> Iterator[memoryview]:
    """Yield the bytes of a stretch, each piece good until the next.

    Raises:
        StorageMismatch: the file ends in it.
    """
    buffer = memoryview(bytearray(min(_READ_BYTES, span.length)))
    position, end = span.offset, span.offset + span.length
    while position < end:
        count = os.preadv(span.descriptor, [buffer[: end - position]], position)
        if not count:
            raise StorageMismatch("it became shorter while it was read")
        yield buffer[:count]
        position += count


def _md5(span: Span) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for some in _read(span):
        digest.update(some)
    return digest.hexdigest()


def _base64(crc32: int) -> str:
    return base64.b64encode(crc32.to_bytes(4, "big")).decode()
