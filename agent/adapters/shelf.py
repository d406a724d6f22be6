"""The cache's files: which Revisions' bytes there are, under which names, and how a job gets at them.

    revisions/<key>.json   what is known of a Revision: the key follows from its id, which is a stranger's text
    blobs/<ab>/<sha256>    bytes, read-only; two Revisions with the same bytes share them
    incoming/<key>         bytes on their way, and what the download keeps beside them
    locks/<key>            locked (flock) by whoever fetches, on this machine or another

Bytes are in place before the record that tells of them, and the record goes before the bytes. So what a record tells
of is whole, or it is found to be damaged: nobody ever writes to a blob. A job's file is another name of the blob, where
the file system can do that: to remove one takes nothing from the other, and a blob with other names is in use.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.adapters.disk import sync_directory, write_whole

_FICLONE = 0x40049409  # of linux/fs.h
_CANNOT_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS})
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COPIED_BYTES = 64 << 20
_HASHED_BYTES = 1 << 20
_MODE = 0o444
_DEBRIS_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A Revision in the cache. `used_at` is in seconds of the clock on the wall; sizes are in bytes."""

    key: str
    revision_id: str
    name: str
    size: int
    sha256: str
    used_at: float
    in_use: bool  # by a job that has its bytes under another name


class Shelf:
    """One directory. Everything here blocks, and is called in threads, or by the command line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._records = directory / "revisions"
        self._blobs = directory / "blobs"
        self._incoming = directory / "incoming"
        self._locks = directory / "locks"

    def prepare(self) -> None:
        """Make the directories, closed to everybody else."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._records, self._blobs, self._incoming, self._locks):
            folder.mkdir(mode=0o700, exist_ok=True)

    def incoming(self, revision_id: str) -> Path:
        """Return where a Revision's bytes go while they are fetched."""
        return self._incoming / key_of(revision_id)

    def blob(self, sha256: str) -> Path:
        """Return where bytes are."""
        return self._blobs / sha256[:2] / sha256

    def find(self, revision_id: str) -> Entry | None:
        """Return what is there of a Revision, if it is there as it was put; what is damaged is removed."""
        return self._read(key_of(revision_id))

    def entries(self) -> list[Entry]:
        """Return all there is, what was used longest ago first."""
        found: list[Entry] = []
        with suppress(FileNotFoundError):
            keys = [path.stem for path in self._records.iterdir() if path.suffix == ".json"]
            found.extend(entry for key in keys if (entry := self._read(key)))
        return sorted(found, key=lambda entry: entry.used_at)

    def take(self, entry: Entry, path: Path) -> bool:
        """Put an entry's bytes at `path`, in place of what is there; return False if they are gone meanwhile.

        Raises:
            OSError: the disk refuses.
        """
        part = path.with_name(f".{os.urandom(16).hex()}.part")
        try:
            self._share(self.blob(entry.sha256), part)
            part.rename(path)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            return False
        finally:
            part.unlink(missing_ok=True)
        sync_directory(path.parent)
        with suppress(FileNotFoundError):  # evicted in this moment: the job has its bytes all the same
            os.utime(self._record(entry.key))
        return True

    def put(self, revision_id: str, name: str, size: int, sha256: str) -> Entry | None:
        """Keep what came in for a Revision; return it, or nothing if it was not there after all.

        Raises:
            OSError: the disk refuses.
        """
        came, blob = self.incoming(revision_id), self.blob(sha256)
        blob.parent.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            came.chmod(_MODE)
            with suppress(FileNotFoundError):  # another Revision has the same bytes: its record stays right
                os.utime(came, ns=(time.time_ns(), blob.lstat().st_mtime_ns))
            came.rename(blob)
            sync_directory(blob.parent)
            sync_directory(self._blobs)
            document = {
                "revision_id": revision_id,
                "name": name,
                "size": size,
                "sha256": sha256,
                "mtime_ns": blob.lstat().st_mtime_ns,
            }
            write_whole(self._record(key_of(revision_id)), json.dumps(document).encode(), 0o600)
        return self.find(revision_id)

    def evict(self, enough: Callable[[int], bool]) -> int:
        """Drop what was used longest ago, but nothing that a job uses, until it is enough.

        Args:
            enough: is told how many bytes are left.

        Returns:
            How many bytes that freed.
        """
        entries = self.entries()
        sharing = Counter(entry.sha256 for entry in entries)
        total = left = sum({entry.sha256: entry.size for entry in entries}.values())
        for entry in entries:
            if enough(left):
                break
            if entry.in_use:
                continue
            self._record(entry.key).unlink(missing_ok=True)
            sharing[entry.sha256] -= 1
            if not sharing[entry.sha256]:
                self.blob(entry.sha256).unlink(missing_ok=True)
                left -= entry.size
        return total - left

    def is_whole(self, entry: Entry) -> bool:
        """Read an entry's bytes and say whether they are what they were; drop it if not."""
        digest = hashlib.sha256()
        try:
            with self.blob(entry.sha256).open("rb") as file:
                while some := file.read(_HASHED_BYTES):
                    digest.update(some)
        except FileNotFoundError:
            return self._read(entry.key) is None  # evicted meanwhile, or gone
        if digest.hexdigest() == entry.sha256:
            return True
        self._record(entry.key).unlink(missing_ok=True)
        self.blob(entry.sha256).unlink(missing_ok=True)
        return False

    @contextmanager
    def lock(self, revision_id: str) -> Iterator[bool]:
        """Hold the right to fetch a Revision; the value says whether it is ours. The kernel frees a dead one's."""
        path = self._locks / key_of(revision_id)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _is_the_same(descriptor, path):
                yield False  # who had it removed the file in this moment
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def sweep(self) -> None:
        """Remove what nobody will ask for again: downloads and blobs without a record that are a day old."""
        told = {entry.sha256 for entry in self.entries()}
        blobs = [path for folder in _inside(self._blobs) for path in _inside(folder) if path.name not in told]
        unfinished = [path for path in _inside(self._records) if path.suffix != ".json"]
        for path in [*_inside(self._incoming), *blobs, *_inside(self._locks), *unfinished]:
            with suppress(FileNotFoundError):
                status = path.lstat()
                if time.time() - max(status.st_mtime, status.st_ctime) > _DEBRIS_SECONDS:
                    path.unlink()

    def _share(self, blob: Path, part: Path) -> None:
        """Give the blob another name; where that cannot be, copy it, sharing the disk's blocks if possible."""
        try:
            os.link(blob, part, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            _copy(blob, part)

    def _record(self, key: str) -> Path:
        return self._records / f"{key}.json"

    def _read(self, key: str) -> Entry | None:
        record = self._record(key)
        try:
            document = json.loads(record.read_bytes())
            used_at = record.stat().st_mtime
            revision_id, name = str(document["revision_id"]), str(document["name"])
            size, sha256, mtime = int(document["size"]), str(document["sha256"]), int(document["mtime_ns"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            record.unlink(missing_ok=True)
            return None
        if not _SHA256.fullmatch(sha256) or key_of(revision_id) != key:
            record.unlink(missing_ok=True)
            return None
        with suppress(FileNotFoundError):
            status = self.blob(sha256).lstat()
            if stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (size, mtime):
                return Entry(key, revision_id, name, size, sha256, used_at, in_use=status.st_nlink > 1)
            self.blob(sha256).unlink()  # damaged: whoever has it under another name keeps it
        record.unlink(missing_ok=True)
        return None


def key_of(revision_id: str) -> str:
    """Return what a Revision's files are called."""
    return hashlib.sha256(revision_id.encode(errors="surrogatepass")).hexdigest()


def move(source: Path, path: Path) -> None:
    """Move a file, also to another file system, durably.

    Raises:
        OSError: the disk refuses.
    """
    try:
        source.rename(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = path.with_name(f".{os.urandom(16).hex()}.part")
        try:
            _copy(source, part)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
        source.unlink()
    sync_directory(path.parent)


def _copy(source: Path, part: Path) -> None:
    with source.open("rb") as there, part.open("xb") as here:
        size = os.fstat(there.fileno()).st_size
        try:
            fcntl.ioctl(here.fileno(), _FICLONE, there.fileno())
        except OSError:
            copied = 0
            while copied < size and (count := os.sendfile(here.fileno(), there.fileno(), copied, _COPIED_BYTES)):
                copied += count
        os.fchmod(here.fileno(), _MODE)
        os.fsync(here.fileno())


def _is_the_same(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _inside(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
