"""Staging: learn what is needed, see that there is room, fetch, verify. Repeated, it goes on where it stopped."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tenacity

from agent.adapters.disk import write_whole
from agent.adapters.download import Fetched
from agent.adapters.files import remove_tree
from agent.db.jobs import Claim
from agent.domain.activity import Upload
from agent.domain.job import Done, Failed, Fault, FaultClass, Job, NotYet, Outcome, PlannedFile
from agent.errors import AgentError, OvationError, OvationNotFound, StorageError, StorageMismatch, StorageRefused
from agent.pipeline.context import Context, Control
from agent.pipeline.staged import (
    Record,
    Staged,
    append,
    prepare,
    read_record,
    remove_work,
    settle,
    tidy,
    write_manifests,
)

_READ_AT_ONCE = 8
_FETCHED_AT_ONCE = 4
_UPLOAD_WAIT_SECONDS = 10.0
_ROOM_WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file of the plan, and where it goes."""

    folder: str
    planned: PlannedFile

    @property
    def key(self) -> tuple[str, str]:
        return self.folder, self.planned.file_name


@dataclass(frozen=True, slots=True)
class _Found:
    """What Ovation says of a file. A Source has no bytes of its own: its document is its content."""

    document: Mapping[str, Any]
    size: int | None  # bytes; unknown for old Revisions and some remote ones
    content: bytes | None = None


class _StillUploading(Exception):
    """The plan's Revision has no bytes yet."""


async def stage(context: Context, claim: Claim, control: Control) -> Outcome:
    """Fetch everything that the job's plan names, once there is room for all of it."""
    try:
        return await _Staging(context, claim.job, control).run()
    finally:
        context.room.release(claim.job.id)


