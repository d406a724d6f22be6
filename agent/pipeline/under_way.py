"""What it takes to go on with an upload: credentials, which Ovation gives only once, and how far it is.

One file an upload, below the job's directory and closed to everybody else; it goes when the upload is recorded.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.adapters.disk import sync_directory, write_whole
from agent.adapters.files import remove_tree
from agent.adapters.ovation import Credentials
from agent.db.outputs import Output

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class UnderWay:
    """An upload to one Revision. `part_bytes`: it goes in parts of this length; `upload_id`: these were begun."""

    revision_id: str
    size: int  # bytes of the file
    part_bytes: int | None
    credentials: Credentials
    upload_id: str | None = None


class UploadsUnderWay:
    """One job's records of uploads that are under way."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def read(self, output: Output) -> UnderWay | None:
        """Return what is known of an output's upload; what cannot be read is as good as none."""
        return await asyncio.to_thread(self._read, output)

    async def write(self, output: Output, under_way: UnderWay) -> None:
        """Write it down; durably, if it goes in parts: one that goes in a single request is soon sent again.

        Raises:
            OSError: the disk refuses.
        """
        content = json.dumps({"kind": output.kind, "path": output.path, **asdict(under_way)})
        await asyncio.to_thread(self._write, output, content.encode(), durable=under_way.part_bytes is not None)

    async def try_write(self, output: Output, under_way: UnderWay) -> bool:
        """Write it down if there is room: a full disk must not keep results from leaving it."""
        try:
            await self.write(output, under_way)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return False
        return True

    async def remove(self, output: Output) -> None:
        """Forget an upload that is recorded, or given up."""
        await asyncio.to_thread(self._file(output).unlink, missing_ok=True)

    async def tidy(self) -> None:
        """Remove the directory if nothing is under way."""
        with suppress(FileNotFoundError):
            await asyncio.to_thread(self._remove_empty)

    async def clear(self) -> None:
        """Remove everything: each upload is recorded."""
        await asyncio.to_thread(remove_tree, self._directory)

    def _file(self, output: Output) -> Path:
        return self._directory / f"{hashlib.sha256(f'{output.kind}/{output.path}'.encode()).hexdigest()}.json"

    def _read(self, output: Output) -> UnderWay | None:
        try:
            return _under_way(json.loads(self._file(output).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def _write(self, output: Output, content: bytes, *, durable: bool) -> None:
        if not self._directory.exists():
            self._directory.mkdir(mode=0o700, exist_ok=True)
            sync_directory(self._directory.parent)
        write_whole(self._file(output), content, 0o600, durable=durable)

    def _remove_empty(self) -> None:
        try:
            self._directory.rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise


def _under_way(document: Mapping[str, Any]) -> UnderWay:
    return UnderWay(
        revision_id=document["revision_id"],
        size=document["size"],
        part_bytes=document["part_bytes"],
        credentials=Credentials(**document["credentials"]),
        upload_id=document["upload_id"],
    )
