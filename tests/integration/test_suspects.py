"""A job whose steps keep killing the process is set aside, and the rest go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent.db.database import Database
from agent.db.jobs import Claim, Jobs, LeaseLost
from agent.domain.decide import Limits
from agent.domain.job import TERMINAL, FaultClass, Outcome, State, Verdict
from agent.pipeline.context import Context, Control
from tests.workers import Machine, done, machine, make_job, migrated, set_steps, until

QUICK = Limits(probation_seconds=0.3)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    async with migrated(database_url) as opened:
        yield opened


class Patient:
    """An agent that is started again whenever it dies."""

    def __init__(self, database: Database, limits: Limits = QUICK, **settings: Any) -> None:
        self.database = database
        self.killed = asyncio.Event()
        self.machine = Machine(database, "here", limits, **settings)
        self.ends: list[str] = []  # in which order jobs ended

    async def kill(self) -> None:
        """A step ends the process: nothing after this is done by anybody."""
        self.killed.set()
        await asyncio.get_running_loop().create_future()

    async def run(self, job_ids: list[str], seconds: float = 30) -> int:
        """Work until these jobs have ended, and return how often the process died."""
        deadline = time.monotonic() + seconds
        await self.machine.start()
        try:
            while not await self._have_ended(job_ids):
                assert time.monotonic() < deadline, [await self.machine.job(job_id) for job_id in job_ids]
                if self.killed.is_set():
                    await self.machine.die()
                    self.killed.clear()
                    await self.machine.start()
                await asyncio.sleep(0.02)
        finally:
            await self.machine.stop()
        return self.machine.deaths

    async def _have_ended(self, job_ids: list[str]) -> bool:
        for job_id in job_ids:
            if job_id not in self.ends and (await self.machine.job(job_id)).state in TERMINAL:
                self.ends.append(job_id)
        return len(self.ends) == len(job_ids)


@pytest.mark.parametrize("state", [State.STAGING, State.LAUNCHING])
async def test_a_job_that_keeps_killing_the_process_is_set_aside_and_the_rest_go_on(
    database: Database, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    agent = Patient(database, max_staging=4, max_running=4)

    async def work(context: Context, claim: Claim, control: Control) -> Outcome:
        if claim.job.activity_name == "killer":
            await asyncio.sleep(0.1)
            await agent.kill()
        await asyncio.sleep(0.25)  # so that they are held when it dies
        return await done(context, claim, control)

    set_steps(monkeypatch, {state: work})
    innocent = [await make_job(database, f"innocent {number}") for number in range(3)]
    killer = await make_job(database, "killer")
    innocent += [await make_job(database, f"innocent {number}") for number in range(3, 6)]
    deaths = await agent.run([*innocent, killer])
    job = await agent.machine.job(killer)
    assert (job.state, job.verdict) == (State.FAILED, Verdict.FAILED)
    assert job.fault is not None
    assert job.fault.cls is FaultClass.AGENT
    assert deaths == QUICK.suspicion
    for job_id in innocent:
        assert (await agent.machine.job(job_id)).state is State.SUCCEEDED


async def test_a_job_that_kills_the_process_only_after_a_while_is_set_aside_too(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It outlives its first trials, and others are worked at beside it when it kills."""
    agent = Patient(database, Limits(probation_seconds=0.1), max_staging=4)

    async def work(context: Context, claim: Claim, control: Control) -> Outcome:
        if claim.job.activity_name == "killer":
            await asyncio.sleep(0.7)
            await agent.kill()
        await asyncio.sleep(1.2)
        return await done(context, claim, control)

    set_steps(monkeypatch, {State.STAGING: work})
    killer = await make_job(database, "killer")
    innocent = [await make_job(database, f"innocent {number}") for number in range(2)]
    await agent.run([*innocent, killer])
    job = await agent.machine.job(killer)
    assert job.state is State.FAILED
    assert job.fault is not None
    assert job.fault.cls is FaultClass.AGENT
    for job_id in innocent:
        assert (await agent.machine.job(job_id)).state is State.SUCCEEDED


async def test_a_delivery_that_keeps_killing_the_process_ends_failed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Patient(database)

    async def collect(context: Context, claim: Claim, control: Control) -> Outcome:
        if claim.job.activity_name == "killer":
            await agent.kill()
        return await done(context, claim, control)

    set_steps(monkeypatch, {State.COLLECTING: collect})
    killer, other = await make_job(database, "killer"), await make_job(database, "other")
    await agent.run([killer, other])
    job = await agent.machine.job(killer)
    assert (job.state, job.verdict) == (State.FAILED, Verdict.FAILED)
    assert job.fault is not None
    assert job.fault.cls is FaultClass.AGENT
    assert job.exit_code == 0
    assert (await agent.machine.job(other)).state is State.SUCCEEDED


