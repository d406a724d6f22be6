"""Leases and fences: workers on a real PostgreSQL whose steps are the tests' own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from agent.db.database import Database, Queries, Row
from agent.db.jobs import Claim, Jobs, LeaseLost
from agent.domain.decide import Limits
from agent.domain.job import Done, Move, NotYet, Outage, Outcome, State, Verdict
from agent.pipeline.context import Context, Control
from tests.workers import Machine, done, machine, make_job, migrated, set_steps, until

ANSWERS_NO_MORE = "the agent that worked on it stopped answering"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    async with migrated(database_url) as opened:
        yield opened


async def test_a_lease_is_kept_while_the_step_runs(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    began = Counter[str]()

    async def long(_context: Context, claim: Claim, _control: Control) -> Outcome:
        began[claim.job.id] += 1
        await asyncio.sleep(3)  # two leases
        return Done()

    set_steps(monkeypatch, {State.STAGING: long})
    async with machine(database, lease_seconds=1.5) as here, machine(database, "there", lease_seconds=1.5):
        job_id = await make_job(database, "a")
        await here.reach(job_id, State.SUCCEEDED)
        assert ANSWERS_NO_MORE not in {event.note for event in await here.jobs.events(job_id)}
    assert began == {job_id: 1}


async def test_an_agent_that_was_asleep_goes_on_with_what_nobody_took(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = Counter[str]()

    async def long(_context: Context, claim: Claim, _control: Control) -> Outcome:
        began[claim.job.id] += 1
        await asyncio.sleep(1.5)
        return Done()

    set_steps(monkeypatch, {State.STAGING: long})
    async with machine(database, lease_seconds=1.5) as here:
        job_id = await make_job(database, "a")
        await until(lambda: _is_held(here, job_id, State.STAGING), "it is being staged")
        async with database.connection() as connection:
            await connection.execute("UPDATE jobs SET lease_until = now() - interval '1 hour'")
        here.worker.wake()
        assert (await here.reach(job_id, State.SUCCEEDED)).suspicion == 0
        assert ANSWERS_NO_MORE not in {event.note for event in await here.jobs.events(job_id)}
    assert began == {job_id: 1}


async def test_a_job_that_is_claimed_anew_before_its_former_step_has_returned_is_held(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most = 0, 0

    async def count(_context: Context, _claim: Claim, _control: Control) -> Outcome:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.3)
        at_once -= 1
        return Done()

    set_steps(monkeypatch, {State.LAUNCHING: count})
    async with machine(database, max_running=1, max_staging=3) as here:
        move = here.jobs.move

        async def move_slowly(claim: Claim, to: Move, **told: object) -> Claim | None:
            kept = await move(claim, to, **told)  # type: ignore[arg-type]
            here.worker.wake()
            await asyncio.sleep(0.15)  # it is committed, and the answer takes its time
            return kept

        monkeypatch.setattr(here.jobs, "move", move_slowly)
        job_ids = [await make_job(database, str(number)) for number in range(3)]
        for job_id in job_ids:
            await here.reach(job_id, State.SUCCEEDED)
    assert most == 1


async def test_a_step_whose_lease_was_lost_unnoticed_is_over_before_its_job_is_begun_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most, began = 0, 0, 0

    async def long(_context: Context, _claim: Claim, _control: Control) -> Outcome:
        nonlocal at_once, most, began
        at_once, began = at_once + 1, began + 1
        most = max(most, at_once)
        try:
            await asyncio.sleep(1.0)
        finally:
            at_once -= 1
        return Done()

    set_steps(monkeypatch, {State.REPORTING: long})
    async with machine(database) as here:
        job_id = await make_job(database, "a")
        await until(lambda: _is_held(here, job_id, State.REPORTING), "it is being told")
        async with database.connection() as connection:  # as another agent does, while this one is asleep
            await connection.execute(
                "UPDATE jobs SET lease_until = NULL, lease_holder = NULL, lease_token = lease_token + 1"
            )
        here.worker._wake_for_books()
        await here.reach(job_id, State.SUCCEEDED)
    assert (began, most) == (2, 1)


async def test_what_a_worker_has_lost_is_given_back_whatever_else_it_loses_meanwhile(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(_context: Context, _claim: Claim, _control: Control) -> Outcome:
        return NotYet(3600, "the test says so")

    set_steps(monkeypatch, {State.QUEUED: work})
    job_ids = [await make_job(database, str(number)) for number in range(2)]
    here = Machine(database, "here")
    await here.start()
    await here.stop()
    first, second = await here.jobs.claim_queued(2, 60, "here", ahead=9)
    release = here.jobs.release

    to_lose = [second]

    async def release_and_lose(claim: Claim) -> None:
        await release(claim)
        here.worker._lost += to_lose
        to_lose.clear()

    monkeypatch.setattr(here.jobs, "release", release_and_lose)
    here.worker._lost.append(first)
    await here.worker._tidy()
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM jobs WHERE lease_until IS NOT NULL") == 0
    assert len(job_ids) == 2


async def test_a_wait_is_over_for_whoever_is_to_end(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end was asked for through another agent, just before the step found that it has to wait."""

    async def wait(_context: Context, claim: Claim, _control: Control) -> Outcome:
        await here.jobs.cancel(claim.job.id)
        return Outage("Ovation", "it asked to be left alone", seconds=600)

    set_steps(monkeypatch, {State.STAGING: wait})
    async with machine(database) as here:
        job_id = await make_job(database, "a")
        await here.reach(job_id, State.CANCELLED)


