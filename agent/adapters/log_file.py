"""A log that grows on this machine's disk: where to begin, and what comes next."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Begin:
    """Where a log is sent from: a byte's offset, but no more of what is there by now than so many lines or bytes."""

    offset: int = 0
    lines: int | None = None
    most_bytes: int | None = None

    def find(self, path: Path) -> int:
        """Return the byte to begin with."""
        try:
            with path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                begin = min(end, max(self.offset, 0 if self.most_bytes is None else end - self.most_bytes))
                return begin if self.lines is None else max(begin, before_lines(log, end, self.lines))
        except FileNotFoundError:
            return self.offset


def before_lines(log: BinaryIO, end: int, lines: int) -> int:
    """Return where the last lines of a file begin that is `end` bytes long."""
    if not lines:
        return end
    log.seek(max(0, end - 1))
    at = end - 1 if log.read(1) == b"\n" else end  # what ends the last line begins none
    while at > 0:
        begin = max(0, at - PIECE_BYTES)
        log.seek(begin)
        piece = log.read(at - begin)
        found = len(piece)
        while (found := piece.rfind(b"\n", 0, found)) >= 0:
            lines -= 1
            if not lines:
                return begin + found + 1
        at = begin
    return 0


def read(path: Path, position: int) -> bytes:
    """Return the next bytes, up to 64 KiB; nothing where there are none yet."""
    try:
        with path.open("rb") as log:
            log.seek(position)
            return log.read(PIECE_BYTES)
    except FileNotFoundError:
        return b""
