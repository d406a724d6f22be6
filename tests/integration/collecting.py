"""A job whose container has ended: its files on disk, its row in PostgreSQL, and one try of its delivery at a time."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from botocore.retries.standard import ExponentialBackoff

from agent.adapters import upload
from agent.adapters.cache import Cache
from agent.adapters.disk import Room
from agent.adapters.download import Downloader
from agent.adapters.local import LocalExecutor
from agent.adapters.ovation import Ovation
from agent.adapters.upload import Uploader
from agent.db.database import Database
from agent.db.jobs import Claim, Jobs, insert_job
from agent.db.outputs import Output, Outputs
from agent.domain.activity import Activity
from agent.domain.decide import Limits, decide
from agent.domain.job import Done, Job, Outcome, Plan, PlannedFile, State, Verdict
from agent.pipeline.context import Context, Control
from agent.pipeline.perform import perform
from agent.sandbox.records import Entity
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET, REGION
from agent.settings import AgentSettings, AwsSettings, OvationSettings
from tests.lab import Lab

PLACE = "tests"
PART_BYTES = 70_000  # also the longest that goes in one piece; a sandbox of these tests takes such parts
LOGS = {"stdout.log": b"it ran\n", "stderr.log": b""}


@dataclass(frozen=True, slots=True)
class Where:
    """What another process needs to do the same work."""

    database_url: str
    data_dir: str
    ovation: dict[str, Any]
    store_url: str


@asynccontextmanager
async def opened(where: Where) -> AsyncIterator[tuple[Database, Context]]:
    """Open everything that a step is given; objects go in parts from `PART_BYTES` on, and S3 is tried again at once."""
    sizes = mock.patch.multiple(upload, _SINGLE_MAX_BYTES=PART_BYTES, _PART_MIN_BYTES=PART_BYTES)
    patience = mock.patch.object(ExponentialBackoff, "delay_amount", return_value=0.01)
    async with AsyncExitStack() as stack:
        stack.enter_context(sizes)
        stack.enter_context(patience)
        database = await Database.open(where.database_url, "the test database")
        stack.push_async_callback(database.close)
        context = Context(
            settings=AgentSettings(data_dir=Path(where.data_dir)),
            jobs=Jobs(database),
            outputs=Outputs(database),
            ovation=await stack.enter_async_context(Ovation.open(OvationSettings.model_validate(where.ovation))),
            downloader=await stack.enter_async_context(Downloader()),
            uploader=await stack.enter_async_context(
                Uploader(AwsSettings(endpoint_url_s3=where.store_url, default_region=REGION))
            ),
            executor=LocalExecutor(),
            room=Room(Path(where.data_dir), 0),
            cache=Cache(Path(where.data_dir) / "cache", 0),
        )
        yield database, context


async def one_try(database: Database, context: Context, job_id: str) -> tuple[Outcome, Job]:
    """Do the step of collecting once, as a worker does, whenever it is due; return its outcome and the job after it."""
    claim = await claimed(database, context, job_id)
    outcome = await perform(context, claim, Control(), _raise)
    await context.jobs.move(claim, decide(claim.job, outcome, Limits()), note=getattr(outcome, "note", None))
    job = await context.jobs.get(job_id)
    assert job is not None
    return outcome, job


async def claimed(database: Database, context: Context, job_id: str) -> Claim:
    """Claim the job now."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET due_at = now(), lease_until = NULL, place = $2 WHERE id = $1", uuid.UUID(job_id), PLACE
        )
    [claim] = [each for each in await context.jobs.claim([State.COLLECTING], 10, 60, PLACE) if each.job.id == job_id]
    return claim


def _raise(error: Exception) -> None:
    raise error


def _try_and_die(where: Where, job_id: str) -> None:
    async def run() -> None:
        async with opened(where) as (database, context):
            await one_try(database, context, job_id)

    asyncio.run(run())


class Collecting:
    """Jobs in collecting, one after the other."""

    def __init__(self, sandbox: Sandbox, database: Database, context: Context, where: Where) -> None:
        self.sandbox = sandbox
        self.database = database
        self.context = context
        self.where = where
        self.lab = Lab(sandbox, Path(where.data_dir).parent)

    async def job(self, files: Mapping[str, bytes], logs: Mapping[str, bytes] = LOGS, name: str = "An activity") -> Run:
        """Make an Activity and its job, whose container has left these files, empty directories with a `/`."""
        activity_id = str(self.sandbox.admin.create_activity(self.lab.project_id, name)["_id"])
        image = PlannedFile(str(uuid.uuid4()), "Revision", "a.sif", "a.sif")
        activity = Activity(activity_id, 0, name, self.lab.project_id, (), ())
        async with self.database.transaction() as queries:
            job = await insert_job(queries, activity, Plan((), (image,), image), "webhook")
        assert job is not None
        async with self.database.connection() as connection:
            await connection.execute(
                "UPDATE jobs SET state = 'collecting', verdict = 'succeeded' WHERE id = $1", uuid.UUID(job.id)
            )
        run = Run(self, job.id, activity_id, Path(self.context.layout(job).run(1)))
        await asyncio.to_thread(run.write, files, logs)
        return run


