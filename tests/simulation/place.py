"""Where simulations keep their files: in memory, so that nothing waits for a disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")  # noqa: S108 a directory of its own is made there


@contextmanager
def in_memory() -> Iterator[Path]:
    """Make a directory, in memory where that can be done, and remove it in the end."""
    parent = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="ovation-simulation-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
