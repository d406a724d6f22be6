"""The disk under the jobs: how much room staging may take, and writing that is still there after a power cut."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_UNFINISHED = ".part"
_LIBC = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h
_MOST_WAITING = 10_000


class Space(NamedTuple):
    """What a file system has, in bytes."""

    free: int
    total: int


def space(path: Path) -> Space:
    """Return what the file system has that `path` is on; what only root may fill does not count as free."""
    found = os.statvfs(path)
    return Space(free=found.f_bavail * found.f_frsize, total=found.f_blocks * found.f_frsize)


@dataclass(frozen=True, slots=True)
class Lack:
    """Why there is no room now, in bytes. As text it is a reason that people read.

    The text is rounded, up for what is needed and down for what there is: so the two never read alike, and it changes
    only when the room does to speak of.
    """

    needed: int
    free: int  # what there is for this job: not promised to others, nor to be left free
    most: int  # what there could ever be

    def __str__(self) -> str:
        needed = f"waiting for disk space: {_rounded(self.needed, up=True)} are needed"
        if self.needed > self.most:
            return f"{needed}, the agent's whole disk can give {_rounded(self.most, up=False)}"
        return f"{needed}, the agent's disk can give {_rounded(self.free, up=False)} now"


@dataclass(frozen=True, slots=True)
class _Waiting:
    needed: int
    has_files: bool


class Room:
    """The bytes of one file system, promised to jobs before they fetch anything.

    A promise shrinks as its bytes land on the disk, or they would be counted twice. What nobody can know beforehand,
    such as the size of a remote file or what containers write, is met by `check` while bytes land.
    """

    def __init__(self, path: Path, min_free_bytes: int, measure: Callable[[Path], Space] = space) -> None:
        self._path = path
        self._min_free = min_free_bytes
        self._measure = measure
        self._promised: dict[str, int] = {}
        self._waiting: dict[str, _Waiting] = {}  # whoever has waited longest first
        self.clear: Callable[[Callable[[], bool]], Awaitable[None]] | None = None
        """Removes what is kept for nobody's work, bit by bit, until its argument says that it is enough."""

    async def take(self, job_id: str, needed: int, *, has_files: bool) -> Lack | None:
        """Promise a job `needed` bytes, having room made if need be; a former promise to it is replaced.

        Args:
            job_id: whose.
            needed: bytes; nothing always fits.
            has_files: it has some of its files on the disk already, which stay there while it waits.

        Returns:
            What is lacking. Then nothing was promised.
        """
        lack = self._lack(job_id, needed)
        if lack and needed <= lack.most and self.clear:
            await self.clear(lambda: self._lack(job_id, needed) is None)
            lack = self._lack(job_id, needed)
        if lack is None:
            self._promised[job_id] = needed
            self._waiting.pop(job_id, None)
        else:
            self._promised.pop(job_id, None)
            self._waiting[job_id] = _Waiting(needed, has_files)
            if len(self._waiting) > _MOST_WAITING:  # jobs that went on with another agent are not missed
                del self._waiting[next(iter(self._waiting))]
        return lack

    def needed_by(self, job_id: str) -> int | None:
        """Return the bytes that a job lacked room for when it last asked, `None` when it does not wait."""
        waiting = self._waiting.get(job_id)
        return None if waiting is None else waiting.needed

    def gives_way(self, job_id: str) -> bool:
        """Return whether a job that waits is to give back the files that it has.

        Of several that wait for each other's room, the one that has waited longest keeps its files.
        """
        for other, waiting in self._waiting.items():
            if other == job_id:
                return False
            if waiting.has_files:
                return True
        return False

    def landed(self, job_id: str, count: int) -> None:
        """Note that `count` promised bytes are on the disk now; a negative count, that they are gone again."""
        if job_id in self._promised:
            self._promised[job_id] -= count

    def check(self) -> None:
        """Go on only while there is room to speak of, whatever was promised.

        Raises:
            OSError: ENOSPC; half of what staging leaves free is used up. Half, so that what others write beside it
                does not end every transfer that was let in just before.
        """
        if self._measure(self._path).free < self._min_free // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def release(self, job_id: str) -> None:
        """End a promise: what was to land has landed, or will not."""
        self._promised.pop(job_id, None)

    def forget(self, job_id: str) -> None:
        """Take note that a job wants nothing of the disk any more."""
        self._promised.pop(job_id, None)
        self._waiting.pop(job_id, None)

    def _lack(self, job_id: str, needed: int) -> Lack | None:
        if needed <= 0:
            return None
        now = self._measure(self._path)
        others = sum(max(0, count) for other, count in self._promised.items() if other != job_id)
        free = max(0, now.free - others - self._min_free)
        return Lack(needed, free, max(0, now.total - self._min_free)) if needed > free else None


def write_whole(path: Path, content: bytes, mode: int = 0o644, *, durable: bool = True) -> None:
    """Write a file whole, or not at all; and durably, unless it need not outlive the machine's own end.

    Raises:
        OSError: the disk refuses; what stood there before still does.
    """
    part = path.with_name(f".{os.urandom(16).hex()}{_UNFINISHED}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            if durable:
                os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def begin_to_sync(descriptor: int, offset: int, count: int) -> None:
    """Have the kernel begin to write a stretch of a file to the disk, so that a later fsync has little to wait for.

    Where it refuses, that fsync waits for all of it.
    """
    _LIBC.sync_file_range(
        ctypes.c_int(descriptor), ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
    )


def remove_unfinished(directory: Path) -> None:
    """Remove what was left of files that a killed process was writing whole. Nobody else may be writing there now."""
    for path in directory.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rounded(count: int, *, up: bool) -> str:
    """Return bytes for people: two digits, or up to three before the point."""
    scale, unit = 1, _UNITS[0]
    for unit in _UNITS:
        if count < scale * 1000 or unit == _UNITS[-1]:
            break
        scale *= 1000
    step = max(1, scale // 10 if count < scale * 10 else scale)
    steps = -(-count // step) if up else count // step
    amount = steps * step
    return f"{amount / scale:.1f} {unit}" if scale > 1 and amount < scale * 10 else f"{amount // scale} {unit}"
