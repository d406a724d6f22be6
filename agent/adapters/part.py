"""A file that is being fetched in ranges: what of it is on the disk, and how it is gone on with after a crash.

Beside the bytes lies a journal: of which object they are, and which of them are certainly on the disk. It is written
after those were synced, so that it never says too much. What it does not tell of is fetched again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.adapters.disk import begin_to_sync, write_whole

PIECE_BYTES = 1 << 20
_BUFFERS = 8
_HANDED_BYTES = _BUFFERS * PIECE_BYTES
_WRITTEN_BYTES = 1 << 16
_LAST_BYTES = 8 << 20  # so short the last ranges come to be


@dataclass(slots=True)
class Range:
    """A stretch of the file: its bytes from `start` to `at` are there, those up to `end` are to come."""

    start: int
    at: int
    end: int


@dataclass(slots=True)
class Buffer:
    """What a piece is read into."""

    bytes: memoryview | None


class Part:
    """The file. One thread at a time writes to a range; any may ask."""

    def __init__(self, path: Path, size: int, etag: str, length: int, at_once: int = 1) -> None:
        """Open it, or make it where there is none of this very object.

        Args:
            path: where the bytes are.
            size: bytes of the whole object.
            etag: of the object, as the store gives it.
            length: bytes of a range at most.
            at_once: how many ranges may come at the same time.

        Raises:
            OSError: the disk refuses.
        """
        self.size = size
        self.etag = etag
        self._path = path
        self._journal = journal_of(path)
        self._changed = threading.Condition()
        self._is_over = False
        self.digested: dict[str, int] = {}  # up to where each digest has come
        self._spare: list[memoryview] = []
        self._lent = 0
        self._handed: dict[int, tuple[memoryview, int]] = {}  # pieces on their way to the digest that takes them
        self._next = sys.maxsize  # what it needs next
        done = self._read_journal()
        if not done:
            path.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(path, flags if done else flags | os.O_CREAT | os.O_EXCL, 0o600)
        self.ranges = ranges_of(done, size, length, at_once)
        self.found = sum(each.at - each.start for each in self.ranges)

    @property
    def lacking(self) -> int:
        """How many bytes are to come."""
        return sum(each.end - each.at for each in self.ranges)

    def close(self) -> None:
        """Close the file; whoever reads along comes to an end."""
        self.end()
        os.close(self.descriptor)

    def end(self) -> None:
        """Say that nothing more will come."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    @contextmanager
    def buffer(self) -> Iterator[Buffer]:
        """Lend a buffer for the next piece; an empty one when too many are out."""
        with self._changed:
            lent = Buffer(self._spare.pop() if self._spare else None)
            if lent.bytes is None and self._lent < _BUFFERS:
                self._lent += 1
                lent.bytes = memoryview(bytearray(PIECE_BYTES))
        try:
            yield lent
        finally:
            if lent.bytes is not None:
                with self._changed:
                    self._spare.append(lent.bytes)

    def write(self, into: Range, piece: memoryview, buffer: Buffer | None = None) -> None:
        """Write bytes where a range goes on.

        Args:
            into: the range.
            piece: the bytes.
            buffer: what they are in, if it is one of `buffer`; it goes on to the digest if that comes here soon.

        Raises:
            OSError: the disk refuses.
        """
        reached, at = 0, into.at
        while reached < len(piece):
            # In such small steps: for larger ones the kernel looks for large pages, which may take it five times as
            # long as all the rest (Linux 6.18, ext4: 0.23 s/GB against 0.2 to 1.7).
            reached += os.pwrite(self.descriptor, piece[reached : reached + _WRITTEN_BYTES], at + reached)
        with self._changed:
            into.at = at + reached
            if buffer is not None and buffer.bytes is not None and 0 <= at - self._next < _HANDED_BYTES:
                self._handed[at] = (buffer.bytes, reached)
                buffer.bytes = None
            self._changed.notify_all()

    def checkpoint(self) -> None:
        """Make durable what is there, and note it.

        Raises:
            OSError: the disk refuses.
        """
        done = self._done()
        os.fdatasync(self.descriptor)
        document = {"size": self.size, "etag": self.etag, "done": done}
        write_whole(self._journal, json.dumps(document).encode(), 0o600)

    def sync(self) -> None:
        """Make the whole file durable, and open to the container's user."""
        os.fchmod(self.descriptor, 0o644)
        os.fsync(self.descriptor)

    def digest(self, algorithm: str, *, takes_pieces: bool = False) -> str:
        """Return a digest of the whole, reading along in order while the ranges come.

        The bytes come from the system's cache, where they were put a moment ago. With `takes_pieces`, which only one
        may ask for, those that come in order are taken from the buffers that they came in.

        Raises:
            EOFError: not everything came.
        """
        found = hashlib.new(algorithm, usedforsecurity=algorithm != "md5")
        own = memoryview(bytearray(PIECE_BYTES))
        self._next = 0 if takes_pieces else self._next
        position = 0
        for each in self.ranges:
            while position < each.end:
                buffer, count = self._piece(each, position, takes_pieces=takes_pieces)
                if buffer is None:
                    count = os.preadv(self.descriptor, [own[:count]], position)
                    if not count:
                        raise EOFError
                found.update((own if buffer is None else buffer)[:count])
                position += count
                if takes_pieces:
                    self._gone_on(position, buffer)
            self.digested[algorithm] = position
            begin_to_sync(self.descriptor, each.start, each.end - each.start)
        return found.hexdigest()

    def forget(self) -> None:
        """Remove the journal: what is there is whole, or worth nothing."""
        self._journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove all of it."""
        self._path.unlink(missing_ok=True)
        self.forget()

    def _piece(self, within: Range, position: int, *, takes_pieces: bool) -> tuple[memoryview | None, int]:
        """Wait until a range has come further than to a position, and return the bytes there, or how many to read.

        Raises:
            EOFError: nothing more will come.
        """
        with self._changed:
            while within.at <= position:
                if self._is_over:
                    raise EOFError
                self._changed.wait()
            if takes_pieces and position in self._handed:
                return self._handed.pop(position)
            ends = [within.at, position + PIECE_BYTES, *(at for at in self._handed if takes_pieces and at > position)]
            return None, min(ends) - position

    def _gone_on(self, position: int, buffer: memoryview | None) -> None:
        with self._changed:
            self._next = position
            if buffer is not None:
                self._spare.append(buffer)
            for at in [at for at in self._handed if at < position]:
                self._spare.append(self._handed.pop(at)[0])

    def _done(self) -> list[tuple[int, int]]:
        with self._changed:
            found: list[tuple[int, int]] = []
            for each in self.ranges:
                if found and found[-1][1] == each.start:
                    found[-1] = (found[-1][0], each.at)
                elif each.at > each.start:
                    found.append((each.start, each.at))
            return found

    def _read_journal(self) -> list[tuple[int, int]]:
        """Return which bytes of this object are on the disk; what makes no sense says nothing."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            document = json.loads(self._journal.read_bytes())
            there = self._path.lstat().st_size if self._path.is_file() else 0
            if (document["size"], document["etag"]) == (self.size, self.etag):
                return _sane(document["done"], min(there, self.size))
        return []


