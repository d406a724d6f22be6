"""Staging with parties that do as they are told: what is asked, what is fetched, what is promised, what stays."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import tenacity

from agent.adapters.cache import Cache
from agent.adapters.disk import Room, Space
from agent.adapters.download import Fetched
from agent.adapters.ovation import Download
from agent.db.jobs import Claim
from agent.domain.job import Done, Failed, FaultClass, Job, NotYet, Outcome, Plan, PlannedFile, State
from agent.errors import OvationNotFound, OvationUnavailable, StorageMismatch, StorageUnavailable
from agent.pipeline import landing
from agent.pipeline import stage as stage_module
from agent.pipeline import staged as staged_module
from agent.pipeline.context import Context, Control
from agent.pipeline.stage import stage
from agent.pipeline.staged import Staged, read_record
from agent.settings import AgentSettings

JOB = "9e107d9d-372b-4b1c-8d5a-0a6f3c1e7c11"
OTHER = "0cc175b9-c0f1-4b6a-a831-c399e2697726"


class World:
    """A disk, an Ovation and an object store. A file's content is made of as many bytes as its id's first number."""

    def __init__(self, directory: Path, free: int = 10_000, min_free: int = 0) -> None:
        self.directory = directory
        self.free_at_first = free
        self.asked: list[str] = []
        self.fetched: list[str] = []
        self.unreadable: dict[str, list[Exception]] = {}
        self.errors: dict[str, list[Exception]] = {}
        self.began: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.gave_up: dict[str, asyncio.Event] = defaultdict(asyncio.Event)  # the last error was raised
        self.attributes: dict[str, dict[str, Any]] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.room = Room(directory, min_free, lambda _: Space(self.free, free))
        self.context = Context(
            settings=AgentSettings(data_dir=directory),
            jobs=cast("Any", None),
            outputs=cast("Any", None),
            ovation=cast("Any", self),
            downloader=cast("Any", self),
            uploader=cast("Any", None),
            executor=cast("Any", None),
            room=self.room,
            cache=Cache(directory / "cache", 0),
        )

    @property
    def free(self) -> int:
        folders = [self.directory / "jobs" / job / folder for job in (JOB, OTHER) for folder in ("inputs", "related")]
        folders.append(self.directory / "cache" / "incoming")
        names = [path for folder in folders if folder.exists() for path in folder.iterdir()]
        return self.free_at_first - sum(map(_size, names))

    async def entity(self, organization: int, entity_id: str) -> dict[str, Any]:
        assert organization == 7
        self.asked.append(entity_id)
        if self.unreadable.get(entity_id):
            raise self.unreadable[entity_id].pop(0)
        attributes = {"content_length": size_of(entity_id), **self.attributes.get(entity_id, {})}
        return {"_id": entity_id, "attributes": attributes}

    async def download(self, document: dict[str, Any]) -> Download:
        return Download(str(document["_id"]), remote=False)

    def is_remote(self, document: dict[str, Any]) -> bool:
        del document
        return False

    async def fetch(self, url: str, path: Path, *, remote: bool, name: str, progress: Any, **_: Any) -> Fetched:
        assert not remote
        assert name
        self.fetched.append(url)
        self.began[url].set()
        content = b"x" * size_of(url)
        part = path.with_name(f".{url}.part")
        part.write_bytes(content)
        try:
            progress(len(content))
            await self._obstacles(url)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
        return Fetched(len(content), hashlib.sha256(content).hexdigest())

    async def _obstacles(self, url: str) -> None:
        if url in self.gates:
            await self.gates[url].wait()
        if self.errors.get(url):
            error = self.errors[url].pop(0)
            if not self.errors[url]:
                self.gave_up[url].set()
            raise error

    def job(self, *ids: str, job_id: str = JOB, launch: int = 1) -> Job:
        image = planned("100-image")
        return Job(
            id=job_id,
            organization=7,
            activity_id="a",
            activity_name="An activity",
            project_id="p",
            run=1,
            plan=Plan(inputs=tuple(map(planned, ids)), related=(image,), image=image),
            state=State.STAGING,
            attempt=0,
            launch=launch,
            trigger="webhook",
            requested_by=None,
            created_at=datetime(2026, 1, 2, tzinfo=UTC),
        )

    async def stage(self, job: Job) -> Outcome:
        return await stage(self.context, Claim(job, 1), Control())

    def there(self, job_id: str = JOB) -> set[str]:
        """Return what counts as staged, as it stands on the disk."""
        root = self.directory / "jobs" / job_id
        return {f"{folder}/{name}" for folder, name in read_record(root)}

    def on_disk(self, job_id: str = JOB) -> set[str]:
        root = self.directory / "jobs" / job_id
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def _size(path: Path) -> int:
    """Return a file's size; one that is being renamed has none at this place."""
    with suppress(FileNotFoundError):
        return 0 if path.name == ".manifest.json" else path.stat().st_size
    return 0


def planned(entity_id: str) -> PlannedFile:
    kind = "Source" if entity_id.endswith("source") else "Revision"
    return PlannedFile(entity_id, kind, f"{entity_id}.csv", f"{entity_id}.csv")