async def test_a_death_by_chance_costs_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Patient(database, max_staging=4)
    left = 1

    async def work(context: Context, claim: Claim, control: Control) -> Outcome:
        nonlocal left
        await asyncio.sleep(0.1)
        if left:
            left -= 1
            await agent.kill()
        return await done(context, claim, control)

    set_steps(monkeypatch, {State.STAGING: work})
    job_ids = [await make_job(database, str(number)) for number in range(4)]
    assert await agent.run(job_ids) == 1
    for job_id in job_ids:
        job = await agent.machine.job(job_id)
        assert (job.state, job.attempt, job.suspicion) == (State.SUCCEEDED, 0, 0)


async def test_suspects_and_a_long_innocent_step_do_not_wait_for_each_other(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is kept from working for longer than a trial lasts, and no suspect for ever."""
    agent = Patient(database, max_staging=4)
    long_began: list[float] = []

    async def work(context: Context, claim: Claim, control: Control) -> Outcome:
        if claim.job.activity_name == "long":
            long_began.append(time.monotonic())
            await asyncio.sleep(4 if agent.machine.deaths >= 2 else 60)
        elif agent.machine.deaths < 2:
            await asyncio.sleep(0.1)
            await agent.kill()
        return await done(context, claim, control)

    set_steps(monkeypatch, {State.STAGING: work})
    long = await make_job(database, "long")
    short = [await make_job(database, f"short {number}") for number in range(3)]
    assert await agent.run([long, *short]) == 2
    assert agent.ends[-1] == long


async def test_a_suspect_that_another_agent_saw_fall_asleep_goes_on(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that slept twice is not told by a death of its own that what it has is under suspicion."""
    monkeypatch.setattr("agent.pipeline.worker._SEEN_SECONDS", 0.5)
    sleeps = asyncio.Event()

    async def work(context: Context, claim: Claim, control: Control) -> Outcome:
        if not sleeps.is_set():
            await asyncio.sleep(60)
        return await done(context, claim, control)

    set_steps(monkeypatch, {State.STAGING: work})
    async with machine(database, limits=QUICK) as here:
        job_id = await make_job(database, "a")
        await here.reach(job_id, State.STAGING)

        async def is_held() -> bool:
            return job_id in here.worker._held and (await here.job(job_id)).state is State.STAGING

        await until(is_held, "it is being staged")
        async with database.connection() as connection:
            # What two sleeps come to, when another agent saw the lease run out each time.
            await connection.execute(
                "UPDATE jobs SET suspicion = 2, lease_until = NULL, lease_holder = NULL, lease_token = lease_token + 1"
            )
        sleeps.set()
        await here.reach(job_id, State.SUCCEEDED)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Who was held, as suspicion, whether on trial, and state; and what each is suspected of then.
        ([(0, False, "staging"), (1, False, "collecting")], [1, 2]),
        ([(5, False, "staging"), (2, False, "staging")], [5, 3]),
        ([(2, True, "staging"), (2, False, "staging"), (0, False, "launching")], [3, 2, 0]),
        ([(5, True, "staging"), (2, False, "staging")], [5, 2]),
        ([(5, True, "staging")], [6]),
        ([(5, True, "staging"), (0, False, "running")], [6, 0]),
        ([(0, False, "running")], [0]),
    ],
)
async def test_who_is_suspected_of_a_death(
    database: Database, before: list[tuple[int, bool, str]], after: list[int]
) -> None:
    jobs = Jobs(database)
    job_ids = [await make_job(database, str(number)) for number in range(len(before))]
    elsewhere = await make_job(database, "held by another agent")
    held = {claim.job.id: claim for claim in await jobs.claim_queued(9, 60, "here", ahead=9)}
    async with database.connection() as connection:
        for job_id, (suspicion, alone, state) in zip(job_ids, before, strict=True):
            values = "suspicion = $2, alone = $3, state = $4"
            await connection.execute(f"UPDATE jobs SET {values} WHERE id = $1", job_id, suspicion, alone, state)  # noqa: S608
        await connection.execute("UPDATE jobs SET lease_holder = 'there' WHERE id = $1", elsewhere)
    await jobs.expire_leases("here")
    assert await jobs.lapse_leases() == len(before)
    found = [await jobs.get(job_id) for job_id in (*job_ids, elsewhere)]
    assert [job.suspicion for job in found if job] == [*after, 0]
    for job_id in job_ids:
        with pytest.raises(LeaseLost):
            await jobs.renew(held[job_id], 60)
    assert await jobs.renew(held[elsewhere], 60) is False


async def test_the_worst_suspect_is_tried_first_and_apart_from_the_others(database: Database) -> None:
    jobs = Jobs(database)
    job_ids = [await make_job(database, str(number)) for number in range(4)]
    async with database.connection() as connection:
        for job_id, suspicion in zip(job_ids, (1, 2, 5, 3), strict=True):
            await connection.execute("UPDATE jobs SET suspicion = $2 WHERE id = $1", job_id, suspicion)
    assert [claim.job.suspicion for claim in await jobs.claim([State.QUEUED], 9, 60, "here")] == [1]
    trials = [await jobs.claim([State.QUEUED], 1, 60, "here", alone=True) for _ in range(3)]
    assert [[claim.job.suspicion for claim in claims] for claims in trials] == [[5], [3], [2]]
