"""What the promise says of the database, for whoever checks it: stories are legal, leases free, and nothing is due."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from agent.domain.job import TERMINAL, TRANSITIONS, State

Row = Mapping[str, Any]
Fetch = Callable[[str], Awaitable[Sequence[Row]]]
"""Runs a query and returns its rows; a connection's `fetch` is one."""


async def violations(fetch: Fetch) -> list[str]:
    """Return what is not as it should be once all is done; each in words that name the row."""
    jobs = await fetch("SELECT * FROM jobs ORDER BY activity_id, run")
    events = await fetch("SELECT job_id, state FROM job_events ORDER BY id")
    return [*_ends(jobs), *_stories(jobs, events), *await _leases(fetch), *await _due(fetch)]


def named(job: Row) -> str:
    """Return how to call a job in a message."""
    return f"run {job['run']} of Activity {job['activity_id']} (job {job['id']})"


def _ends(jobs: Sequence[Row]) -> Iterator[str]:
    """Each job has ended, as its verdict says."""
    for job in jobs:
        if job["state"] not in TERMINAL:
            reason = job["waiting_for"] or "no reason"
            yield f"{named(job)}: has not ended: {job['state']}, attempt {job['attempt']} ({reason})"
        elif job["verdict"] not in {job["state"], None} or (job["verdict"] is None and job["state"] != State.FAILED):
            yield f"{named(job)}: {job['state']} with the verdict {job['verdict']}"
        elif (job["state"] == State.FAILED) != (job["fault_class"] is not None):
            yield f"{named(job)}: {job['state']} with the fault {job['fault_class']}: {job['fault_message']}"


def _stories(jobs: Sequence[Row], events: Sequence[Row]) -> Iterator[str]:
    """What `job_events` tells could have happened, has one end, and ends where the job is."""
    of_job: dict[Any, list[State]] = defaultdict(list)
    for event in events:
        of_job[event["job_id"]].append(State(event["state"]))
    for job in jobs:
        story = of_job[job["id"]]
        told = " → ".join(story)
        if not story or story[0] is not State.QUEUED or story[-1] != job["state"]:
            yield f"{named(job)}: {job['state']}, its story is {told or 'empty'}"
        for before, after in itertools.pairwise(story):
            if after is not before and after not in TRANSITIONS[before]:
                yield f"{named(job)}: went from {before} to {after}"
        ends = sum(state in TERMINAL for state in story)
        if ends > 1:
            yield f"{named(job)}: ended {ends} times: {told}"


async def _leases(fetch: Fetch) -> list[str]:
    """No lease is held, in whichever table."""
    tables = await fetch(
        "SELECT table_name FROM information_schema.columns WHERE column_name = 'lease_until'"
        " AND table_schema = ANY(current_schemas(false)) ORDER BY table_name"
    )
    found = []
    for table in tables:
        name = table["table_name"]
        held = await fetch(f"SELECT * FROM {name} WHERE lease_until IS NOT NULL")  # noqa: S608 a table of ours
        found += [f"{name}: a lease is held on {next(iter(row.values()))} until {row['lease_until']}" for row in held]
    return found


async def _due(fetch: Fetch) -> list[str]:
    """Nothing is due that nobody does."""
    jobs = await fetch("SELECT id, state FROM jobs WHERE finished_at IS NULL AND due_at <= now()")
    looks = await fetch("SELECT entity_id FROM watched WHERE due_at <= now()")
    return [
        *(f"job {row['id']}: due in {row['state']}, and nobody does it" for row in jobs),
        *(f"{row['entity_id']}: to be looked at, and nobody does" for row in looks),
    ]
