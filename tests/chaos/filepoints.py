"""Failpoints around what changes files: see `tests.chaos.failpoints`."""

from __future__ import annotations

import builtins
import io
import os
from pathlib import Path
from typing import Any

from tests.chaos.points import Points

_OF_ONE_PATH = ("mkdir", "rmdir", "unlink", "remove", "truncate", "ftruncate", "fsync", "fdatasync")
_OF_TWO_PATHS = ("rename", "replace", "link", "symlink")  # the second one is what is made
_WRITING_MODES = set("wax+")


def install(points: Points) -> None:
    """Put points around these functions in this process, from now on."""
    names = _Names({os.path.realpath(path): name for name, path in points.plan.places.items()})
    for verb in _OF_ONE_PATH:
        _around(points, names, verb, 0, "path", "dir_fd")
    for verb in _OF_TWO_PATHS:
        _around(points, names, verb, 1, "dst", "dst_dir_fd")
    _around_os_open(points, names)
    _around_open(points, names)


class _Names:
    """What files are called in a point; those elsewhere than in our places have no name."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = places

    def of(self, path: Any, directory: int | None = None) -> str | None:
        """Return the name of a path, or of an open file; a relative path begins in an open directory, if given."""
        if path is None:
            return None
        if isinstance(path, int):
            found = Path(f"/proc/self/fd/{path}").readlink()
        else:
            start = Path() if directory is None else Path(f"/proc/self/fd/{directory}").readlink()
            found = Path(os.path.abspath(start / os.fsdecode(path)))  # noqa: PTH100 links stay what they are
        for place, name in self._places.items():
            if found.is_relative_to(place):
                return str(Path(name) / found.relative_to(place))
        return None


def _around(points: Points, names: _Names, verb: str, place: int, keyword: str, directory: str) -> None:
    original = getattr(os, verb)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        path = arguments[place] if len(arguments) > place else named.get(keyword)
        name = names.of(path, named.get(directory))
        if name is None:
            return original(*arguments, **named)
        with points.around(f"file:{verb} {name}"):
            return original(*arguments, **named)

    setattr(os, verb, wrapper)
    for group in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        if original in group:
            group.add(wrapper)


def _around_os_open(points: Points, names: _Names) -> None:
    """A file that is opened so is made or emptied by that."""
    original = os.open

    def wrapper(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        name = names.of(path, named.get("dir_fd")) if flags & (os.O_CREAT | os.O_TRUNC) else None
        if name is None:
            return original(path, flags, *rest, **named)
        with points.around(f"file:open {name}"):
            return original(path, flags, *rest, **named)

    os.open = wrapper
    os.supports_dir_fd.add(wrapper)


def _around_open(points: Points, names: _Names) -> None:
    original = io.open

    def wrapper(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        name = names.of(file) if _WRITING_MODES & set(mode) and not isinstance(file, int) else None
        if name is None:
            return original(file, mode, *rest, **named)
        with points.around(f"file:open {name}"):
            return original(file, mode, *rest, **named)

    io.open = builtins.open = wrapper