def size_of(entity_id: str) -> int:
    return int(entity_id.partition("-")[0])


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = cast("Any", stage_module._Staging._transfer)
    monkeypatch.setattr(transfer.retry, "wait", tenacity.wait_none())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_everything_is_brought_and_promised_no_longer(world: World) -> None:
    assert await world.stage(world.job("10-a", "20-source")) == Done()
    assert world.there() == {"inputs/10-a.csv", "inputs/20-source.csv", "related/100-image.csv"}
    manifests = {"inputs/.manifest.json", "related/.manifest.json"}
    assert world.on_disk() == {*world.there(), *manifests, "staged.jsonl"}
    assert await world.room.take("another", world.free, has_files=False) is None


async def test_nothing_is_fetched_where_all_of_it_does_not_fit(tmp_path: Path) -> None:
    world = World(tmp_path, free=1099)
    outcome = await world.stage(world.job("1000-a"))
    assert outcome == NotYet(
        30, "waiting for disk space: 1.1 kB are needed, the agent's whole disk can give 1.0 kB", elsewhere=True
    )
    assert world.fetched == []
    assert not (tmp_path / "jobs" / JOB).exists()
    asked = len(world.asked)
    assert await world.stage(world.job("1000-a")) == outcome
    assert len(world.asked) == asked  # Ovation is not asked again and again
    world.free_at_first += 1
    assert await world.stage(world.job("1000-a")) == Done()


async def test_what_is_promised_to_one_is_not_promised_to_another(tmp_path: Path) -> None:
    world = World(tmp_path, free=1500)
    world.gates["600-a"] = asyncio.Event()
    first = asyncio.create_task(world.stage(world.job("600-a", "500-b")))
    await world.began["600-a"].wait()
    second = world.job("300-c", job_id=OTHER)
    assert isinstance(await world.stage(second), NotYet)
    world.gates["600-a"].set()
    assert await first == Done()
    assert isinstance(await world.stage(second), NotYet)  # what has landed is still there
    world.free_at_first += 100
    assert await world.stage(second) == Done()


async def test_who_waits_with_files_keeps_them_and_its_place(tmp_path: Path) -> None:
    world = World(tmp_path, free=1000)
    world.errors["200-b"] = [OSError(errno.ENOSPC, "No space left on device")]
    with pytest.raises(OSError, match="No space left"):
        await world.stage(world.job("300-a", "200-b"))
    assert world.there() == {"inputs/300-a.csv"}
    world.free_at_first = 599  # somebody else uses the disk
    outcome = await world.stage(world.job("300-a", "200-b"))
    assert isinstance(outcome, NotYet)
    assert not outcome.elsewhere
    assert world.there() == {"inputs/300-a.csv"}
    world.free_at_first = 600
    assert await world.stage(world.job("300-a", "200-b")) == Done()
    assert world.fetched.count("300-a") == 1


async def test_two_that_wait_for_each_others_room_do_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "_FETCHED_AT_ONCE", 1)
    world = World(tmp_path, free=3000)
    jobs = [world.job("400-a", "300-b"), world.job("400-a", "300-b", job_id=OTHER)]
    for job in jobs:
        world.errors["300-b"] = [OSError(errno.ENOSPC, "No space left on device")]
        with pytest.raises(OSError, match="No space left"):
            await world.stage(job)
    world.free_at_first = 1000  # 400 are on the disk for each; each needs 400 more
    outcomes = [await world.stage(job) for job in jobs]
    assert [each.elsewhere for each in outcomes if isinstance(each, NotYet)] == [False, True]
    assert not (tmp_path / "jobs" / OTHER).exists()
    assert await world.stage(jobs[0]) == Done()


@pytest.mark.parametrize("failing", ["10-a", "10-c"])
async def test_one_that_arrives_wrong_does_not_keep_the_others(world: World, failing: str) -> None:
    world.errors[failing] = [StorageMismatch("wrong") for _ in range(3)]
    outcome = await world.stage(world.job("10-a", "10-b", "10-c"))
    assert isinstance(outcome, Failed)
    assert (outcome.final, outcome.fault.cls) == (False, FaultClass.INPUT)
    assert len(world.there()) == 3
    assert await world.room.take("another", world.free, has_files=False) is None  # nothing is promised any more
    world.room.release("another")
    assert await world.stage(world.job("10-a", "10-b", "10-c")) == Done()
    assert sorted(world.fetched) == sorted(["10-a", "10-b", "10-c", "100-image", *[failing] * 3])


async def test_one_that_is_still_uploading_does_not_keep_the_others(world: World) -> None:
    world.attributes["10-a"] = {"upload-status": "in-progress"}
    outcome = await world.stage(world.job("10-a", "10-b"))
    assert outcome == NotYet(10, "waiting for 10-a.csv to finish uploading")
    assert world.there() == {"inputs/10-b.csv", "related/100-image.csv"}


