"""Staging: fetch inputs and related files to `*.part`, verify, rename. Repeated, it goes on where it stopped."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tenacity

from agent.db.jobs import Claim
from agent.domain.activity import Upload
from agent.domain.job import Done, Failed, Fault, FaultClass, Job, NotYet, Outcome, PlannedFile
from agent.domain.workdir import MANIFEST
from agent.errors import OvationError, OvationNotFound, StorageError, StorageMismatch, StorageRefused
from agent.pipeline.context import Context, Control

_AT_ONCE = 4
_UPLOAD_WAIT_SECONDS = 10.0
_RECORD = "staged.jsonl"


@dataclass(frozen=True, slots=True)
class Staged:
    """One file in its place, as the manifest and the run's record tell it."""

    folder: str  # "inputs" or "related"
    file_name: str
    name: str
    type: str
    id: str
    size: int
    sha256: str


class _StillUploading(Exception):
    """The plan's Revision has no bytes yet."""


async def stage(context: Context, claim: Claim, control: Control) -> Outcome:
    """Fetch everything that the job's plan names."""
    job = claim.job
    root = Path(context.layout(job).root)
    wanted = [("inputs", file) for file in job.plan.inputs] + [("related", file) for file in job.plan.related]
    record = await asyncio.to_thread(_prepare, root)
    control.progress.files_total = len(wanted)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(folder: str, file: PlannedFile) -> Staged:
        async with gate:
            staged = record.get((folder, file.file_name))
            if staged is None:
                staged = await _fetch(context, job, folder, file, control)
                await asyncio.to_thread(_append_record, root, staged)
            control.progress.files_done += 1
            return staged

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(folder, file)) for folder, file in wanted]
    except ExceptionGroup as errors:
        return _outcome(errors)
    for folder in ("inputs", "related"):
        listed = [task.result() for task in tasks if task.result().folder == folder]
        await asyncio.to_thread(_write_manifest, root / folder, listed)
    return Done()


async def _fetch(context: Context, job: Job, folder: str, file: PlannedFile, control: Control) -> Staged:
    path = Path(context.layout(job).root) / folder / file.file_name
    try:
        document = await context.ovation.entity(job.organization, file.entity_id)
    except OvationNotFound:
        raise StorageRefused(
            f"{file.name}: Ovation has no such {file.type} any more, or hides it from the agent"
        ) from None
    if file.type != "Revision":
        content = json.dumps(document, indent=2, ensure_ascii=False).encode()
        await asyncio.to_thread(_write_whole, path, content)
        return _staged(folder, file, len(content), _sha256(content))
    attributes = document.get("attributes", {})
    status = attributes.get("upload-status", Upload.COMPLETE)
    if status == Upload.IN_PROGRESS:
        raise _StillUploading(file.name)
    if status == Upload.ERROR:
        raise StorageRefused(f"{file.name}: its upload to Ovation failed; upload it again")
    promised = attributes.get("content_length")
    control.progress.bytes_total += int(promised or 0)

    @tenacity.retry(
        stop=tenacity.stop_after_attempt(3),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=3),
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, StorageError) and error.transient),
        reraise=True,
    )
    async def transfer() -> Staged:
        before = control.progress.bytes_done
        try:
            source = await context.ovation.download(document)  # anew each time: the address expires
            fetched = await context.downloader.fetch(
                source.url, path, remote=source.remote, name=file.name, progress=control.progress.add_bytes
            )
            if promised is not None and fetched.size != int(promised):
                raise StorageMismatch(f"{file.name}: {fetched.size} bytes arrived, Ovation says {promised}")
        except StorageError:
            control.progress.bytes_done = before
            raise
        await asyncio.to_thread(path.chmod, 0o644)
        return _staged(folder, file, fetched.size, fetched.sha256)

    return await transfer()


def _outcome(errors: ExceptionGroup[Any]) -> Outcome:
    """Say what a failed staging means: what waiting cannot cure first, so that it is told at once."""
    leaves = list(_leaves(errors))
    for error in leaves:
        if isinstance(error, StorageRefused):
            return Failed(Fault(FaultClass.INPUT, str(error)), final=True)
    for error in leaves:
        if isinstance(error, _StillUploading):
            return NotYet(_UPLOAD_WAIT_SECONDS, f"waiting for {error} to finish uploading")
    for error in leaves:
        if isinstance(error, StorageMismatch):
            return Failed(Fault(FaultClass.INPUT, str(error)), final=False)
    for error in leaves:
        if not isinstance(error, StorageError | OvationError):
            raise error
    raise leaves[0]


def _leaves(errors: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in errors.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


def _staged(folder: str, file: PlannedFile, size: int, sha256: str) -> Staged:
    return Staged(folder, file.file_name, file.name, file.type, file.entity_id, size, sha256)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _prepare(root: Path) -> dict[tuple[str, str], Staged]:
    """Make the job's directories, closed to everybody else, and return what is in place already."""
    for folder in ("inputs", "related"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)
    return _read_record(root)


def _read_record(root: Path) -> dict[tuple[str, str], Staged]:
    """Return what an earlier, interrupted staging has put in place; a half-written last line does not count."""
    try:
        lines = (root / _RECORD).read_text().splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            staged = Staged(**json.loads(line))
            present = (root / staged.folder / staged.file_name).stat().st_size == staged.size
        except (ValueError, TypeError, OSError):
            continue
        if present:
            found[staged.folder, staged.file_name] = staged
    return found


def _append_record(root: Path, staged: Staged) -> None:
    with (root / _RECORD).open("a") as record:
        record.write(json.dumps(asdict(staged)) + "\n")
        record.flush()
        os.fsync(record.fileno())


def _write_manifest(folder: Path, listed: list[Staged]) -> None:
    entries = [{key: value for key, value in asdict(staged).items() if key != "folder"} for staged in listed]
    _write_whole(folder / MANIFEST, json.dumps({"files": entries}, indent=2, ensure_ascii=False).encode())


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(f".{_sha256(os.fsencode(path.name))[:32]}.part")
    part.write_bytes(content)
    part.chmod(0o644)
    part.rename(path)
