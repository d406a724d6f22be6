"""Jobs in the database: made, claimed under a lease, moved by one fenced UPDATE."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from agent.db.database import Database, Queries, Row
from agent.domain.activity import Activity
from agent.domain.job import TERMINAL, Fault, FaultClass, Job, Move, Plan, PlannedFile, State, Verdict
from agent.errors import DatabaseError


class LeaseLost(DatabaseError):
    """Another worker holds the job now: whatever this one found out no longer counts."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job under a lease. `token` is the fence that every write of the step carries."""

    job: Job
    token: int


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's story."""

    id: int
    at: datetime
    state: State
    attempt: int
    note: str | None
    done: Mapping[str, object] | None  # how far the step that was left had come


class Jobs:
    """The table of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, job_id: str) -> Job | None:
        """Return a job, or nothing when there is none of that id."""
        try:
            number = uuid.UUID(job_id)
        except ValueError:
            return None
        async with self._database.queries() as queries:
            row = await queries.row("get_job", id=number)
        return None if row is None else job_from(row)

    async def newest(self, activity_id: str | None = None, state: State | None = None, most: int = 100) -> list[Job]:
        """Return the newest jobs, newest first."""
        async with self._database.queries() as queries:
            rows = await queries.rows("list_jobs", activity_id=activity_id, state=state, most=most)
        return [job_from(row) for row in rows]

    async def events(self, job_id: str, after: int = 0) -> list[Event]:
        """Return a job's story from the event with the number `after` on, oldest first."""
        async with self._database.queries() as queries:
            rows = await queries.rows("list_events", job_id=uuid.UUID(job_id), after=after)
        return [
            Event(row["id"], row["at"], State(row["state"]), row["attempt"], row["note"], row["done"]) for row in rows
        ]

    async def claim(self, states: Collection[State], most: int, lease_seconds: float, holder: str) -> list[Claim]:
        """Take up to `most` due jobs in these states."""
        async with self._database.queries() as queries:
            rows = await queries.rows(
                "claim_jobs", states=list(states), most=most, lease=timedelta(seconds=lease_seconds), holder=holder
            )
        return [Claim(job_from(row), row["lease_token"]) for row in rows]

    async def expire_leases(self, holder: str) -> None:
        """End the leases that a former process of this holder died with; each counts as an attempt."""
        async with self._database.queries() as queries:
            await queries.value("expire_leases", holder=holder)

    async def renew(self, claim: Claim, lease_seconds: float) -> bool:
        """Keep a lease; return whether somebody has asked for the job's end.

        Raises:
            LeaseLost: it is another's.
        """
        async with self._database.queries() as queries:
            cancel = await queries.value(
                "renew_lease", id=claim.job.id, lease_token=claim.token, lease=timedelta(seconds=lease_seconds)
            )
        if cancel is None:
            raise LeaseLost(f"the lease of job {claim.job.id} is another's")
        return bool(cancel)

    async def release(self, claim: Claim) -> None:
        """Give a job back as it was."""
        async with self._database.queries() as queries:
            await queries.value("release_lease", id=claim.job.id, lease_token=claim.token)

    async def move(
        self, claim: Claim, move: Move, note: str | None = None, done: Mapping[str, object] | None = None
    ) -> None:
        """Write where the job goes; when it has ended, have its Activity looked at again.

        `note` and `done` (how far the step had come, in files and bytes) are for the job's story.

        Raises:
            LeaseLost: another worker holds it; nothing is written.
        """
        async with self._database.transaction() as queries:
            moved = await queries.value(
                "move_job",
                id=claim.job.id,
                lease_token=claim.token,
                from_state=claim.job.state,
                state=move.state,
                due_at=move.due_at,
                attempt=move.attempt,
                waiting_for=move.waiting_for,
                verdict=move.verdict,
                fault_class=move.fault.cls if move.fault else None,
                fault_message=move.fault.message if move.fault else None,
                exit_code=move.exit_code,
                native_id=move.native_id,
                started_at=move.started_at,
                terminal=move.state in TERMINAL,
                note=note,
                done=dict(done) if done else None,
            )
            if moved is None:
                raise LeaseLost(f"the lease of job {claim.job.id} is another's")
            if move.state in TERMINAL:
                await queries.value("look_again", activity_id=claim.job.activity_id)

    async def progress(self, claim: Claim, progress: Mapping[str, object]) -> None:
        """Write how far the current step is."""
        async with self._database.queries() as queries:
            await queries.value("set_progress", id=claim.job.id, lease_token=claim.token, progress=dict(progress))

    async def set_folder(self, claim: Claim, folder_id: str) -> None:
        """Record the run's Folder before anything is put into it.

        Raises:
            LeaseLost: another worker holds the job.
        """
        async with self._database.queries() as queries:
            kept = await queries.value("set_folder", id=claim.job.id, lease_token=claim.token, folder_id=folder_id)
        if kept is None:
            raise LeaseLost(f"the lease of job {claim.job.id} is another's")

    async def seconds_to_next(self, most: float) -> float:
        """Return how long to sleep until the next job falls due, `most` seconds at the longest."""
        async with self._database.queries() as queries:
            seconds: float | None = await queries.value("next_job_due")
        return most if seconds is None else min(most, seconds)

    async def cancel(self, job_id: str) -> bool:
        """Ask for a job's end; return whether there was anything to end."""
        async with self._database.queries() as queries:
            return await queries.value("request_cancel", id=uuid.UUID(job_id)) is not None

    async def ended_before(self, job_ids: Collection[str], before: datetime) -> set[str]:
        """Return which of these jobs ended before a time."""
        async with self._database.queries() as queries:
            rows = await queries.rows("finished_before", ids=[uuid.UUID(each) for each in job_ids], before=before)
        return {str(row["id"]) for row in rows}


