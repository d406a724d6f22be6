"""A worker on a real database whose steps are the test's own, and which can be killed like a process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from agent.adapters.disk import Room
from agent.db.database import Database
from agent.db.jobs import Claim, Jobs
from agent.db.outputs import Outputs
from agent.db.watched import WatchList
from agent.domain.activity import Activity
from agent.domain.decide import Limits
from agent.domain.job import Done, Job, Outcome, Plan, PlannedFile, State, Verdict
from agent.pipeline import perform
from agent.pipeline import worker as worker_module
from agent.pipeline.context import Context, Control, Step
from agent.pipeline.worker import Worker
from agent.settings import AgentSettings

IMAGE = PlannedFile("image-1", "Revision", "a.sif", "a.sif")
PLAN = Plan(inputs=(), related=(IMAGE,), image=IMAGE)
Work = Callable[[Context, Claim, Control], Awaitable[Outcome]]


async def done(context: Context, claim: Claim, control: Control) -> Outcome:
    """Do nothing, well."""
    del context, control
    return Done(verdict=Verdict.SUCCEEDED, exit_code=0) if claim.job.state is State.RUNNING else Done()


def set_steps(monkeypatch: pytest.MonkeyPatch, steps: Mapping[State, Work]) -> None:
    """Have workers perform these steps; those that are not named do nothing, well."""
    every: dict[State, Step] = {state: done for state in perform.STEPS}  # noqa: C420 mypy wants the type
    monkeypatch.setattr(perform, "STEPS", {**every, **steps})
    monkeypatch.setattr(worker_module, "_IDLE_SECONDS", 0.05)


async def make_job(database: Database, name: str, project: str = "project-1") -> str:
    """Make a job on an Activity of its own, and return its id."""
    job, made = await WatchList(database).start(Activity(name, 0, name, project, (), ()), PLAN, "webhook")
    assert made
    return job.id


async def until(look: Callable[[], Awaitable[Any]], what: str, seconds: float = 20) -> Any:
    """Look again and again until there is something, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := await look()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        await asyncio.sleep(0.02)
    return found


class Machine:
    """A data directory with one agent's worker at a time."""

    def __init__(
        self,
        database: Database,
        place: str,
        limits: Limits | None = None,
        lease_seconds: float = 15.0,
        **settings: Any,
    ) -> None:
        self.database = database
        self.place = place
        self.jobs = Jobs(database)
        self.deaths = 0
        self._limits = limits
        self._lease_seconds = lease_seconds
        self._settings = AgentSettings(data_dir=Path("/nonexistent"), **settings)
        self.worker: Worker
        self._task: asyncio.Task[None]

    async def start(self) -> None:
        """Start the worker as an agent does: what the one before it held is nobody's now."""
        nothing = cast("Any", None)
        context = Context(
            settings=self._settings,
            jobs=self.jobs,
            outputs=Outputs(self.database),
            ovation=nothing,
            downloader=nothing,
            uploader=nothing,
            executor=nothing,
            room=Room(Path("/"), 0),
            cache=cast("Any", None),
        )
        await self.jobs.expire_leases(self.place)
        self.worker = Worker(context, self.place, self._limits, lease_seconds=self._lease_seconds)
        self._task = asyncio.create_task(self.worker.run())

    async def stop(self) -> None:
        """Stop the worker in good order."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def die(self) -> None:
        """End the worker as SIGKILL does: nothing is given back."""
        self.deaths += 1

        async def nothing() -> None:
            pass

        self.worker._give_back = nothing  # type: ignore[method-assign]
        self.worker._stopping = True
        held = [each.task for each in self.worker._held.values()]
        for task in (self._task, *held):
            task.cancel()
        await asyncio.gather(self._task, *held, return_exceptions=True)

    async def job(self, job_id: str) -> Job:
        """Return a job as it stands."""
        found = await self.jobs.get(job_id)
        assert found is not None
        return found

    async def reach(self, job_id: str, *states: State, seconds: float = 20) -> Job:
        """Wait until a job is in one of these states, and return it."""

        async def look() -> Job | None:
            job = await self.job(job_id)
            return job if job.state in states else None

        return cast("Job", await until(look, f"job in {states}", seconds))


@asynccontextmanager
async def migrated(database_url: str) -> AsyncIterator[Database]:
    """Open an empty database with the schema of today."""
    opened = await Database.open(database_url, "the test database")
    try:
        await opened.migrate()
        yield opened
    finally:
        await opened.close()


@asynccontextmanager
async def machine(
    database: Database, place: str = "here", limits: Limits | None = None, **settings: Any
) -> AsyncIterator[Machine]:
    """Run a worker; at the end it has stopped."""
    opened = Machine(database, place, limits, **settings)
    await opened.start()
    try:
        yield opened
    finally:
        await opened.stop()
