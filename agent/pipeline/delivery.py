"""Putting a run's files on its Activity, several at once, each as far as it can be put there now."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.adapters.disk import sync_directory
from agent.adapters.files import open_below
from agent.db.jobs import Claim
from agent.db.outputs import Kind, Ledger, Output
from agent.errors import AgentError, DatabaseError, OvationUnavailable, StorageUnavailable
from agent.pipeline.context import Context, Control
from agent.pipeline.folders import Folders
from agent.pipeline.transfer import Transfers
from agent.pipeline.under_way import UploadsUnderWay

_AT_ONCE = 32  # most of the time of a small file is spent waiting for Ovation
_IN_A_ROW = 3  # outputs for which a party is away, after which it is taken to be away for the others too
_NOT_THE_FILES_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to deliver: a regular file below `root`, and the path that people see below the run's Folder.

    With `content` these bytes, which are on no disk.
    """

    kind: Kind
    root: Path
    path: str
    shown: str
    size: int
    content: bytes | None = None


class Delivery:
    """One try of delivering what a run left. What fails does not keep the rest from being tried."""

    def __init__(
        self,
        context: Context,
        control: Control,
        activity: Mapping[str, Any],
        ledger: Ledger,
        uploads: UploadsUnderWay,
        transfers: Transfers,
        folders: Folders,
    ) -> None:
        self._ovation = context.ovation
        self._progress = control.progress
        self.activity = activity
        self._ledger = ledger
        self._uploads = uploads
        self._transfers = transfers
        self._folders = folders
        self._errors: list[Exception] = []
        self._away_in_a_row = 0
        self.unreadable: list[tuple[str, str]] = []  # (path, why)

    @classmethod
    async def begin(cls, context: Context, claim: Claim, control: Control) -> Delivery:
        """Read what is delivered already, and find or make the run's Folder."""
        job, ovation = claim.job, context.ovation
        root = Path(context.layout(job).root)
        activity = await ovation.entity(job.organization, job.activity_id)
        ledger = await context.outputs.ledger(claim)
        uploads = UploadsUnderWay(root / "uploads")
        transfers = Transfers(job.organization, ovation, context.uploader, uploads, control.progress, ledger.save)
        was_begun = await asyncio.to_thread(_was_begun, root)
        is_repeated = was_begun or job.folder_id is not None or job.attempt > 0
        folders = Folders(ovation, context.jobs, claim, ledger, transfers, is_repeated=is_repeated)
        await folders.open()
        return cls(context, control, activity, ledger, uploads, transfers, folders)

    @property
    def remade(self) -> Sequence[str]:
        """The Folders that somebody took away and that were made anew; the empty path is the run's own."""
        return self._folders.remade

    async def make_folders(self, paths: Sequence[str]) -> None:
        """Make a Folder for each directory, parents first."""
        for path in paths:
            if path.rpartition("/")[0] in self._folders and not self._is_away:
                await self._tried(self._folders.make(path))

    async def deliver(self, items: Sequence[Item]) -> None:
        """Deliver files, several at once. What fails is kept for `check`; none is begun while a party is away."""
        remaining = iter(items)

        async def work() -> None:
            for item in remaining:
                if self._is_away:
                    return
                if item.kind is not Kind.OUTPUT or item.shown.rpartition("/")[0] in self._folders:
                    await self._tried(self._deliver(item))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in items[:_AT_ONCE]:
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await self._uploads.tidy()

    async def forget_all_but(self, items: Sequence[Item]) -> None:
        """Give up outputs that were begun in an earlier try and whose file is gone."""
        there = {item.shown for item in items}
        for output in self._ledger:
            is_begun = output.kind is Kind.OUTPUT and output.revision_id is not None and not output.uploaded
            if is_begun and output.path not in there and not self._is_away:
                await self._tried(self._forget(output, output.path, "is not there any more"))

    def check(self) -> None:
        """Raise the error that tells most, if anything failed: a bug, else an outage, which is waited out."""
        if self._errors:
            raise min(self._errors, key=_rank)

    async def end(self) -> None:
        """Remove what is needed no more once everything is delivered."""
        await self._uploads.clear()

    @property
    def _is_away(self) -> bool:
        return self._away_in_a_row >= _IN_A_ROW

    async def _tried(self, work: Awaitable[None]) -> None:
        try:
            await work
        except DatabaseError:  # nothing can be recorded; or the job is another's by now
            raise
        except (OvationUnavailable, StorageUnavailable) as error:
            self._errors.append(error)
            self._away_in_a_row = _IN_A_ROW if error.away else self._away_in_a_row + 1
        except Exception as error:  # noqa: BLE001 the others are tried all the same, and `check` raises it
            self._errors.append(error)
        else:
            self._away_in_a_row = 0

    async def _deliver(self, item: Item) -> None:
        output = self._ledger.get(item.kind, item.shown)
        if output.uploaded and not output.linked and await self._is_gone(output):
            output = Output(item.kind, item.shown)
        if output.uploaded:
            self._progress.add_bytes(item.size)
        else:
            try:
                async with _opened(item) as descriptor:
                    output, file = await self._folders.file(output)
                    output = await self._transfers.bring(output, file, descriptor)
            except _UnreadableError as error:
                await self._forget(output, item.path, str(error))
                return
        if not output.linked:
            await self._ovation.add_output(self.activity, str(output.revision_id))
            await self._ledger.save(replace(output, linked=True))
        self._progress.files_done += 1

    async def _is_gone(self, output: Output) -> bool:
        """Say whether somebody took away what was uploaded in an earlier try, so that it cannot be linked."""
        return output.revision_id is None or await self._transfers.there(output.revision_id) is None

    async def _forget(self, output: Output, path: str, why: str) -> None:
        await self._transfers.forget(output)
        if output.revision_id is not None:
            await self._ledger.save(replace(output, revision_id=None))
        self.unreadable.append((path, why))


class _UnreadableError(Exception):
    """One file cannot be read, and never will be; that must not hold up the others."""


@asynccontextmanager
async def _opened(item: Item) -> AsyncIterator[int]:
    opening = asyncio.get_running_loop().run_in_executor(None, _open, item)
    try:
        descriptor = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise
    except OSError as error:
        if error.errno in _NOT_THE_FILES_FAULT:
            raise
        raise _UnreadableError(error.strerror or str(error)) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(item: Item) -> int:
    if item.content is None:
        return open_below(item.root, item.path)
    descriptor = os.memfd_create(item.shown, os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(item.content)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _close(opening: asyncio.Future[int]) -> None:
    with suppress(OSError):
        os.close(opening.result())


def _was_begun(root: Path) -> bool:
    """Say whether a delivery was begun before, and mark that one is now: a lost answer may hide what it made."""
    try:
        (root / "delivery-begun").touch(exist_ok=False)
        sync_directory(root)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        return True  # a full disk must not keep logs from leaving it; and to look is never wrong
    return False


def _rank(error: Exception) -> int:
    """Say how much an error tells of the step; what tells most comes first."""
    if not isinstance(error, AgentError | OSError):
        return 0  # a bug
    if isinstance(error, OvationUnavailable | StorageUnavailable) or getattr(error, "errno", None) in _NO_ROOM:
        return 1
    if isinstance(error, OSError):
        return 2
    return 3 if error.transient else 4
