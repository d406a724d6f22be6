"""Who is let in next, and what asking that costs when very many wait."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from importlib import resources
from typing import Any

import pytest

from agent.db import database as database_module
from agent.db.database import Database
from agent.db.jobs import Claim, Jobs
from agent.domain.decide import Limits, decide
from agent.domain.job import Done, NotYet, Outcome, State
from agent.pipeline.context import Context, Control
from tests.workers import done, machine, make_job, migrated, set_steps

AHEAD = 6


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    async with migrated(database_url) as opened:
        yield opened


async def let_in(jobs: Jobs, most: int, place: str = "here", ahead: int = AHEAD) -> list[Claim]:
    """Take queued jobs as a worker does."""
    return await jobs.claim_queued(most, 30, place, ahead=ahead)


async def go_on(jobs: Jobs, claim: Claim, outcome: Outcome | None = None) -> None:
    """Move a job on to its next state."""
    await jobs.move(claim, decide(claim.job, outcome or Done(), Limits()))


async def test_a_thousand_jobs_of_one_project_do_not_starve_one_of_another(database: Database) -> None:
    jobs = Jobs(database)
    many = [await make_job(database, f"many {number}", "project-1") for number in range(300)]
    one = await make_job(database, "one", "project-2")
    first = await let_in(jobs, 2)
    assert {claim.job.id for claim in first} == {many[0], one}


async def test_a_project_that_has_jobs_under_way_lets_others_go_first(database: Database) -> None:
    jobs = Jobs(database)
    for number in range(10):
        await make_job(database, f"many {number}", "project-1")
    for claim in await let_in(jobs, 4):
        await go_on(jobs, claim)
    one, two = [await make_job(database, name, "project-2") for name in ("one", "two")]
    assert [claim.job.id for claim in await let_in(jobs, 1)] == [one]
    assert [claim.job.id for claim in await let_in(jobs, 1)] == [two]


async def test_projects_take_turns(database: Database) -> None:
    jobs = Jobs(database)
    for project, count in (("a", 50), ("b", 7), ("c", 2)):
        for number in range(count):
            await make_job(database, f"{project} {number}", project)
    turns = []
    while claims := await let_in(jobs, 1, ahead=100):
        turns.append(claims[0].job.project_id)
        await go_on(jobs, claims[0])
    assert Counter(turns[:6]) == {"a": 2, "b": 2, "c": 2}
    assert Counter(turns[:16]) == {"a": 7, "b": 7, "c": 2}
    assert len(turns) == 59


async def test_no_more_are_let_in_than_can_be_on_their_way(database: Database) -> None:
    jobs = Jobs(database)
    for number in range(10):
        await make_job(database, str(number))
    under_way = []
    while claims := await let_in(jobs, 2, ahead=3):
        under_way += claims
        for claim in claims:
            await go_on(jobs, claim)
    assert len(under_way) == 3
    assert len(await let_in(jobs, 2, "there", ahead=3)) == 2  # another agent has room of its own
    # What waits for something outside is in nobody's way.
    [staging] = [claim for claim in await jobs.claim([State.STAGING], 1, 30, "here") if claim]
    await go_on(jobs, staging, NotYet(60, "waiting for a.csv"))
    assert len(await let_in(jobs, 2, ahead=3)) == 1


async def test_agents_that_ask_together_let_each_in_once(database: Database) -> None:
    jobs = Jobs(database)
    for number in range(30):
        await make_job(database, str(number), f"project-{number % 4}")
    claims = await asyncio.gather(*(let_in(jobs, 8, f"place {number}", ahead=8) for number in range(3)))
    held = [claim.job.id for each in claims for claim in each]
    assert len(held) == len(set(held)) >= 8


async def test_asking_who_is_next_reads_little_of_a_long_queue(database: Database) -> None:
    jobs = Jobs(database)
    await _queue(database, 100_000, projects=1000)
    parameters = {"place": "here", "suspects_from": 2, "most": 4, "lease": timedelta(seconds=30), "ahead": AHEAD}
    text = resources.files("agent.db").joinpath("queries.sql").read_text()
    block = text.split("-- name: claim_queued")[1].split("-- name:")[0]
    names = list(dict.fromkeys(re.findall(r"(?<!:):(\w+)", re.sub(r"--.*", "", block))))
    async with database.connection() as connection:
        sql = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + database_module._QUERIES.claim_queued.sql
        [plan] = json.loads(await connection.fetchval(sql, *(parameters[name] for name in names)))
    pages = plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
    seconds = []
    for _ in range(10):  # the last ones with the plan that PostgreSQL keeps for any values
        began = time.monotonic()
        claims = await let_in(jobs, 4)
        seconds.append(time.monotonic() - began)
        for claim in claims:
            await jobs.release(claim)
    print(f"of 100,000 jobs in 1,000 Projects: {pages} pages, {min(seconds):.3f} to {max(seconds):.3f} s")  # noqa: T201
    assert "jobs_queue" in _indexes(plan["Plan"])
    assert pages < 20_000  # of each Project a few rows; the table alone has more


def _indexes(plan: dict[str, Any]) -> set[str]:
    found = {plan["Index Name"]} if "Index Name" in plan else set()
    return found.union(*(_indexes(each) for each in plan.get("Plans", [])))


async def _queue(database: Database, count: int, projects: int) -> None:
    """Have very many jobs wait, most of them in one Project."""
    async with database.connection() as connection:
        await connection.execute(
            """INSERT INTO jobs (id, organization, activity_id, activity_name, project_id, run, plan, image_name,
                image_revision_id, trigger, due_at)
            SELECT gen_random_uuid(), 0, 'activity-' || n, 'An activity',
                'project-' || CASE WHEN n % 2 = 0 THEN 0 ELSE n % $2 END, 1,
                '{"inputs": [], "related": [], "image": {"entity_id": "i", "type": "Revision", "name": "a.sif",
                "file_name": "a.sif"}}', 'a.sif', 'i', 'webhook', now() - interval '1 second' * n
            FROM generate_series(1, $1) AS n""",
            count,
            projects,
            timeout=60,
        )
        await connection.execute("ANALYZE jobs", timeout=60)


async def test_one_job_stages_while_another_runs_and_a_third_delivers(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most = Counter[State](), Counter[State]()
    together = 0

    async def work(context: Context, claim: Claim, control: Control) -> Outcome:
        nonlocal together
        state = claim.job.state
        at_once[state] += 1
        most[state] = max(most[state], at_once[state])
        together = max(together, sum(count > 0 for count in at_once.values()))
        await asyncio.sleep(0.3)
        at_once[state] -= 1
        return await done(context, claim, control)

    stages = (State.STAGING, State.RUNNING, State.COLLECTING)
    set_steps(monkeypatch, dict.fromkeys(stages, work))
    async with machine(database, max_staging=1, max_running=1, max_collecting=1) as here:
        began = time.monotonic()
        job_ids = [await make_job(database, str(number)) for number in range(5)]
        for job_id in job_ids:
            await here.reach(job_id, State.SUCCEEDED)
        seconds = time.monotonic() - began
    assert most == dict.fromkeys(stages, 1)
    assert together == len(stages)
    assert seconds < 0.3 * 5 * len(stages)  # it is less than one after the other
