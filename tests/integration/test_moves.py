"""Moves: in groups, each by its own fence; and under a lease that goes on."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from agent.db.database import Database, Queries, Row
from agent.db.jobs import Claim, Jobs, LeaseLost
from agent.domain.decide import Limits, decide
from agent.domain.job import Done, Move, NotYet, Outcome, State
from agent.pipeline.context import Context, Control
from tests.workers import done, machine, make_job, set_steps


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many moves were written with each statement."""
    written: list[int] = []
    rows = Queries.rows

    async def counted(self: Queries, name: str, **values: object) -> list[Row]:
        if name == "move_jobs":
            moves = values["moves"]
            assert isinstance(moves, list)
            written.append(len(moves))
        return await rows(self, name, **values)

    monkeypatch.setattr(Queries, "rows", counted)
    return written


async def claimed(database: Database, count: int) -> tuple[Jobs, list[Claim]]:
    for number in range(count):
        await make_job(database, f"activity-{number}")
    jobs = Jobs(database)
    return jobs, await jobs.claim_queued(count, 60, "here", ahead=count)


def onwards(claim: Claim) -> Move:
    return decide(claim.job, Done(), Limits())


async def states(database: Database) -> Counter[str]:
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT state, lease_until IS NULL AS is_free FROM jobs")
    return Counter(f"{row['state']}{'' if row['is_free'] else ', held'}" for row in rows)


async def test_moves_that_come_at_once_are_written_at_once(database: Database, groups: list[int]) -> None:
    jobs, claims = await claimed(database, 5)
    await asyncio.gather(*(jobs.move(claim, onwards(claim)) for claim in claims))
    assert groups == [5]
    assert await states(database) == {"staging": 5}
    for claim in claims:
        assert [event.state for event in await jobs.events(claim.job.id)] == [State.QUEUED, State.STAGING]


async def test_a_move_that_comes_while_others_are_written_is_not_left_behind(
    database: Database, groups: list[int]
) -> None:
    jobs, claims = await claimed(database, 30)

    async def move(claim: Claim, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        for _ in range(3):
            await jobs.move(claim, decide(claim.job, NotYet(0, "a reason"), Limits()), keep_seconds=60)

    async with asyncio.timeout(20):
        await asyncio.gather(*(move(claim, number) for number, claim in enumerate(claims)))
    assert sum(groups) == 90


async def test_each_move_has_its_own_fence(database: Database, groups: list[int]) -> None:
    jobs, claims = await claimed(database, 3)
    claims[1] = replace(claims[1], token=claims[1].token - 1)
    found = await asyncio.gather(*(jobs.move(claim, onwards(claim)) for claim in claims), return_exceptions=True)
    assert groups == [3]
    assert [type(each) for each in found] == [type(None), LeaseLost, type(None)]
    assert await states(database) == {"staging": 2, "queued, held": 1}


async def test_a_move_that_cannot_be_written_fails_alone(database: Database) -> None:
    jobs, claims = await claimed(database, 5)
    notes = [None, None, "\0", None, None]
    moves = [jobs.move(claim, onwards(claim), note=note) for claim, note in zip(claims, notes, strict=True)]
    found = await asyncio.gather(*moves, return_exceptions=True)
    assert [each is None for each in found] == [True, True, False, True, True]
    assert await states(database) == {"staging": 4, "queued, held": 1}


async def test_ends_in_a_group_have_their_activities_looked_at_again(database: Database) -> None:
    jobs, claims = await claimed(database, 2)
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO watched (entity_id, entity_type, changed_at, cause)"
            " SELECT activity_id, 'Activity', now(), 'webhook' FROM jobs"
        )
        await connection.execute("UPDATE jobs SET state = 'reporting' WHERE activity_id = 'activity-0'")
    ends = next(claim for claim in claims if claim.job.activity_id == "activity-0")
    goes_on = next(claim for claim in claims if claim is not ends)
    ends = replace(ends, job=replace(ends.job, state=State.REPORTING))
    await asyncio.gather(jobs.move(ends, onwards(ends)), jobs.move(goes_on, onwards(goes_on)))
    async with database.connection() as connection:
        due = await connection.fetch("SELECT entity_id FROM watched WHERE due_at IS NOT NULL")
    assert [row["entity_id"] for row in due] == ["activity-0"]


async def test_a_lease_that_goes_on_is_the_same_one(database: Database) -> None:
    jobs, [claim] = await claimed(database, 1)
    kept = await jobs.move(claim, onwards(claim), keep_seconds=60)
    assert kept is not None
    assert (kept.token, kept.job.state) == (claim.token, State.STAGING)
    assert await states(database) == {"staging, held": 1}
    stands = await jobs.get(claim.job.id)
    assert stands is not None
    assert replace(kept.job, host=None) == replace(stands, host=None, progress=kept.job.progress)
    await jobs.release(claim)  # also by who has not heard that it was moved
    assert await states(database) == {"staging": 1}
    with pytest.raises(LeaseLost):
        await jobs.move(kept, onwards(kept))


async def test_that_the_end_was_asked_for_comes_with_a_lease_that_goes_on(database: Database) -> None:
    jobs, [claim] = await claimed(database, 1)
    assert await jobs.cancel(claim.job.id)
    kept = await jobs.move(claim, onwards(claim), keep_seconds=60)
    assert kept is not None
    assert kept.job.cancel_requested


async def test_a_job_that_waits_for_nobody_has_one_lease_to_its_end(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_steps(monkeypatch, {})
    async with machine(database) as here:
        await here.reach(await make_job(database, "first"), State.SUCCEEDED)  # by now nobody is known to wait
        job_id = await make_job(database, "second")
        here.worker.wake()
        await here.reach(job_id, State.SUCCEEDED)
        async with database.connection() as connection:
            tokens = await connection.fetchval("SELECT lease_token FROM jobs WHERE activity_id = 'second'")
    assert 1 <= tokens <= 3  # a look for what fell due may come between


async def test_no_stage_has_more_jobs_than_places(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {State.QUEUED: State.STAGING, State.LAUNCHING: State.RUNNING, State.COLLECTING: State.REPORTING}
    at_once, most = Counter[State](), Counter[State]()

    async def work(context: Context, claim: Claim, control: Control) -> Outcome:
        stage = stages.get(claim.job.state, claim.job.state)
        at_once[stage] += 1
        most[stage] = max(most[stage], at_once[stage])
        await asyncio.sleep(0.002)
        at_once[stage] -= 1
        return await done(context, claim, control)

    set_steps(monkeypatch, dict.fromkeys(State, work))
    job_ids = [await make_job(database, str(number)) for number in range(40)]
    async with machine(database, max_staging=3, max_running=2, max_collecting=1) as here:
        for job_id in job_ids:
            await here.reach(job_id, State.SUCCEEDED)
    assert most == {State.STAGING: 3, State.RUNNING: 2, State.REPORTING: 1}
