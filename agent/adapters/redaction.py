"""What a container wrote, without what looks like a secret, before others can read it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from agent.logs import redact

_PIECE_BYTES = 1 << 20
_LINE_BYTES = 16 << 20


def redact_file(path: Path) -> bool:
    """Rewrite a file of text without secrets, whole or not at all; say whether there were any.

    The same rules as for the agent's own log: its own secrets, bearer tokens, JWTs, passwords in addresses, the signed
    part of presigned URLs. A file without any is only read, and a link is left alone.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        kept = 0
        for piece in _pieces(file):
            if (clean := _clean(piece)) != piece:
                _rewrite(path, file, kept, clean)
                return True
            kept += len(piece)
    return False


def _rewrite(path: Path, file: BinaryIO, kept: int, clean: bytes) -> None:
    """Write what was found to be good, then `clean`, then the rest of the file."""
    rest = file.tell()
    part = path.with_name(f".{path.name}.redacted")
    part.unlink(missing_ok=True)
    try:
        with part.open("xb") as copy:
            os.fchmod(copy.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
            file.seek(0)
            while kept > 0 and (piece := file.read(min(kept, _PIECE_BYTES))):
                copy.write(piece)
                kept -= len(piece)
            copy.write(clean)
            file.seek(rest)
            for piece in _pieces(file):
                copy.write(_clean(piece))
            copy.flush()
            os.fsync(copy.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield whole lines, many at once; the file stands behind them then.

    A secret is found within a line: only one of more than 16 MiB comes in parts, and could hide one at their border.
    """
    while piece := file.read(_PIECE_BYTES):
        while not (end := piece.rfind(b"\n") + 1) and len(piece) < _LINE_BYTES and (more := file.read(_PIECE_BYTES)):
            piece += more
        if end:
            file.seek(end - len(piece), os.SEEK_CUR)
            piece = piece[:end]
        yield piece


def _clean(piece: bytes) -> bytes:
    return redact(piece.decode(errors="surrogateescape")).encode(errors="surrogateescape")
