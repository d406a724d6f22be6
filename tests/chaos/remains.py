"""What runs may leave on a machine, and must not: files and processes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from agent.adapters.shelf import Shelf

_AGENTS_OWN = frozenset({"lock", "place", "jobs", "checks", "cache", "agent.json", "admin-token"})
"""What an agent keeps in its data directory, whatever runs there were. But for the cache, its directories are empty."""


def on_disk(data_dirs: Sequence[Path], temporary: Sequence[Path]) -> Iterator[str]:
    """Return what is left of runs in the data directories and in those for temporary files."""
    for data in data_dirs:
        entries = sorted(data.iterdir()) if data.is_dir() else []
        yield from (f"{each} is left behind" for each in entries if each.name not in _AGENTS_OWN)
        for each in (*sorted((data / "jobs").glob("*")), *sorted((data / "checks").glob("*"))):
            files = sorted(str(path.relative_to(each)) for path in each.rglob("*"))
            yield f"{each} is left behind, with {', '.join(files[:20]) or 'nothing in it'}"
        yield from _in_the_cache(data / "cache")
    for directory in temporary:
        yield from (f"{each} is left behind" for each in sorted(directory.glob("*")))


def _in_the_cache(directory: Path) -> Iterator[str]:
    """Return what is wrong with a cache when nobody uses it."""
    shelf = Shelf(directory)
    for entry in shelf.entries():
        if entry.in_use:
            yield f"{entry.name} in {directory} is in use, and no run is left"
        if not shelf.is_whole(entry):
            yield f"{entry.name} in {directory} is damaged"


def processes(directory: Path, allowed: Collection[int]) -> Iterator[str]:
    """Return which processes are alive that have to do with a directory."""
    for pid in sorted(processes_of(directory) - set(allowed)):
        yield f"process {pid} is left behind: {_command_line(pid)}"


def processes_of(directory: Path) -> set[int]:
    """Return the processes, other than this one, that have to do with a directory.

    They name it in what they were started with, work in it, or see a part of it mounted, as those in a container do.
    """
    words = os.fsencode(f"{directory}/")
    mounted = os.fsencode(f"{directory.relative_to(_mount_point(directory))}/")
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {pid for pid in pids if pid != os.getpid() and _mentions(Path(f"/proc/{pid}"), words, mounted)}


def _mentions(process: Path, words: bytes, mounted: bytes) -> bool:
    try:
        if words in os.fsencode(f"{(process / 'cwd').readlink()}/"):
            return True
        if any(words in (process / name).read_bytes() for name in ("cmdline", "environ")):
            return True
        # What is mounted, not where: what a test has mounted in there, the whole machine sees.
        return any(mounted in line.split()[3] for line in (process / "mountinfo").read_bytes().splitlines())
    except OSError:  # it has ended
        return False


def _mount_point(directory: Path) -> Path:
    return next(each for each in (directory, *directory.parents) if each.is_mount())


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "it has ended meanwhile"
    return b" ".join(words).decode(errors="replace")[:300]
