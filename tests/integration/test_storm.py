"""Storms of deliveries: doubled, shuffled, late, lost, with removals among them; one run a real change all the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from agent.db.database import Database
from agent.sandbox.server import Sandbox
from agent.trigger import evaluate
from tests.triggers import Triggers, triggers

SENDERS = 16


@pytest.fixture
async def opened(database_url: str) -> AsyncIterator[Database]:
    database = await Database.open(database_url, "the test database")
    await database.migrate()
    yield database
    await database.close()


@dataclass(slots=True)
class Delivery:
    """One webhook as the research service sends it."""

    method: str
    body: dict[str, Any]


@dataclass(slots=True)
class Bench:
    """An Activity and what was really done to it."""

    sandbox: Sandbox
    project_id: str
    activity_id: str = ""
    inputs: list[str] = field(default_factory=list)
    gains: int = 0
    deliveries: list[Delivery] = field(default_factory=list)

    def begin(self) -> None:
        """Make the Activity with an image and an input."""
        first, image = self._revision("first.csv"), self._revision("image.sif")
        made = self.sandbox.admin.create_activity(self.project_id, "Storm", [first], [image])
        self.activity_id, self.inputs = str(made["_id"]), [first]
        self.gains += 1
        self._tell("POST", "inputs", first)
        self._tell("POST", "actions", image)

    def gain(self) -> None:
        """Add an input."""
        added = self._revision(f"input {len(self.inputs)}.csv")
        self.sandbox.admin.link(self.activity_id, "inputs", added, "activities")
        self.inputs.append(added)
        self.gains += 1
        self._tell("POST", "inputs", added)

    def lose(self) -> None:
        """Remove an input, if that leaves one."""
        if len(self.inputs) > 1:
            removed = self.inputs.pop(0)
            self.sandbox.admin.unlink(f"{self.activity_id}--inputs-->{removed}")
            self._tell("DELETE", "inputs", removed)

    def _revision(self, name: str) -> str:
        return str(self.sandbox.admin.create_revision(self.project_id, name, "x")["_id"])

    def _tell(self, method: str, rel: str, target: str) -> None:
        inverse = {"inputs": "activities", "actions": "procedures"}[rel]
        mapped = {"rel": rel, "inverse_rel": inverse, "entity_id": self.activity_id, "target_id": target}
        turned = {"rel": inverse, "inverse_rel": rel, "entity_id": target, "target_id": self.activity_id}
        notice = {"id": self.activity_id, "type": "Activity", "organization": 0}
        self.deliveries += [Delivery(method, body) for body in (mapped, turned, notice)]


async def send(url: str, deliveries: Iterable[Delivery]) -> None:
    """Send deliveries from several senders; every one must be taken."""
    waiting = iter(list(deliveries))

    async def one(http: aiohttp.ClientSession) -> None:
        for delivery in waiting:
            async with http.request(delivery.method, url, json=delivery.body) as response:
                assert response.status == 202, await response.text()

    async with aiohttp.ClientSession() as http:
        await asyncio.gather(*(one(http) for _ in range(SENDERS)))


async def storm(
    directory: Path, database: Database, *, activities: int, phases: int, deliveries: int, seed: int = 7
) -> tuple[dict[str, int], dict[str, int]]:
    """Send a storm in phases and return, by Activity, the real changes and the runs there were.

    In each phase an Activity may gain an input and lose another; its deliveries come doubled and shuffled, among late
    ones of the phases before. A walk at the end must find nothing.
    """
    chance = random.Random(seed)  # noqa: S311 repeatable
    async with Sandbox(directory / "sandbox") as sandbox, triggers(sandbox, database, directory) as front:
        project_id = str(sandbox.admin.create_project("Storm")["_id"])
        benches = [Bench(sandbox, project_id) for _ in range(activities)]
        for phase in range(phases):
            new: list[Delivery] = []
            for bench in benches:
                before = len(bench.deliveries)
                if phase == 0:
                    bench.begin()
                elif chance.random() < 0.7:
                    bench.gain()
                if chance.random() < 0.3:
                    bench.lose()
                new += bench.deliveries[before:]
            late = [delivery for bench in benches for delivery in bench.deliveries]
            lot = new + chance.choices(late, k=deliveries // phases - len(new))
            chance.shuffle(lot)
            await send(front.url, lot)
            await front.settled()
        runs = await front.runs()
        await front.walk()
        assert await front.runs() == runs
        return {bench.activity_id: bench.gains for bench in benches}, runs


async def test_one_run_a_real_change(tmp_path: Path, opened: Database) -> None:
    changes, runs = await storm(tmp_path, opened, activities=100, phases=4, deliveries=10_000)
    assert runs == changes


steps = st.lists(st.sampled_from(["gain", "lose", "send", "walk"]), max_size=8)
fates = st.lists(st.sampled_from(["drop", "once", "twice", "late"]), max_size=40)


@given(steps=steps, fates=fates, seed=st.integers(0, 2**16))
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_became_of_the_deliveries_a_walk_makes_it_good(
    steps: list[str], fates: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory, server_url: str
) -> None:
    asyncio.run(_sequence(steps, fates, seed, tmp_path_factory.mktemp("sequence"), server_url))


async def _sequence(steps: list[str], fates: list[str], seed: int, directory: Path, server_url: str) -> None:
    """Every input and image that is linked at the end has been run, and no run was for nothing."""
    from tests.conftest import fresh_database

    async with fresh_database(server_url) as url:
        database = await Database.open(url, "the test database")
        await database.migrate()
        async with Sandbox(directory) as sandbox, triggers(sandbox, database, directory) as front:
            project_id = str(sandbox.admin.create_project("Sequence")["_id"])
            bench = Bench(sandbox, project_id)
            bench.begin()
            await _play(bench, front, steps, fates, random.Random(seed))  # noqa: S311 repeatable
            await front.walk()
            ran = await front.watch_list.ran(bench.activity_id)
            assert set(bench.inputs) <= frozenset().union(*ran)
            for number, run in enumerate(ran):
                assert run - frozenset().union(*ran[:number]), "a run that gained nothing"
            assert 1 <= len(ran) <= bench.gains
            await front.walk()
            assert len(await front.watch_list.ran(bench.activity_id)) == len(ran)
        await database.close()


async def _play(bench: Bench, front: Triggers, steps: list[str], fates: list[str], chance: random.Random) -> None:
    late: list[Delivery] = []
    told = 0
    fate = iter(fates)
    for step in [*steps, "send"]:
        match step:
            case "gain":
                bench.gain()
            case "lose":
                bench.lose()
            case "walk":
                await front.walk()
            case "send":
                now, late = late, []
                for delivery in bench.deliveries[told:]:
                    became = next(fate, "once")
                    now += [delivery] * {"drop": 0, "once": 1, "twice": 2, "late": 0}[became]
                    late += [delivery] * (became == "late")
                told = len(bench.deliveries)
                chance.shuffle(now)
                await send(front.url, now)
                if chance.random() < 0.5:
                    await front.settled()


async def test_an_upload_that_ends_is_noticed_without_a_webhook(
    tmp_path: Path, opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_UPLOAD_LOOK_SECONDS", 0.2)
    async with Sandbox(tmp_path / "sandbox") as sandbox, triggers(sandbox, opened, tmp_path) as front:
        admin = sandbox.admin
        project_id = str(admin.create_project("Slow")["_id"])
        slow = admin.in_progress_revision(project_id, "slow.csv")
        image = admin.create_revision(project_id, "image.sif", "x")["_id"]
        activity_id = str(admin.create_activity(project_id, "Slow", [slow["_id"]], [image])["_id"])
        body = {"rel": "inputs", "entity_id": activity_id, "target_id": slow["_id"]}
        await send(front.url, [Delivery("POST", body)])

        async def reasons() -> tuple[str, ...]:
            look = await front.watch_list.last_look(activity_id)
            return look.reasons if look else ()

        while await reasons() != ("waiting for slow.csv to finish uploading",):  # noqa: ASYNC110 a database has no event
            await asyncio.sleep(0.02)
        assert await front.runs() == {}
        revision = admin._entity(slow["_id"])
        admin._write(revision, b"whole now")
        sandbox.uploads.complete(admin.service, revision)
        await front.settled()
        assert await front.runs() == {activity_id: 1}