async def test_work_that_is_found_when_the_agent_is_to_stop_is_not_begun(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = Counter[State]()

    async def work(context: Context, claim: Claim, control: Control) -> Outcome:
        began[claim.job.state] += 1
        return await done(context, claim, control)

    set_steps(monkeypatch, dict.fromkeys(State, work))
    async with machine(database) as here:
        claim_queued, asked = here.jobs.claim_queued, asyncio.Event()

        async def claim_slowly(*arguments: object, **options: object) -> list[Claim]:
            claims = await claim_queued(*arguments, **options)  # type: ignore[arg-type]
            if claims:
                asked.set()
                await asyncio.sleep(0.2)
            return claims

        monkeypatch.setattr(here.jobs, "claim_queued", claim_slowly)
        job_id = await make_job(database, "a")
        await asyncio.wait_for(asked.wait(), 10)
        await here.worker.drain(5, asyncio.Event())

        async def is_free() -> bool:
            async with database.connection() as connection:
                return bool(await connection.fetchval("SELECT lease_until IS NULL FROM jobs"))

        await until(is_free, "it is given back")
        assert (await here.job(job_id)).state is State.QUEUED
    assert began == {}
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT stopped_at IS NOT NULL FROM agents")


async def test_a_worker_that_is_woken_and_cancelled_at_once_ends(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_steps(monkeypatch, {})
    monkeypatch.setattr("agent.pipeline.worker._IDLE_SECONDS", 60.0)
    for _ in range(5):
        here = Machine(database, "here")
        await here.start()
        await asyncio.sleep(0.2)  # it waits for something to do
        here.worker.wake()
        async with asyncio.timeout(5):
            await here.stop()


async def test_a_step_may_end_while_the_agent_drains_and_a_watch_is_given_back_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = asyncio.Event()

    async def slow(context: Context, claim: Claim, control: Control) -> Outcome:
        if claim.job.activity_id == "stages":
            await goes_on.wait()
        return await done(context, claim, control)

    async def watch(_context: Context, _claim: Claim, _control: Control) -> Outcome:
        await asyncio.sleep(60)
        return Done(verdict=Verdict.SUCCEEDED)

    set_steps(monkeypatch, {State.STAGING: slow, State.RUNNING: watch})
    async with machine(database, limits=Limits()) as here:
        runs = await make_job(database, "runs")
        await here.reach(runs, State.RUNNING)
        stages = await make_job(database, "stages")
        await here.reach(stages, State.STAGING)
        await until(lambda: _is_held(here, stages, State.STAGING), "it is being staged")
        draining = asyncio.create_task(here.worker.drain(20, asyncio.Event()))

        async def is_free() -> bool:
            async with database.connection() as connection:
                return bool(await connection.fetchval("SELECT lease_until IS NULL FROM jobs WHERE id = $1", runs))

        await until(is_free, "the watch is given back, while the other step is still worked at")
        goes_on.set()
        await draining
    assert (await here.job(stages)).state is State.LAUNCHING
    assert (await here.job(runs)).state is State.RUNNING
    assert ANSWERS_NO_MORE not in {event.note for event in await here.jobs.events(runs)}


async def _is_held(here: Machine, job_id: str, state: State) -> bool:
    held = here.worker._held.get(job_id)
    return held is not None and held.claim.job.state is state


async def test_leases_are_kept_in_groups_and_each_by_its_own_fence(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(database)
    for number in range(5):
        await make_job(database, f"a{number}")
    claims = await jobs.claim_queued(5, 30, "here", ahead=5)
    assert len(claims) == 5
    asked: list[str] = []
    rows = Queries.rows

    async def counted(self: Queries, name: str, **values: object) -> list[Row]:
        asked.append(name)
        return await rows(self, name, **values)

    monkeypatch.setattr(Queries, "rows", counted)
    await jobs.cancel(claims[1].job.id)
    gone = replace(claims[2], token=claims[2].token + 1)
    kept = await asyncio.gather(
        *(jobs.renew(claim, 600) for claim in (claims[0], claims[1], gone, *claims[3:])), return_exceptions=True
    )
    assert asked == ["renew_leases"]
    assert [kept[0], kept[1], *kept[3:]] == [False, True, False, False]
    assert isinstance(kept[2], LeaseLost)
    async with database.connection() as connection:
        far = await connection.fetch("SELECT activity_id FROM jobs WHERE lease_until > now() + interval '5 minutes'")
    assert {row["activity_id"] for row in far} == {claim.job.activity_id for claim in claims if claim is not claims[2]}