def bytes_on_disk(path: Path) -> int:
    """Return how many bytes of an unfinished file are on the disk, whichever object they are of."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        document = json.loads(journal_of(path).read_bytes())
        return sum(end - start for start, end in _sane(document["done"], min(path.lstat().st_size, document["size"])))
    return 0


def journal_of(path: Path) -> Path:
    """Return where the journal of a file that is being fetched is."""
    return path.with_name(f"{path.name}.json")


def ranges_of(done: list[tuple[int, int]], size: int, length: int, at_once: int = 1) -> list[Range]:
    """Return the whole file as ranges in order: those that are there, and those between them, none over `length`.

    The last ones are shorter, so that `at_once` of them come to their end together, and so that little is left to be
    digested by then: a digest goes in order, and what comes at the same time waits for it.
    """
    found: list[Range] = []
    position = 0
    for start, end in [*done, (size, size)]:
        while position < start:
            share = max(_LAST_BYTES, (size - position) // at_once)
            stop = min(position + min(length, share), start)
            found.append(Range(position, position, stop))
            position = stop
        if end > start:
            found.append(Range(start, end, end))
        position = end
    return found


def _sane(done: Any, size: int) -> list[tuple[int, int]]:
    """Return ranges that lie within the file, in order and apart.

    Raises:
        ValueError, TypeError: they do not.
    """
    found: list[tuple[int, int]] = []
    position = 0
    for start, end in done:
        if not (position <= int(start) < int(end) <= size):
            raise ValueError("a journal's ranges are out of order")
        found.append((int(start), int(end)))
        position = int(end)
    return found
