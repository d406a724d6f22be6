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
from agent.adapters.download import Fetched, part_of, partly_there
from agent.adapters.files import remove_tree
from agent.adapters.objects import WrongBytes
from agent.adapters.part import journal_of
from agent.db.jobs import Claim
from agent.domain.activity import Upload
from agent.domain.job import Done, Failed, Fault, FaultClass, Job, NotYet, Outcome, PlannedFile
from agent.errors import AgentError, OvationError, OvationNotFound, StorageError, StorageMismatch, StorageRefused
from agent.pipeline.context import Context, Control
from agent.pipeline.landing import Landing
from agent.pipeline.staged import Record, Staged, prepare, read_record, remove_work, tidy, write_manifests

CACHED_FROM_BYTES = 1 << 20
"""A smaller file is fetched as fast as it is found in the cache."""

_READ_AT_ONCE = 16
_FETCHED_AT_ONCE = 16
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


def _may_pass(error: BaseException) -> bool:
    """Say whether to try a transfer again at once. Wrong bytes have come twice by now: that is the step's business."""
    return isinstance(error, StorageError) and error.transient and not isinstance(error, WrongBytes)


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
        self._landing = Landing(self._root)
        self._record: Record = {}
        self._found: dict[_Wanted, _Found] = {}
        self._errors: list[Exception] = []
        self._halted = False  # nothing more is begun

    async def run(self) -> Outcome:
        plan = self._job.plan
        wanted = [_Wanted("inputs", file) for file in plan.inputs] + [_Wanted("related", file) for file in plan.related]
        self._record = await asyncio.to_thread(self._take_stock, wanted)
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
        if wait := await self._wait_for_room(await asyncio.to_thread(self._needed)):
            return wait
        self._progress.bytes_total = sum(found.size or 0 for found in self._found.values())
        await asyncio.to_thread(prepare, self._root)
        largest_first = sorted(self._found, key=lambda each: -(self._found[each].size or 0))
        await self._for_each(largest_first, self._fetch, _FETCHED_AT_ONCE)
        if self._errors:
            return self._outcome()
        await asyncio.to_thread(self._close, wanted)
        return Done()

    def _take_stock(self, wanted: list[_Wanted]) -> Record:
        record = read_record(self._root)
        parts = [part_of(self._path(each)) for each in wanted if each.key not in record]
        tidy(self._root, record, self._job.launch, unfinished={*parts, *map(journal_of, parts)})
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
        path = self._path(each)
        if found.content is not None:
            await asyncio.to_thread(write_whole, path, found.content)
            self._landed(found, len(found.content))
            fetched = Fetched(len(found.content), hashlib.sha256(found.content).hexdigest())
        elif self._is_kept(found):
            fetched = await self._from_cache(each, found, path)
        else:
            fetched = await self._transfer(path, file.name, found)
        await self._landing.land(
            Staged(each.folder, file.file_name, file.name, file.type, file.entity_id, fetched.size, fetched.sha256)
        )
        self._progress.files_done += 1

    async def _from_cache(self, each: _Wanted, found: _Found, path: Path) -> Fetched:
        """Have a Revision from the cache, which fetches it once for all who want it."""
        file, arrived = each.planned, 0

        async def fetch(target: Path) -> Fetched:
            nonlocal arrived
            fetched = await self._transfer(target, file.name, found)
            arrived = fetched.size
            return fetched

        fetched = await self._context.cache.stage(file.entity_id, path, fetch, name=file.name)
        if not arrived:
            self._landed(found, fetched.size)  # somebody else fetched it
        return fetched

    @tenacity.retry(
        stop=tenacity.stop_after_attempt(3),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=3),
        retry=tenacity.retry_if_exception(_may_pass),
        reraise=True,
    )
    async def _transfer(self, path: Path, name: str, found: _Found) -> Fetched:
        context, arrived, there = self._context, 0, 0

        def progress(count: int) -> None:
            nonlocal arrived
            arrived += count
            self._landed(found, count)
            context.room.check()

        def was_there(count: int) -> None:
            nonlocal there
            there += count
            self._progress.add_bytes(count)

        async def renew() -> str:
            return (await context.ovation.download(found.document)).url

        try:
            source = await context.ovation.download(found.document)  # anew each time: the address expires
            fetched = await context.downloader.fetch(
                source.url,
                path,
                remote=source.remote,
                name=name,
                progress=progress,
                found=was_there,
                size=found.size,
                job=self._job.id,
                renew=renew,
            )
        except BaseException:
            self._landed(found, -arrived)
            self._progress.add_bytes(-there)
            raise
        if found.size in {None, fetched.size}:
            return fetched
        await asyncio.to_thread(path.unlink, missing_ok=True)
        self._landed(found, -arrived)
        raise StorageMismatch(f"{name}: {fetched.size} bytes arrived, Ovation says {found.size}")

    def _is_kept(self, found: _Found) -> bool:
        """Say whether a file is worth a place in the cache. What a stranger serves may be another tomorrow."""
        large = found.size is None or found.size >= CACHED_FROM_BYTES
        return large and not self._context.ovation.is_remote(found.document)

    def _path(self, each: _Wanted) -> Path:
        return self._root / each.folder / each.planned.file_name

    def _needed(self) -> int:
        """Return how many bytes there must be room for: those that are not on the disk yet."""
        cache, needed = self._context.cache, 0
        for each, found in self._found.items():
            there = 0
            if found.content is None and self._is_kept(found):
                there = cache.spares(each.planned.entity_id, self._root.parent)
            elif found.content is None:
                there = partly_there(self._path(each))
            needed += max(0, (found.size or 0) - there)
        return needed

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
