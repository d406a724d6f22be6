"""The queries and what they promise, on the embedded PostgreSQL and on Debian's server alike."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from importlib import resources

import asyncpg
import pytest

from agent.db import database as database_module
from agent.db.database import Database
from agent.db.jobs import Claim, Jobs, LeaseLost
from agent.db.migrate import migrations
from agent.db.outputs import Kind, Output, Outputs
from agent.db.watched import WatchList
from agent.domain.activity import Activity
from agent.domain.decide import Limits, decide
from agent.domain.job import TERMINAL, Done, NotYet, Plan, PlannedFile, State, Verdict
from agent.domain.webhook import Hint
from agent.errors import DatabaseError

IMAGE = PlannedFile("image-1", "Revision", "a.sif", "a.sif")
PLAN = Plan(inputs=(PlannedFile("input-1", "Revision", "a.csv", "a.csv"),), related=(IMAGE,), image=IMAGE)
LIVE = sorted(set(State) - TERMINAL)


def activity(activity_id: str = "activity-1") -> Activity:
    return Activity(activity_id, 0, "An activity", "project-1", (), ())


async def claim_one(jobs: Jobs, *states: State, lease_seconds: float = 30) -> Claim:
    claims = await jobs.claim(states or LIVE, 1, lease_seconds, "tests")
    assert len(claims) == 1
    return claims[0]


async def walk_to_the_end(jobs: Jobs) -> None:
    for _ in range(10):
        claims = await jobs.claim(LIVE, 1, 30, "tests")
        if not claims:
            return
        done = Done(verdict=Verdict.SUCCEEDED) if claims[0].job.state is State.RUNNING else Done()
        await jobs.move(claims[0], decide(claims[0].job, done, Limits()))


async def test_every_query_can_be_prepared(database: Database) -> None:
    text = resources.files("agent.db").joinpath("queries.sql").read_text()
    names = re.findall(r"^-- name: (\w+)", text, re.MULTILINE)
    assert len(names) > 20
    async with database.connection() as connection:
        for name in names:
            await connection.prepare(getattr(database_module._QUERIES, name).sql)


async def test_a_query_is_one_statement_and_leaves_no_transaction_open(database_url: str) -> None:
    database = await Database.open(database_url, "tests", size=1)
    sent: list[str] = []
    try:
        async with database.connection() as connection:
            connection.add_query_logger(lambda each: sent.append(each.query))
        async with database.connection() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        async with database.connection() as connection:
            await connection.execute("BEGIN")
        async with database.connection() as connection:
            assert not connection.is_in_transaction()
    finally:
        await database.close()
    assert sent == ["SELECT 1", "BEGIN", "ROLLBACK"]


async def test_no_query_is_compiled(database: Database) -> None:
    """With a thousand queued jobs a claim is thought dear enough for that, and takes 0.4 s instead of 0.1 ms."""
    async with database.connection() as connection:
        await connection.execute("SET jit_above_cost = 0")
        plan = await connection.fetch("EXPLAIN (ANALYZE) SELECT count(*) FROM jobs WHERE state = 'queued'")
    assert not any("JIT" in row[0] for row in plan)


async def test_every_query_says_what_it_is_for() -> None:
    text = resources.files("agent.db").joinpath("queries.sql").read_text()
    for block in text.split("-- name: ")[1:]:
        assert re.match(r"\w+[$^!<]*!?\n-- [A-Z].+\.", block), block.splitlines()[0]


async def test_the_states_of_the_table_are_those_of_the_domain(database: Database) -> None:
    async with database.connection() as connection:
        check = await connection.fetchval(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'jobs_state_check'"
        )
    assert set(re.findall(r"'(\w+)'", check)) == set(State)


async def test_migrating_twice_does_nothing(database: Database) -> None:
    assert await database.migrate() == []
    await database.check()


async def test_agents_that_start_together_migrate_once(empty_database_url: str) -> None:
    opened = [await Database.open(empty_database_url, "test", size=1) for _ in range(4)]
    try:
        applied = await asyncio.gather(*(each.migrate() for each in opened))
        assert sorted(len(each) for each in applied) == [0, 0, 0, len(migrations())]
    finally:
        for each in opened:
            await each.close()


async def test_a_schema_that_is_older_or_newer_is_told(empty_database_url: str) -> None:
    opened = await Database.open(empty_database_url, "test")
    try:
        with pytest.raises(DatabaseError, match="run `ovation-agent migrate`"):
            await opened.check()
        await opened.migrate()
        async with opened.connection() as connection:
            await connection.execute("INSERT INTO schema_migrations (number, name) VALUES (9999, 'future')")
        with pytest.raises(DatabaseError, match="upgrade the agent"):
            await opened.check()
    finally:
        await opened.close()


async def test_a_server_that_is_away_is_named_without_its_password() -> None:
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1:1/agent cannot be reached") as error:
        await Database.open("postgresql://me:hunter2@127.0.0.1:1/agent", "127.0.0.1:1/agent")
    assert "hunter2" not in str(error.value)


async def test_a_hint_makes_an_entity_due_after_the_quiet_time(database: Database) -> None:
    watch_list = WatchList(database)
    await watch_list.hint([Hint("activity-1", "Activity", None)], settle_seconds=60)
    assert await watch_list.claim(10, 30, "tests") == []
    await watch_list.hint([Hint("activity-1", "Activity", 4)], settle_seconds=0)
    [watched] = await watch_list.claim(10, 30, "tests")
    assert (watched.entity_id, watched.organization) == ("activity-1", 4)
    assert await watch_list.claim(10, 30, "tests") == []
    look = await watch_list.last_look("activity-1")
    assert look is not None
    assert len(look.deliveries) == 2


async def test_what_never_comes_to_rest_is_looked_at_all_the_same(database: Database) -> None:
    watch_list = WatchList(database)
    hint = Hint("activity-1", "Activity", 0)

    async def due_in() -> float:
        await watch_list.hint([hint], settle_seconds=60, longest_seconds=100)
        async with database.connection() as connection:
            await connection.execute("UPDATE watched SET unquiet_since = unquiet_since - interval '30 seconds'")
        look = await watch_list.last_look("activity-1")
        assert look is not None
        assert look.due_at is not None
        return (look.due_at - datetime.now(UTC)).total_seconds()

    waits = [await due_in() for _ in range(5)]
    assert [round(wait, -1) for wait in waits] == [60, 60, 40, 10, -20]
    [watched] = await watch_list.claim(1, 30, "tests")
    await watch_list.judged(watched)
    assert round(await due_in(), -1) == 60


async def test_a_hint_during_a_look_is_not_lost(database: Database) -> None:
    watch_list = WatchList(database)
    hint = Hint("activity-1", "Activity", 0)
    await watch_list.hint([hint], settle_seconds=0)
    [watched] = await watch_list.claim(10, 30, "tests")
    await watch_list.hint([hint], settle_seconds=0)
    await watch_list.judged(watched, reasons=("nothing new",))
    assert [each.entity_id for each in await watch_list.claim(10, 30, "tests")] == ["activity-1"]


async def test_a_look_whose_lease_ran_out_changes_nothing(database: Database) -> None:
    watch_list = WatchList(database)
    await watch_list.hint([Hint("activity-1", "Activity", 0)], settle_seconds=0)
    [late] = await watch_list.claim(10, 0, "tests")
    [now] = await watch_list.claim(10, 30, "tests")
    await watch_list.judged(late, reasons=("from the past",))
    await watch_list.judged(now, reasons=("from now",))
    look = await watch_list.last_look("activity-1")
    assert look is not None
    assert look.reasons == ("from now",)


async def test_one_live_job_an_activity_also_when_many_ask_at_once(database: Database) -> None:
    watch_list = WatchList(database)
    started = await asyncio.gather(*(watch_list.start(activity(), PLAN, "webhook") for _ in range(6)))
    assert sum(made for _, made in started) == 1
    assert len({job.id for job, _ in started}) == 1
    other, made = await watch_list.start(activity("activity-2"), PLAN, "webhook")
    assert made
    assert other.run == 1


async def test_runs_of_an_activity_are_numbered(database: Database) -> None:
    watch_list, jobs = WatchList(database), Jobs(database)
    numbers = []
    for _ in range(3):
        job, made = await watch_list.start(activity(), PLAN, "rerun")
        assert made
        numbers.append(job.run)
        await walk_to_the_end(jobs)
    assert numbers == [1, 2, 3]
    assert await watch_list.ran("activity-1") == [frozenset({"input-1", "image-1"})] * 3


async def test_the_end_of_a_run_has_its_activity_looked_at_again(database: Database) -> None:
    watch_list, jobs = WatchList(database), Jobs(database)
    await watch_list.hint([Hint("activity-1", "Activity", 0)], settle_seconds=0)
    [watched] = await watch_list.claim(1, 30, "tests")
    await watch_list.start(activity(), PLAN, "webhook")
    await watch_list.judged(watched)
    assert await watch_list.claim(1, 30, "tests") == []
    await walk_to_the_end(jobs)
    assert [each.entity_id for each in await watch_list.claim(1, 30, "tests")] == ["activity-1"]


async def test_a_job_is_held_by_one(database: Database) -> None:
    watch_list, jobs = WatchList(database), Jobs(database)
    for number in range(8):
        await watch_list.start(activity(f"activity-{number}"), PLAN, "webhook")
    claims = await asyncio.gather(*(jobs.claim(LIVE, 3, 30, f"worker {number}") for number in range(4)))
    held = [claim.job.id for each in claims for claim in each]
    assert len(held) == len(set(held)) == 8


async def test_a_worker_that_slept_past_its_lease_changes_nothing(database: Database) -> None:
    jobs, outputs = Jobs(database), Outputs(database)
    await WatchList(database).start(activity(), PLAN, "webhook")
    late = await claim_one(jobs, lease_seconds=0)
    assert await jobs.lapse_leases(2) == 1
    now = await claim_one(jobs)
    assert (now.job.attempt, now.job.suspicion) == (0, 1)  # the lease that ran out is kept in mind
    move = decide(late.job, Done(), Limits())
    for write in (
        jobs.move(late, move),
        jobs.renew(late, 30),
        jobs.set_folder(late, "folder"),
        outputs.save(late, Output(Kind.LOG, "stdout.log")),
    ):
        with pytest.raises(LeaseLost):
            await write
    await jobs.progress(late, {"files_done": 99})
    found = await jobs.get(now.job.id)
    assert found is not None
    assert (found.state, found.folder_id, dict(found.progress)) == (State.QUEUED, None, {})
    await jobs.move(now, decide(now.job, Done(), Limits()))


async def test_an_agent_that_comes_back_takes_its_work_up_at_once(database: Database) -> None:
    jobs, watch_list = Jobs(database), WatchList(database)
    await watch_list.start(activity(), PLAN, "webhook")
    await watch_list.hint([Hint("activity-2", "Activity", 0)], settle_seconds=0)
    dead = (await jobs.claim(LIVE, 1, 3600, "this host"))[0]
    await watch_list.claim(1, 3600, "this host")
    await jobs.expire_leases("another host")
    assert await jobs.claim(LIVE, 1, 30, "this host") == []
    await jobs.expire_leases("this host")
    await jobs.lapse_leases(2)
    [again] = await jobs.claim(LIVE, 1, 30, "this host")
    assert (again.job.id, again.job.suspicion) == (dead.job.id, 1)
    assert len(await watch_list.claim(1, 30, "this host")) == 1


async def test_a_job_that_is_given_back_has_lost_no_attempt(database: Database) -> None:
    jobs = Jobs(database)
    await WatchList(database).start(activity(), PLAN, "webhook")
    await jobs.release(await claim_one(jobs))
    assert (await claim_one(jobs)).job.attempt == 0


async def test_a_story_tells_each_move_once(database: Database) -> None:
    jobs = Jobs(database)
    job, _ = await WatchList(database).start(activity(), PLAN, "webhook")
    for _ in range(3):
        claim = await claim_one(jobs)
        await jobs.move(claim, decide(claim.job, NotYet(0, "waiting for b.csv"), Limits()))
    claim = await claim_one(jobs)
    await jobs.move(claim, decide(claim.job, Done(), Limits()))
    events = await jobs.events(job.id)
    assert [(event.state, event.note) for event in events] == [
        (State.QUEUED, None),
        (State.QUEUED, "waiting for b.csv"),
        (State.STAGING, None),
    ]
    assert await jobs.events(job.id, after=events[-1].id) == []


async def test_asking_for_the_end_reaches_the_holder(database: Database) -> None:
    jobs = Jobs(database)
    job, _ = await WatchList(database).start(activity(), PLAN, "webhook")
    claim = await claim_one(jobs)
    assert await jobs.renew(claim, 30) is False
    assert await jobs.cancel(job.id) is True
    assert await jobs.renew(claim, 30) is True
    await jobs.release(claim)
    await walk_to_the_end(jobs)
    assert await jobs.cancel(job.id) is False


async def test_outputs_are_recorded_once_each(database: Database) -> None:
    jobs, outputs = Jobs(database), Outputs(database)
    job, _ = await WatchList(database).start(activity(), PLAN, "webhook")
    claim = await claim_one(jobs)
    first = Output(Kind.OUTPUT, "a/b.csv", entity_id="file")
    done = Output(Kind.OUTPUT, "a/b.csv", 7, "00ff", "file", "revision", uploaded=True, linked=True)
    await outputs.save(claim, first)
    await outputs.save(claim, done)
    await outputs.save(claim, Output(Kind.LOG, "a/b.csv"))
    assert await outputs.of(job.id) == {
        (Kind.OUTPUT, "a/b.csv"): done,
        (Kind.LOG, "a/b.csv"): Output(Kind.LOG, "a/b.csv"),
    }


@pytest.mark.parametrize("job_id", ["", "x", "00000000-0000-0000-0000-000000000000", "'; DROP TABLE jobs --"])
async def test_a_job_that_is_not_there_is_nothing(database: Database, job_id: str) -> None:
    assert await Jobs(database).get(job_id) is None


async def test_a_mistake_in_sql_is_not_taken_for_an_outage(database: Database) -> None:
    async with database.connection() as connection:
        with pytest.raises(asyncpg.PostgresError):
            await connection.fetch("SELECT nothing_such")