async def insert_job(
    queries: Queries, activity: Activity, plan: Plan, trigger: str, requested_by: str | None = None
) -> Job | None:
    """Make a job in the caller's transaction; nothing when the Activity has a live one already."""
    row = await queries.row(
        "insert_job",
        id=uuid.uuid4(),
        organization=activity.organization,
        activity_id=activity.id,
        activity_name=activity.name,
        project_id=activity.project_id,
        plan=asdict(plan),
        image_name=plan.image.name,
        image_revision_id=plan.image.entity_id,
        trigger=trigger,
        requested_by=requested_by,
    )
    return None if row is None else job_from(row)


async def live_job(queries: Queries, activity_id: str) -> Job | None:
    """Return the Activity's job that has not ended, if any."""
    row = await queries.row("live_job", activity_id=activity_id)
    return None if row is None else job_from(row)


def plan_from(document: Mapping[str, Any]) -> Plan:
    """Read a plan as it stands in the database."""
    return Plan(
        inputs=tuple(PlannedFile(**file) for file in document["inputs"]),
        related=tuple(PlannedFile(**file) for file in document["related"]),
        image=PlannedFile(**document["image"]),
    )


def job_from(row: Row) -> Job:
    """Read a job as it stands in the database."""
    fault = Fault(FaultClass(row["fault_class"]), row["fault_message"]) if row["fault_class"] else None
    return Job(
        id=str(row["id"]),
        organization=row["organization"],
        activity_id=row["activity_id"],
        activity_name=row["activity_name"],
        project_id=row["project_id"],
        run=row["run"],
        plan=plan_from(row["plan"]),
        state=State(row["state"]),
        attempt=row["attempt"],
        trigger=row["trigger"],
        requested_by=row["requested_by"],
        created_at=row["created_at"],
        verdict=Verdict(row["verdict"]) if row["verdict"] else None,
        fault=fault,
        exit_code=row["exit_code"],
        native_id=row["native_id"],
        folder_id=row["folder_id"],
        waiting_for=row["waiting_for"],
        cancel_requested=row["cancel_requested"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        progress=row["progress"],
    )
