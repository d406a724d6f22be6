"""Shared memory that outlives the processes that made it: a database which is killed cannot give its own back."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

_IPC_RMID = 0  # linux/ipc.h
_MAPPING = re.compile(r"^\S+ \S+ \S+ \S+ (?P<inode>\d+) +(?P<path>/SYSV|/dev/shm/\S+)", re.MULTILINE)


class SharedMemory:
    """What some processes share, noted while they live and removed once they are gone."""

    def __init__(self) -> None:
        self._segments: set[int] = set()
        self._files: set[Path] = set()

    def note(self, processes: Iterable[int]) -> None:
        """Note the System V segments and the POSIX objects that the processes have mapped (proc_pid_maps(5))."""
        for pid in processes:
            try:
                maps = Path("/proc", str(pid), "maps").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            for found in _MAPPING.finditer(maps):
                # The inode of a mapped segment is its id.
                if found["path"] == "/SYSV":
                    self._segments.add(int(found["inode"]))
                else:
                    self._files.add(Path(found["path"]))

    def remove(self) -> None:
        """Remove what was noted, is still there and is attached to no process."""
        libc = ctypes.CDLL(None)
        for segment in self._segments & _unattached():
            libc.shmctl(segment, _IPC_RMID, None)
        for file in self._files:
            file.unlink(missing_ok=True)


def _unattached() -> set[int]:
    """Return the ids of the System V segments that nobody uses (the columns of /proc/sysvipc/shm)."""
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text(encoding="ascii").splitlines()]
    return {int(row[1]) for row in rows[1:] if row[6] == "0"}
