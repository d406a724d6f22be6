"""The local disk, when what lies on it is a stranger's.

No link is ever followed, nothing but regular files and directories is ever opened, and no depth of directories uses
up the interpreter's stack or the process's descriptors.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_KEPT_OPEN = 32  # directories on the way to the one that is looked at


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file below a directory, with its path relative to it, as the file system has it."""

    path: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Tree:
    """What a directory holds. Only regular files count; the rest is named, never opened."""

    files: tuple[Found, ...]
    folders: tuple[str, ...]  # each after the one that it is in
    skipped: tuple[tuple[str, str], ...]  # (path, what it is)


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


class _Directories:
    """Opens directories below a root, step by step, and keeps the last few of the way open for the next."""

    def __init__(self, root: Path, needed: int) -> None:
        self._needed = needed
        above = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._root = open_at(above, root.name, stat.S_IFDIR, needed)
        finally:
            os.close(above)
        self._way: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, descriptor in self._way:
            os.close(descriptor)
        os.close(self._root)

    def open(self, path: str) -> int:
        """Return a descriptor of a directory, good until the next call; the root is the empty path."""
        while self._way and not f"{path}/".startswith(f"{self._way[-1][0]}/"):
            os.close(self._way.pop()[1])
        reached, descriptor = self._way[-1] if self._way else ("", self._root)
        for name in path[len(reached) :].split("/"):
            if name:
                descriptor = open_at(descriptor, name, stat.S_IFDIR, self._needed)
                reached = f"{reached}/{name}" if reached else name
                self._way.append((reached, descriptor))
                if len(self._way) > _KEPT_OPEN:
                    os.close(self._way.pop(0)[1])
        return descriptor


def open_at(directory: int, name: str, kind: int, needed: int) -> int:
    """Open what is called `name` in a directory for reading, if it is of that kind; a link is never followed.

    Args:
        directory: its descriptor.
        name: a single name.
        kind: `stat.S_IFREG` or `stat.S_IFDIR`.
        needed: permissions that are added where they lack: the container's program may have taken them away.

    Raises:
        OSError: it is not there, of another kind, or closed to us.
    """
    if name in {"", ".", ".."}:
        raise OSError(errno.EINVAL, "is not a name in a directory", name)
    # Opened as a mere place first: to open a device or a pipe for reading is to do something with it.
    place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        status = os.fstat(place)
        if stat.S_IFMT(status.st_mode) != kind:
            wanted = "directory" if kind == stat.S_IFDIR else "regular file"
            raise OSError(errno.EINVAL, f"is not a {wanted}", name)
        same = Path(f"/proc/self/fd/{place}")  # this very inode, whatever the name stands for by now
        if status.st_mode & needed != needed:
            with suppress(PermissionError):
                same.chmod(stat.S_IMODE(status.st_mode) | needed)
        try:
            return os.open(same, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from None
    finally:
        os.close(place)


def list_tree(root: Path) -> Tree:
    """Walk `root` without following a link; nothing outside it is ever touched. A missing root is an empty one."""
    files: list[Found] = []
    folders: list[str] = []
    skipped: list[tuple[str, str]] = []
    try:
        directories = _Directories(root, 0o500)
    except FileNotFoundError:
        return Tree((), (), ())
    with directories:
        pending = [""]
        while pending:
            path = pending.pop()
            try:
                entries = _entries(directories.open(path))
            except OSError as error:
                skipped.append((path, f"a folder that cannot be read ({error.strerror})"))
                continue
            if path:
                folders.append(path)
            inner = []
            for name, status in entries:
                where = f"{path}/{name}" if path else name
                if stat.S_ISREG(status.st_mode):
                    files.append(Found(where, status.st_size))
                elif stat.S_ISDIR(status.st_mode):
                    inner.append(where)
                else:
                    skipped.append((where, _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")))
            pending.extend(reversed(inner))
    return Tree(tuple(files), tuple(folders), tuple(skipped))


def _entries(directory: int) -> list[tuple[str, os.stat_result]]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found.append((entry.name, entry.stat(follow_symlinks=False)))
    return sorted(found, key=lambda each: each[0])


def open_below(root: Path, path: str) -> int:
    """Open a regular file below `root` for reading, following no link on the way, and return its descriptor.

    Raises:
        OSError: it is not there any more, cannot be read, or is no regular file now.
    """
    folder, _, name = path.rpartition("/")
    with _Directories(root, 0o500) as directories:
        return open_at(directories.open(folder), name, stat.S_IFREG, 0o400)


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it, whatever modes they have; a missing one is removed already.

    A link is removed, never followed. What can be removed is, also when something else cannot.

    Raises:
        OSError: something could not be removed; it names the first such thing.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
            return
        directories = _Directories(path, 0o700)
    except FileNotFoundError:
        return
    failed: dict[str, OSError] = {}
    with directories:
        pending = [("", False)]
        while pending:
            where, is_emptied = pending.pop()
            if not is_emptied:
                pending.append((where, True))
                pending.extend((inner, False) for inner in _empty(directories, where, failed))
            elif where:
                parent, _, name = where.rpartition("/")
                try:
                    os.rmdir(name, dir_fd=directories.open(parent))
                    failed.pop(where, None)
                except OSError as error:
                    failed.setdefault(where, error)
    for where, first in failed.items():
        shown = os.fsencode(where).decode(errors="replace")
        raise OSError(first.errno, f"{shown!r} cannot be removed: {first.strerror}", str(path))
    path.rmdir()


def _empty(directories: _Directories, path: str, failed: dict[str, OSError]) -> list[str]:
    """Remove what is in a directory and is none itself; return the directories in it."""
    inner = []
    try:
        directory = directories.open(path)
        for name, status in _entries(directory):
            where = f"{path}/{name}" if path else name
            if stat.S_ISDIR(status.st_mode):
                inner.append(where)
                continue
            try:
                os.unlink(name, dir_fd=directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                failed.setdefault(where, error)
    except OSError as error:
        failed.setdefault(path, error)  # forgotten again when it was empty anyway and could be removed
    return inner


def tail(path: Path, most_bytes: int) -> str:
    """Return the end of a log as text; nothing when there is none."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - most_bytes))
            return log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