class _Staging:
    """One try at staging a job."""

    def __init__(self, context: Context, job: Job, control: Control) -> None:
        self._context = context
        self._job = job
        self._progress = control.progress
        self._root = Path(context.layout(job).root)
        self._record: Record = {}
        self._found: dict[_Wanted, _Found] = {}
        self._errors: list[Exception] = []
        self._halted = False  # nothing more is begun

    async def run(self) -> Outcome:
        plan = self._job.plan
        wanted = [_Wanted("inputs", file) for file in plan.inputs] + [_Wanted("related", file) for file in plan.related]
        self._record = await asyncio.to_thread(self._take_stock)
        lacking = [each for each in wanted if each.key not in self._record]
        self._progress.files_total = len(wanted)
        self._progress.files_done = len(wanted) - len(lacking)
        # Whoever waits for room asks Ovation nothing meanwhile: what it needs was found out the first time.
        known = self._context.room.needed_by(self._job.id)
        if known is not None and (wait := await self._wait_for_room(known)):
            return wait
        await self._for_each(lacking, self._read, _READ_AT_ONCE)
        if self._halted:
            return self._outcome()
        needed = sum(found.size or 0 for found in self._found.values())
        if wait := await self._wait_for_room(needed):
            return wait
        self._progress.bytes_total = needed
        await asyncio.to_thread(prepare, self._root)
        await self._for_each(list(self._found), self._fetch, _FETCHED_AT_ONCE)
        if self._errors:
            return self._outcome()
        await asyncio.to_thread(self._close, wanted)
        return Done()

    def _take_stock(self) -> Record:
        record = read_record(self._root)
        tidy(self._root, record, self._job.launch)
        return record

    def _close(self, wanted: list[_Wanted]) -> None:
        """Write the manifests, once the disk has everything as the record says it."""
        record = read_record(self._root)
        for each in wanted:
            if each.key not in record:
                raise FileNotFoundError(errno.ENOENT, "a file that was fetched has disappeared", each.planned.file_name)
        write_manifests(self._root, [record[each.key] for each in wanted])

    async def _wait_for_room(self, needed: int) -> NotYet | None:
        """Return what to wait for, or nothing when there is room, which is then this job's until the step ends."""
        room, job = self._context.room, self._job
        lack = await room.take(job.id, needed, has_files=bool(self._record))
        if lack is None:
            return None
        if self._record and room.gives_way(job.id):
            room.forget(job.id)
            self._record = {}
            await asyncio.to_thread(remove_work, self._root)
        # What has nothing here may find room with another agent.
        elsewhere = not self._record and job.launch == 1
        if elsewhere:
            await asyncio.to_thread(remove_tree, self._root)
        return NotYet(_ROOM_WAIT_SECONDS, str(lack), elsewhere=elsewhere)

    async def _for_each(
        self, wanted: Iterable[_Wanted], work: Callable[[_Wanted], Awaitable[None]], at_once: int
    ) -> None:
        """Do the work for each file; one that fails does not keep the others, unless they would fail as well.

        An input that is gone for good ends everything at once. When a party or the disk is away, what is under way
        goes on and nothing more is begun.
        """
        gate = asyncio.Semaphore(at_once)

        async def one(each: _Wanted) -> None:
            async with gate:
                if self._halted:
                    return
                try:
                    await work(each)
                except StorageRefused:
                    raise
                except (AgentError, OSError, _StillUploading) as error:
                    self._errors.append(error)
                    self._halted = self._halted or not isinstance(error, StorageMismatch | _StillUploading)

        try:
            async with asyncio.TaskGroup() as group:
                for each in wanted:
                    group.create_task(one(each))
        except ExceptionGroup as errors:
            self._errors.extend(errors.exceptions)
            self._halted = True

    async def _read(self, each: _Wanted) -> None:
        file = each.planned
        try:
            document = await self._context.ovation.entity(self._job.organization, file.entity_id)
        except OvationNotFound:
            raise StorageRefused(
                f"{file.name}: Ovation has no such {file.type} any more, or hides it from the agent"
            ) from None
        if file.type != "Revision":
            content = json.dumps(document, indent=2, ensure_ascii=False).encode()
            self._found[each] = _Found(document, len(content), content)
            return
        attributes = document.get("attributes", {})
        status = attributes.get("upload-status", Upload.COMPLETE)
        if status == Upload.IN_PROGRESS:
            raise _StillUploading(file.name)
        if status == Upload.ERROR:
            raise StorageRefused(f"{file.name}: its upload to Ovation failed; upload it again")
        self._found[each] = _Found(document, _count(attributes.get("content_length")))

    async def _fetch(self, each: _Wanted) -> None:
        file, found = each.planned, self._found[each]
        path = self._root / each.folder / file.file_name
        if found.content is not None:
            await asyncio.to_thread(write_whole, path, found.content)
            self._landed(found, len(found.content))
            fetched = Fetched(len(found.content), hashlib.sha256(found.content).hexdigest())
        else:
            fetched = await self._transfer(path, file.name, found)
            await asyncio.to_thread(settle, path)
        staged = Staged(each.folder, file.file_name, file.name, file.type, file.entity_id, fetched.size, fetched.sha256)
        await asyncio.to_thread(append, self._root, staged)
        self._progress.files_done += 1

    @tenacity.retry(
        stop=tenacity.stop_after_attempt(3),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=3),
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, StorageError) and error.transient),
        reraise=True,
    )
    async def _transfer(self, path: Path, name: str, found: _Found) -> Fetched:
        context, arrived = self._context, 0

        def progress(count: int) -> None:
            nonlocal arrived
            arrived += count
            self._landed(found, count)
            context.room.check()

        try:
            source = await context.ovation.download(found.document)  # anew each time: the address expires
            fetched = await context.downloader.fetch(
                source.url, path, remote=source.remote, name=name, progress=progress
            )
        except BaseException:
            self._landed(found, -arrived)
            raise
        if found.size in {None, fetched.size}:
            return fetched
        await asyncio.to_thread(path.unlink, missing_ok=True)
        self._landed(found, -arrived)
        raise StorageMismatch(f"{name}: {fetched.size} bytes arrived, Ovation says {found.size}")

    def _landed(self, found: _Found, count: int) -> None:
        """Count bytes; those of a file whose size nobody knew were not promised either."""
        self._progress.add_bytes(count)
        if found.size is not None:
            self._context.room.landed(self._job.id, count)

    def _outcome(self) -> Outcome:
        """Say what a failed staging means: what waiting cannot cure first, so that it is told at once."""
        for error in self._errors:
            if isinstance(error, StorageRefused):
                return Failed(Fault(FaultClass.INPUT, str(error)), final=True)
        for error in self._errors:
            if isinstance(error, _StillUploading):
                return NotYet(_UPLOAD_WAIT_SECONDS, f"waiting for {error} to finish uploading")
        for error in self._errors:
            if isinstance(error, StorageMismatch):
                return Failed(Fault(FaultClass.INPUT, str(error)), final=False)
        for error in self._errors:
            if not isinstance(error, StorageError | OvationError):
                raise error
        raise self._errors[0]


def _count(value: object) -> int | None:
    """Return a number of bytes as Ovation tells it; `None` when it does not."""
    try:
        count = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None
    return count if count >= 0 else None
