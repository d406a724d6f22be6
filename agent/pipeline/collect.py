"""Collecting: put the logs, then what the container wrote, on the Activity, each once and verified.

Each File, Revision, upload and link is recorded as it is made, before the next call. A step that is repeated goes by
the record, and looks into the run's Folder for what was made just before the record could be written.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.adapters.executor import Running
from agent.adapters.files import Found, Tree, list_tree, open_below
from agent.adapters.upload import content_type
from agent.db.jobs import Claim
from agent.db.outputs import Kind, Output
from agent.domain.job import Done, NotYet, Outcome
from agent.errors import OvationNotFound, StorageMismatch
from agent.pipeline.context import Context, Control

_AT_ONCE = 8
_CONTAINER_ENDS_SECONDS = 1.0
_LOGS = ("stdout.log", "stderr.log")
_MOST_NAMED = 20
_NOT_THE_FILES_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class _Item:
    """One thing to deliver: a regular file below `root`, and the name that people see."""

    kind: Kind
    root: Path
    path: str
    size: int


async def collect(context: Context, claim: Claim, control: Control) -> Outcome:
    """Deliver what there is, whatever the verdict."""
    request = context.run_request(claim.job)
    if isinstance(await context.executor.status(request), Running):
        await context.executor.cancel(request)
        return NotYet(_CONTAINER_ENDS_SECONDS, "waiting for the container to end")
    await asyncio.to_thread(_explain, request.directory, claim)
    logs = [
        _Item(Kind.LOG, request.directory, name, (request.directory / name).stat().st_size)
        for name in _LOGS
        if (request.directory / name).is_file()
    ]
    tree = await asyncio.to_thread(list_tree, request.outputs)
    if not logs and not tree.files and not tree.folders:
        return Done()  # it was cancelled before anything began
    control.progress.files_total = len(logs) + len(tree.files)
    control.progress.bytes_total = sum(item.size for item in logs) + sum(file.size for file in tree.files)
    delivery = await _Delivery.begin(context, claim, control)
    await delivery.deliver(logs)
    await delivery.make_folders(tree.folders)
    await delivery.deliver([_item(request.outputs, file) for file in tree.files])
    return Done(note=_note(replace(tree, skipped=(*tree.skipped, *delivery.unreadable))))


def _item(root: Path, file: Found) -> _Item:
    return _Item(Kind.OUTPUT, root, file.path, file.size)


def _note(tree: Tree) -> str | None:
    """Say in the job's story what a person would otherwise miss among the outputs."""
    if tree.skipped:
        listed = ", ".join(f"{_printable(path)} ({kind})" for path, kind in tree.skipped[:_MOST_NAMED])
        more = f" and {len(tree.skipped) - _MOST_NAMED} more" if len(tree.skipped) > _MOST_NAMED else ""
        return f"not delivered, because only regular files that can be read are: {listed}{more}"
    return None if tree.files else "the container left nothing in /outputs"


def _explain(directory: Path, claim: Claim) -> None:
    """Where no container ran there is no log: let the person who looks for one find the reason."""
    log = directory / "stderr.log"
    if claim.job.fault is not None and not log.exists():
        directory.mkdir(parents=True, exist_ok=True)
        log.write_text(f"ovation-agent: the image was not run: {claim.job.fault.message}\n")


def _was_begun(root: Path) -> bool:
    """Say whether a delivery was begun before, and mark that one is now: a lost answer may hide what it made."""
    try:
        (root / "delivery-begun").touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def _printable(path: str) -> str:
    """Return a path as Ovation can keep it: a name that is not text keeps its readable part."""
    return os.fsencode(path).decode(errors="replace")