async def test_what_is_gone_for_good_ends_everything_at_once(world: World) -> None:
    world.gates["10-a"] = asyncio.Event()
    world.attributes["20-b"] = {"url": None}
    world.unreadable["10-c"] = [OvationNotFound("no such entity")]
    outcome = await world.stage(world.job("10-a", "20-b", "10-c"))
    assert isinstance(outcome, Failed)
    assert outcome.final
    assert "10-c.csv: Ovation has no such Revision any more" in outcome.fault.message
    assert world.fetched == []


async def test_while_a_party_is_away_nothing_more_is_begun(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "_FETCHED_AT_ONCE", 4)
    ids = [f"200-{number}" for number in range(20)]  # larger than the image: the largest come first
    world.errors["200-0"] = [StorageUnavailable("away") for _ in range(3)]
    for entity_id in ids[1:4]:
        world.gates[entity_id] = asyncio.Event()
    staging = asyncio.create_task(world.stage(world.job(*ids)))
    await world.gave_up["200-0"].wait()
    for gate in world.gates.values():
        gate.set()
    with pytest.raises(StorageUnavailable):
        await staging
    assert world.there() == {f"inputs/{entity_id}.csv" for entity_id in ids[1:4]}  # what was under way went on
    assert set(world.fetched) == set(ids[:4])


async def test_while_ovation_is_away_nothing_is_fetched(world: World) -> None:
    world.unreadable["10-a"] = [OvationUnavailable("away")]
    with pytest.raises(OvationUnavailable):
        await world.stage(world.job("10-a", "10-b"))
    assert world.fetched == []


async def test_a_length_that_ovation_did_not_promise_does_not_count(world: World) -> None:
    world.attributes["10-a"] = {"content_length": 11}
    outcome = await world.stage(world.job("10-a"))
    assert isinstance(outcome, Failed)
    assert "10 bytes arrived, Ovation says 11" in outcome.fault.message
    assert world.on_disk() == {"related/100-image.csv", "staged.jsonl"}


@pytest.mark.parametrize("told", [None, "", "many", -1, float("inf"), []])
async def test_a_length_that_nobody_knows_is_met_on_the_way(tmp_path: Path, told: object) -> None:
    world = World(tmp_path, free=1000, min_free=200)
    world.attributes["950-a"] = {"content_length": told}
    with pytest.raises(OSError, match="No space left") as raised:
        await world.stage(world.job("950-a"))
    assert raised.value.errno == errno.ENOSPC
    assert world.there() <= {"related/100-image.csv"}
    world.free_at_first = 2000
    assert await world.stage(world.job("950-a")) == Done()


async def test_what_could_not_be_recorded_does_not_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    append = staged_module.append

    def full(root: Path, group: Sequence[Staged]) -> None:
        if "10-a" in {staged.id for staged in group}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(root, group)

    with monkeypatch.context() as patched:
        patched.setattr(landing, "append", full)
        with pytest.raises(OSError, match="No space left"):
            await world.stage(world.job("10-a"))
    assert "inputs/10-a.csv" not in world.there()
    assert await world.stage(world.job("10-a")) == Done()


async def test_files_that_disappear_meanwhile_are_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    append = staged_module.append

    def removed(root: Path, group: Sequence[Staged]) -> None:
        append(root, group)
        for staged in group:
            (root / staged.folder / staged.file_name).unlink()

    with monkeypatch.context() as patched:
        patched.setattr(landing, "append", removed)
        with pytest.raises(OSError, match="disappeared"):
            await world.stage(world.job("10-a"))
    assert await world.stage(world.job("10-a")) == Done()


async def test_another_launch_finds_its_files_and_loses_the_former_ones_outputs(world: World) -> None:
    job = world.job("10-a")
    assert await world.stage(job) == Done()
    run = world.directory / "jobs" / JOB / "run-1"
    for name in ("outputs", "scratch", "private"):
        (run / name).mkdir(parents=True)
    (run / "stdout.log").touch()
    asked, fetched = len(world.asked), len(world.fetched)
    world.free_at_first = 0
    assert await world.stage(replace(job, launch=2)) == Done()
    assert (len(world.asked), len(world.fetched)) == (asked, fetched)
    assert [path.name for path in run.iterdir()] == ["stdout.log"]


async def test_another_launch_stays_where_its_logs_are(tmp_path: Path) -> None:
    world = World(tmp_path, free=50)
    (tmp_path / "jobs" / JOB / "run-1").mkdir(parents=True)
    outcome = await world.stage(world.job(launch=2))
    assert isinstance(outcome, NotYet)
    assert not outcome.elsewhere
    assert (tmp_path / "jobs" / JOB / "run-1").exists()


async def test_a_transfer_that_is_tried_again_costs_the_others_no_progress(world: World) -> None:
    world.errors["10-a"] = [StorageUnavailable("broke off")]
    control = Control()
    assert await stage(world.context, Claim(world.job("10-a", "20-b", "5-source"), 1), control) == Done()
    progress = control.progress
    assert (progress.files_done, progress.files_total) == (4, 4)
    assert progress.bytes_done == progress.bytes_total > 130
