"""The sweep: what is removed when, and that nothing which fails keeps the rest."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import structlog

from agent.adapters.cache import Cache
from agent.adapters.disk import Room, Space
from agent.adapters.executor import Ended, Ending, Running, RunRequest, Status
from agent.adapters.files import remove_tree
from agent.adapters.local import LocalExecutor
from agent.db.jobs import Claim, OnDisk
from agent.domain.job import TERMINAL, Job, Plan, PlannedFile, State, Verdict
from agent.errors import DatabaseError
from agent.pipeline import report as report_module
from agent.pipeline import sweep as sweep_module
from agent.pipeline.context import Context
from agent.pipeline.report import close
from agent.pipeline.sweep import Fate, Sweeper, fate, sweep
from agent.settings import AgentSettings

HERE = "3e0a2ae1-5a73-4d4b-9d1c-6f3f1e8ab8b5"
IMAGE = PlannedFile("r", "Revision", "a.sif", "a.sif")
JOB = Job(
    id="",
    organization=0,
    activity_id="a",
    activity_name="An activity",
    project_id="p",
    run=1,
    plan=Plan(inputs=(), related=(IMAGE,), image=IMAGE),
    state=State.REPORTING,
    attempt=0,
    trigger="webhook",
    requested_by=None,
    created_at=datetime(2026, 1, 2, tzinfo=UTC),
)
THERE = "b7e5f6f0-90b1-4a57-8d07-bd9c0a3e1a11"


@pytest.mark.parametrize("state", sorted(set(State) - TERMINAL))
@pytest.mark.parametrize("place", [None, HERE])
def test_a_live_job_keeps_its_directory(state: State, place: str | None) -> None:
    assert fate(OnDisk(state, place, None), HERE, 0, 0) is Fate.STAYS


@pytest.mark.parametrize(
    ("state", "ended", "keep", "keep_failed", "expected"),
    [
        (State.SUCCEEDED, 5, 10, 100, Fate.LOSES_WORK),
        (State.SUCCEEDED, 11, 10, 100, Fate.GOES),
        (State.CANCELLED, 11, 10, 100, Fate.GOES),
        (State.SUCCEEDED, 0, 0, 100, Fate.GOES),
        (State.FAILED, 11, 10, 100, Fate.STAYS),
        (State.FAILED, 101, 10, 100, Fate.GOES),
        (State.FAILED, 11, 100, 10, Fate.LOSES_WORK),
        (State.FAILED, 101, 100, 10, Fate.GOES),
        (State.FAILED, 0, 100, 0, Fate.LOSES_WORK),
    ],
)
def test_ended_jobs_lose_what_has_had_its_time(
    state: State, ended: float, keep: float, keep_failed: float, expected: Fate
) -> None:
    assert fate(OnDisk(state, HERE, ended), HERE, keep, keep_failed) is expected


def test_what_is_no_job_of_this_place_has_no_owner() -> None:
    assert fate(None, HERE, 0, 0) is Fate.UNOWNED
    assert fate(OnDisk(State.RUNNING, THERE, None), HERE, 0, 0) is Fate.UNOWNED


class Table:
    """The table of jobs, as far as the sweep asks it."""

    def __init__(self) -> None:
        self.jobs: dict[str, OnDisk] = {}
        self.away = 0  # how many more times it does not answer
        self.asked = asyncio.Event()

    async def on_disk(self, job_ids: Collection[str]) -> dict[str, OnDisk]:
        if self.away > 0:
            self.away -= 1
            raise DatabaseError("PostgreSQL is away")
        self.asked.set()
        return {job_id: self.jobs[job_id] for job_id in job_ids if job_id in self.jobs}


class World:
    """A data directory with jobs, of which the disk knows only whether their inputs are there."""

    def __init__(self, data_dir: Path, **settings: float) -> None:
        self.folder = data_dir / "jobs"
        self.folder.mkdir()
        self.table = Table()
        self.room = Room(self.folder, 0, lambda _: Space(100 - 10 * len(self.kept()), 100))
        self.context = Context(
            settings=AgentSettings.model_validate({"data_dir": data_dir, **settings}),
            jobs=cast("Any", self.table),
            outputs=cast("Any", None),
            ovation=cast("Any", None),
            downloader=cast("Any", None),
            uploader=cast("Any", None),
            executor=LocalExecutor(),
            room=self.room,
            cache=Cache(data_dir / "cache", 0),
        )

    def ended(self, seconds: float, state: State = State.FAILED, place: str = HERE) -> str:
        """Make a job that ended so long ago, with its directory."""
        job_id = str(uuid.uuid4())
        (self.folder / job_id / "inputs").mkdir(parents=True)
        (self.folder / job_id / "run-1").mkdir()
        self.table.jobs[job_id] = OnDisk(state, place, seconds)
        return job_id

    def kept(self) -> set[str]:
        return {path.parent.name for path in self.folder.glob("*/inputs")}


async def test_room_is_made_of_the_oldest_failed_runs_and_of_nothing_else(tmp_path: Path) -> None:
    world = World(tmp_path)
    new, old, middle = (world.ended(seconds) for seconds in (10, 1000, 100))
    others = {
        world.ended(5000, place=THERE),
        world.ended(5000, State.SUCCEEDED),
        world.ended(0, State.RUNNING),
    }
    world.room.clear = Sweeper(world.context, HERE).make_room
    assert await world.room.take("job", 41, has_files=False) is None
    assert world.kept() == {new, middle, *others}
    assert await world.room.take("job", 60, has_files=False) is None
    assert world.kept() == {new, *others}
    assert (world.folder / old / "run-1").is_dir()
    assert await world.room.take("job", 99, has_files=False) is not None
    assert world.kept() == others


async def test_what_cannot_be_removed_is_told_once_and_keeps_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, keep_seconds=10)
    first, bad, last = sorted(world.ended(20, State.SUCCEEDED) for _ in range(3))

    def remove(path: Path) -> None:
        if path.name == bad:
            raise OSError(5, "Input/output error")
        remove_tree(path)

    monkeypatch.setattr(sweep_module, "remove_tree", remove)
    sweeper = Sweeper(world.context, HERE)
    with structlog.testing.capture_logs() as logs:
        await sweeper.sweep()
        await sweeper.sweep()
    assert not (world.folder / first).exists()
    assert not (world.folder / last).exists()
    assert [(each["event"], each.get("directory"), each.get("count")) for each in logs] == [
        ("sweep_failed", bad, None),
        ("swept", None, 2),
    ]


async def test_the_database_being_away_ends_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_AGAIN_SECONDS", 0.01)
    world = World(tmp_path, keep_seconds=10)
    job_id = world.ended(20, State.SUCCEEDED)
    world.table.away = 3
    sweeping = asyncio.create_task(sweep(world.context, HERE))
    await asyncio.wait_for(world.table.asked.wait(), 10)
    while (world.folder / job_id).exists():  # noqa: ASYNC110 a file system has no events
        await asyncio.sleep(0.01)
    assert not sweeping.done()
    world.table.away = 1000
    world.ended(0, State.RUNNING)
    assert await world.room.take("job", 95, has_files=False) is not None  # nor does it end whoever wants room
    sweeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sweeping


async def test_without_the_folder_there_is_nothing_to_sweep(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.folder.rmdir()
    await Sweeper(world.context, HERE).sweep()


@pytest.mark.parametrize(
    ("keep", "keep_failed", "expected"),
    [(604_800, 86_400, 3600), (600, 86_400, 600), (604_800, 60, 60), (0, 60, 60), (0, 0, 3600), (0.1, 0.1, 1)],
)
def test_it_looks_as_often_as_things_are_to_go(
    tmp_path: Path, keep: float, keep_failed: float, expected: float
) -> None:
    world = World(tmp_path, keep_seconds=keep, keep_failed_seconds=keep_failed)
    assert Sweeper(world.context, HERE).period_seconds == expected


async def test_a_mark_is_taken_off_what_has_an_owner_after_all(tmp_path: Path) -> None:
    """An agent that is started with another database for a minute must not be what loses a result."""
    world = World(tmp_path, keep_failed_seconds=3600)
    job_id = world.ended(0, State.COLLECTING)
    owner = OnDisk(State.COLLECTING, HERE, None)
    sweeper = Sweeper(world.context, HERE)
    del world.table.jobs[job_id]
    await sweeper.sweep()
    assert (world.folder / job_id / "unowned").exists()
    world.table.jobs[job_id] = owner
    await sweeper.sweep()
    assert not (world.folder / job_id / "unowned").exists()
    assert world.kept() == {job_id}


async def test_what_was_not_touched_for_long_is_not_gone_at_first_sight(tmp_path: Path) -> None:
    world = World(tmp_path, keep_failed_seconds=3600)
    job_id = world.ended(0)
    world.table.jobs.clear()
    for path in (world.folder / job_id / "run-1", world.folder / job_id / "inputs", world.folder / job_id):
        os.utime(path, (0, 0))
    sweeper = Sweeper(world.context, HERE)
    await sweeper.sweep()
    assert world.kept() == {job_id}
    for path in [world.folder / job_id, *(world.folder / job_id).iterdir()]:
        os.utime(path, (0, 0))
    await sweeper.sweep()
    assert world.kept() == set()


@pytest.mark.parametrize("is_known", [True, False])
async def test_what_runs_for_a_job_that_went_on_elsewhere_is_ended(tmp_path: Path, is_known: bool) -> None:
    """A machine that came back after its jobs were ended elsewhere; of jobs of another database nothing is touched."""
    world = World(tmp_path, keep_failed_seconds=0)
    job_id = world.ended(1000, place=THERE)
    if not is_known:
        world.table.jobs.clear()
    ended: list[str] = []

    class Busy(LocalExecutor):
        async def status(self, request: RunRequest) -> Status:
            del request
            return Ended(Ending.CANCELLED, 143, None, None, None) if ended else Running("1", datetime.now(UTC))

        async def cancel(self, request: RunRequest) -> None:
            ended.append(request.name)

    sweeper = Sweeper(replace(world.context, executor=Busy()), HERE)
    await sweeper.sweep()
    assert ended == ([f"ovation-{job_id}-1"] if is_known else [])
    assert world.kept() == {job_id}
    await sweeper.sweep()
    assert world.kept() == (set() if is_known else {job_id})


@pytest.mark.parametrize("verdict", [*Verdict, None])
@pytest.mark.parametrize("keep", [0, 10])
@pytest.mark.parametrize("keep_failed", [0, 10])
async def test_the_end_of_a_run_leaves_what_is_kept(
    tmp_path: Path, verdict: Verdict | None, keep: float, keep_failed: float
) -> None:
    world = World(tmp_path, keep_seconds=keep, keep_failed_seconds=keep_failed)
    claim = Claim(replace(JOB, id=world.ended(0), verdict=verdict), 1)
    for _ in range(2):
        assert await close(world.context, claim.job) is None
    stays = verdict in {Verdict.FAILED, None} and keep_failed > 0
    assert (claim.job.id in world.kept()) == stays
    assert (world.folder / claim.job.id / "run-1").is_dir() == (stays or keep > 0)


async def test_a_run_ends_although_its_files_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise OSError(30, "Read-only file system")

    world = World(tmp_path)
    monkeypatch.setattr(report_module, "remove_work", refuse)
    claim = Claim(replace(JOB, id=world.ended(0), verdict=Verdict.SUCCEEDED), 1)
    told = await close(world.context, claim.job)
    assert told == "not all of its files could be removed from the agent's disk: Read-only file system"