class _Delivery:
    """One run's Folder in Ovation and what stands in it."""

    def __init__(self, context: Context, claim: Claim, control: Control, activity: Mapping[str, Any]) -> None:
        self._context = context
        self._claim = claim
        self._control = control
        self._activity = activity
        self._done: dict[tuple[Kind, str], Output] = {}
        self._folders: dict[str, Mapping[str, Any]] = {}
        self._standing: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        self._resumed = False
        self.unreadable: list[tuple[str, str]] = []  # (path, why)

    @classmethod
    async def begin(cls, context: Context, claim: Claim, control: Control) -> _Delivery:
        job = claim.job
        activity = await context.ovation.entity(job.organization, job.activity_id)
        delivery = cls(context, claim, control, activity)
        delivery._done = await context.outputs.of(job.id)
        delivery._resumed = await asyncio.to_thread(_was_begun, Path(context.layout(job).root)) or job.attempt > 0
        delivery._folders[""] = await delivery._run_folder()
        return delivery

    async def _run_folder(self) -> Mapping[str, Any]:
        """Return the run's Folder: the one on record, or one that was made just before a crash, or a new one."""
        job, ovation = self._claim.job, self._context.ovation
        if job.folder_id is not None:
            return await ovation.entity(job.organization, job.folder_id)
        project = await ovation.entity(job.organization, job.project_id)
        name = f"{job.activity_name} run {job.run}"
        standing = await ovation.contents(project) if self._resumed else {}
        folder = standing.get(("Folder", name)) or await ovation.create(project, "Folder", name)
        await self._context.jobs.set_folder(self._claim, str(folder["_id"]))
        return folder

    async def make_folders(self, paths: tuple[str, ...]) -> None:
        """Make a Folder for each directory, parents first."""
        for path in paths:
            await self._folder(path)

    async def _folder(self, path: str) -> Mapping[str, Any]:
        if path in self._folders:
            return self._folders[path]
        shown = _printable(path)
        record = self._done.get((Kind.FOLDER, shown))
        if record is not None and record.entity_id is not None:
            folder: Mapping[str, Any] = await self._context.ovation.entity(
                self._claim.job.organization, record.entity_id
            )
        else:
            parent_path, _, name = path.rpartition("/")
            folder = await self._make(await self._folder(parent_path), "Folder", _printable(name))
            await self._save(Output(Kind.FOLDER, shown, entity_id=str(folder["_id"])))
        self._folders[path] = folder
        return folder

    async def _make(self, parent: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any]:
        """Make a File or Folder; when this is not the first try, look first whether it stands there already."""
        if self._resumed:
            parent_id = str(parent["_id"])
            if parent_id not in self._standing:
                self._standing[parent_id] = await self._context.ovation.contents(parent)
            if found := self._standing[parent_id].get((kind, name)):
                return found
        return await self._context.ovation.create(parent, kind, name)

    async def deliver(self, items: list[_Item]) -> None:
        """Deliver files, several at once; the first failure ends the step, what is done stays done."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(item: _Item) -> None:
            async with gate:
                await self._deliver(item)
                self._control.progress.files_done += 1

        try:
            async with asyncio.TaskGroup() as group:
                for item in items:
                    group.create_task(one(item))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _deliver(self, item: _Item) -> None:
        shown = _printable(item.path)
        record = self._done.get((item.kind, shown)) or Output(item.kind, shown)
        if record.linked:
            self._control.progress.add_bytes(item.size)
            return
        if not record.uploaded:
            try:
                descriptor = await asyncio.to_thread(open_below, item.root, item.path)
            except OSError as error:  # one file that cannot be read must not hold up the others
                if error.errno in _NOT_THE_FILES_FAULT:
                    raise
                self.unreadable.append((item.path, error.strerror or str(error)))
                return
            record = await self._upload(item, descriptor, record)
        if record.revision_id is not None:
            await self._context.ovation.add_output(self._activity, record.revision_id)
        await self._save(replace(record, linked=True))

    async def _upload(self, item: _Item, descriptor: int, record: Output) -> Output:
        ovation, organization = self._context.ovation, self._claim.job.organization
        folder_path, _, name = item.path.rpartition("/")
        shown = _printable(name)
        try:
            size = os.fstat(descriptor).st_size
            if record.entity_id is None:
                folder = self._folders[""] if item.kind is Kind.LOG else await self._folder(folder_path)
                file = await self._make(folder, "File", shown)
                record = replace(record, entity_id=str(file["_id"]))
                await self._save(record)
            else:
                file = await ovation.entity(organization, str(record.entity_id))
            if record.revision_id is not None:
                await self._give_up(record.revision_id)  # its credentials are gone with the step that had them
            kind = content_type(shown)
            revision, credentials = await ovation.create_revision(file, shown, kind)
            record = replace(record, revision_id=str(revision["_id"]), size=size)
            await self._save(record)
            sha256 = await self._context.uploader.upload(
                descriptor, size, credentials, kind, self._control.progress.add_bytes
            )
        finally:
            os.close(descriptor)
        complete = await ovation.upload_complete(revision)
        arrived = complete.get("attributes", {}).get("content_length")
        if arrived is not None and int(arrived) != size:
            raise StorageMismatch(f"{shown}: {arrived} of {size} bytes arrived in the object store")
        record = replace(record, sha256=sha256, uploaded=True)
        await self._save(record)
        return record

    async def _give_up(self, revision_id: str) -> None:
        ovation, organization = self._context.ovation, self._claim.job.organization
        try:
            await ovation.upload_failed(await ovation.entity(organization, revision_id))
        except OvationNotFound:
            return

    async def _save(self, output: Output) -> None:
        await self._context.outputs.save(self._claim, output)
        self._done[output.kind, output.path] = output