@dataclass(frozen=True, slots=True)
class Run:
    """One job, its files on disk and what is in Ovation of it."""

    all: Collecting
    job_id: str
    activity_id: str
    directory: Path

    def write(self, files: Mapping[str, bytes], logs: Mapping[str, bytes]) -> None:
        """Write what the container has left."""
        (self.directory / "outputs").mkdir(parents=True)
        for path, content in files.items():
            target = self.directory / "outputs" / path
            if path.endswith("/"):
                target.mkdir(parents=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        for name, content in logs.items():
            (self.directory / name).write_bytes(content)

    @property
    def uploads(self) -> Path:
        """Where uploads that are under way are on record."""
        return self.directory.parent / "uploads"

    async def one_try(self) -> tuple[Outcome, Job]:
        """Try the delivery once."""
        return await one_try(self.all.database, self.all.context, self.job_id)

    async def tries(self, most: int = 6) -> tuple[list[Outcome], Job]:
        """Try until it is done, `most` times at most."""
        outcomes = []
        for _ in range(most):
            outcome, job = await self.one_try()
            outcomes.append(outcome)
            if isinstance(outcome, Done):
                assert job.state is State.REPORTING
                assert job.verdict is Verdict.SUCCEEDED
                return outcomes, job
        raise AssertionError(f"not done after {most} tries: {outcomes}")

    async def die_at(self, request: int) -> int:
        """Try in another process, which is killed when its n-th request arrives; return how many arrived."""
        seen = 0
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([__name__])  # to import everything takes longer than the rest
        process = processes.Process(target=_try_and_die, args=(self.all.where, self.job_id))
        ended = asyncio.Event()
        book = self.all.sandbox.faults
        match = book.match

        def count(target: str, method: str, where: str) -> Any:
            nonlocal seen
            seen += 1
            if seen == request:
                process.kill()
            return match(target, method, where)

        book.match = count  # type: ignore[method-assign]
        process.start()
        loop = asyncio.get_running_loop()
        handle = os.pidfd_open(process.pid or 0)
        loop.add_reader(handle, ended.set)
        try:
            await asyncio.wait_for(ended.wait(), 60)
        finally:
            loop.remove_reader(handle)
            os.close(handle)
            book.match = match  # type: ignore[method-assign]
            process.join()
            process.close()
        return seen

    async def records(self) -> dict[str, Output]:
        """Return the table of outputs by `kind/path`."""
        found = await self.all.context.outputs.of(self.job_id)
        return {f"{kind}/{path}": output for (kind, path), output in found.items()}

    def folder(self) -> Entity:
        """Return the run's Folder that is there now."""
        [folder] = self.folders()
        return folder

    def folders(self) -> list[Entity]:
        """Return the Folders in the Project that are named as the run's."""
        return [each for each in self.related(self.all.lab.project_id, "folders") if " run " in each.attributes["name"]]

    def related(self, entity_id: str, rel: str) -> list[Entity]:
        """Return what is related to an entity and not in the trash."""
        found = self.all.sandbox.model.records.related(entity_id, rel)
        return [each for each in found if each.trash_info is None]

    def revisions(self, path: str) -> list[str]:
        """Return the upload-status of each Revision of a File of the run, oldest first."""
        *folders, name = path.split("/")
        where = self.folder()
        for folder in folders:
            [where] = [each for each in self.related(where.id, "folders") if each.attributes["name"] == folder]
        [file] = [each for each in self.related(where.id, "files") if each.attributes["name"] == name]
        return [str(each.attributes["upload-status"]) for each in self.related(file.id, "revisions")]

    async def is_exact(self, files: Mapping[str, bytes], logs: Mapping[str, bytes] = LOGS) -> None:
        """Check that everything is on the Activity once, byte for byte, and that nothing of the delivery is left."""
        wanted = {**logs, **{path: content for path, content in files.items() if not path.endswith("/")}}
        assert await self.all.lab.outputs(self.activity_id) == wanted
        records = await self.records()
        for path, content in wanted.items():
            output = records.get(f"output/{path}") or records[f"log/{path}"]
            assert output.uploaded, path
            assert output.linked, path
            assert (output.size, output.sha256) == (len(content), hashlib.sha256(content).hexdigest()), path
        self.nothing_is_left()
        counted = Counter(self.paths(self.folder().id, ""))
        parents = {f"{parent}/" for path in files for parent in Path(path).parents if parent.name}
        assert counted == Counter([*wanted, *parents, *(path for path in files if path.endswith("/"))])

    def nothing_is_left(self) -> None:
        """Check that no upload is under way any more, in Ovation, in the store and on the disk."""
        records = self.all.sandbox.model.records
        for revision in records.entities_of_type(0, "Revision"):
            assert revision.attributes["upload-status"] != "in-progress", revision.attributes["name"]
        assert parts_left(self.all.sandbox) == []
        assert not self.uploads.exists()

    def paths(self, folder_id: str, prefix: str) -> list[str]:
        """Return what stands below a Folder; Folders end with a `/`."""
        found = [f"{prefix}{each.attributes['name']}" for each in self.related(folder_id, "files")]
        for inner in self.related(folder_id, "folders"):
            path = f"{prefix}{inner.attributes['name']}/"
            found += [path, *self.paths(inner.id, path)]
        return found


def parts_left(sandbox: Sandbox) -> list[str]:
    """Return the objects of which parts are left in the store.

    An upload without parts takes no room. One whose id was lost on the way cannot be found again with credentials for
    one object, here as in Amazon's store.
    """
    return [each.key for each in sandbox.store.uploads(BUCKET, "") if sandbox.store.parts(each.id)]


def content_of(size: int, first: int = 0) -> bytes:
    """Return bytes that differ from place to place."""
    return (bytes((number + first) % 251 for number in range(251)) * (size // 251 + 1))[:size]


def where_of(sandbox: Sandbox, database_url: str, data_dir: Path) -> Where:
    """Return what leads to these parts from another process."""
    ovation = {"api_url": sandbox.api_url, "token": sandbox.service_token, "hosts": (sandbox.services_url,)}
    return Where(database_url, str(data_dir), ovation, sandbox.s3_url)
