"""The local disk, when what lies on it is a stranger's."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file below a directory, with its path relative to it, as the file system has it."""

    path: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Tree:
    """What a directory holds. Only regular files count; the rest is named, never opened."""

    files: tuple[Found, ...]
    folders: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]  # (path, what it is)


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def list_tree(root: Path) -> Tree:
    """Walk `root` without following a link; nothing outside it is ever touched. A missing root is an empty one."""
    files: list[Found] = []
    folders: list[str] = []
    skipped: list[tuple[str, str]] = []
    try:
        top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return Tree((), (), ())
    try:
        _walk(top, "", files, folders, skipped)
    finally:
        os.close(top)
    return Tree(tuple(files), tuple(folders), tuple(skipped))


def _walk(directory: int, prefix: str, files: list[Found], folders: list[str], skipped: list[tuple[str, str]]) -> None:
    with os.scandir(directory) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        path = prefix + entry.name
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            files.append(Found(path, status.st_size))
        elif stat.S_ISDIR(status.st_mode):
            try:
                inner = _open_at(directory, entry.name, os.O_RDONLY | os.O_DIRECTORY, 0o500)
            except OSError as error:
                skipped.append((path, f"a folder that cannot be read ({error.strerror})"))
                continue
            try:
                folders.append(path)
                _walk(inner, path + "/", files, folders, skipped)
            finally:
                os.close(inner)
        else:
            skipped.append((path, _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")))


def _open_at(directory: int, name: str, flags: int, needed: int) -> int:
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(name, flags, dir_fd=directory)
    except PermissionError:
        # The container's program made it so; where it ran as our own user we may undo that.
        os.chmod(name, needed, dir_fd=directory, follow_symlinks=True)
        return os.open(name, flags, dir_fd=directory)


def open_below(root: Path, path: str) -> int:
    """Open a regular file below `root` for reading, following no link on the way, and return its descriptor.

    Raises:
        OSError: it is not there any more, cannot be read, or is no regular file now.
    """
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        *parents, name = path.split("/")
        for parent in parents:
            inner = _open_at(directory, parent, os.O_RDONLY | os.O_DIRECTORY, 0o500)
            os.close(directory)
            directory = inner
        descriptor = _open_at(directory, name, os.O_RDONLY, 0o400)
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file any more")
    return descriptor


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it, whatever modes its files have; a missing one is removed already."""

    def loosen(
        function: Callable[..., object], name: str, info: tuple[type[BaseException], BaseException, TracebackType]
    ) -> None:
        error = info[1]
        if isinstance(error, FileNotFoundError):
            return
        if not isinstance(error, PermissionError):
            raise error
        for each in (Path(name).parent, Path(name)):
            if not each.is_symlink():
                with suppress(OSError):
                    each.chmod(0o700)
        if function in {os.open, os.scandir, os.lstat}:
            shutil.rmtree(name)
        else:
            function(name)

    shutil.rmtree(path, onerror=loosen)


def tail(path: Path, most_bytes: int) -> str:
    """Return the end of a log as text; nothing when there is none."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - most_bytes))
            return log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
