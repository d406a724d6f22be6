"""Jobs in the database: made, claimed under a lease, moved by one fenced UPDATE."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from agent.db.database import Database, Queries, Row
from agent.db.moves import Moves
from agent.db.renewals import Renewals
from agent.domain.activity import Activity
from agent.domain.job import Fault, FaultClass, Job, Move, Plan, PlannedFile, State, Verdict
from agent.errors import DatabaseError

# An agent that was not seen for so long is taken for gone: others take over what it was to stage.
AGENT_GONE = timedelta(seconds=60)
# For so long, its machine is: what a person cancels there is ended by the others, without the files that are there.
MACHINE_LOST = timedelta(minutes=15)


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


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What the sweep asks of a job that has a directory on its disk."""

    state: State
    place: str | None
    ended_seconds: float | None  # how long ago it ended


class Jobs:
    """The table of jobs.

    Args:
        database: where it is.
        bound: claim only what is at the given place: as a batch job does, which has come for one job.
    """

    def __init__(self, database: Database, *, bound: bool = False) -> None:
        self._database = database
        self._bound = bound
        self._moves = Moves(database)
        self._renewals = Renewals(database)

    async def get(self, job_id: str) -> Job | None:
        """Return a job, or nothing when there is none of that id."""
        try:
            number = uuid.UUID(job_id)
        except ValueError:
            return None
        async with self._database.queries() as queries:
            row = await queries.row("get_job", id=number, gone=AGENT_GONE)
        return None if row is None else job_from(row)

    async def newest(
        self,
        activity_id: str | None = None,
        state: State | None = None,
        most: int = 100,
        *,
        project_id: str | None = None,
        verdict: Verdict | None = None,
        since: timedelta | None = None,
        stuck: bool = False,
    ) -> list[Job]:
        """Return the newest jobs, newest first.

        Args:
            activity_id: only this Activity's.
            state: only those in this state.
            most: no more than so many.
            project_id: only this Project's.
            verdict: only those whose container ended so.
            since: only those that have not ended, or not longer ago than this.
            stuck: only those that do not come on.
        """
        async with self._database.queries() as queries:
            rows = await queries.rows(
                "list_jobs",
                activity_id=activity_id,
                state=state,
                most=most,
                project_id=project_id,
                verdict=verdict,
                since=since,
                stuck=stuck,
                gone=AGENT_GONE,
            )
        return [job_from(row) for row in rows]

    async def events(self, job_id: str, after: int = 0) -> list[Event]:
        """Return a job's story from the event with the number `after` on, oldest first."""
        async with self._database.queries() as queries:
            rows = await queries.rows("list_events", job_id=uuid.UUID(job_id), after=after)
        return [
            Event(row["id"], row["at"], State(row["state"]), row["attempt"], row["note"], row["done"]) for row in rows
        ]

    async def claim(
        self,
        states: Collection[State],
        most: int,
        lease_seconds: float,
        place: str,
        *,
        alone: bool = False,
        suspects_from: int = 2,
    ) -> list[Claim]:
        """Take up to `most` due jobs in these states whose files are at this place, or nowhere yet.

        Those whose work has ended the process `suspects_from` times are taken only with `alone`, and then no others.
        """
        return await self.claim_each([(states, most)], lease_seconds, place, alone=alone, suspects_from=suspects_from)

    async def claim_each(
        self,
        wanted: Sequence[tuple[Collection[State], int]],
        lease_seconds: float,
        place: str,
        *,
        alone: bool = False,
        suspects_from: int = 2,
    ) -> list[Claim]:
        """Take due jobs as `claim` does, up to so many of each of several groups of states."""
        async with self._database.queries() as queries:
            rows = await queries.rows(
                "claim_jobs",
                wanted=json.dumps([{"states": list(states), "most": most} for states, most in wanted]),
                lease=timedelta(seconds=lease_seconds),
                place=place,
                alone=alone,
                suspects_from=suspects_from,
                gone=AGENT_GONE,
                lost=MACHINE_LOST,
                bound=self._bound,
            )
        return [Claim(job_from(row), row["lease_token"]) for row in rows]

    async def claim_queued(
        self, most: int, lease_seconds: float, place: str, *, ahead: int, suspects_from: int = 2
    ) -> list[Claim]:
        """Take up to `most` queued jobs, each Project in turn, while fewer than `ahead` are on their way here."""
        async with self._database.queries() as queries:
            rows = await queries.rows(
                "claim_queued",
                most=most,
                lease=timedelta(seconds=lease_seconds),
                place=place,
                ahead=ahead,
                suspects_from=suspects_from,
            )
        return [Claim(job_from(row), row["lease_token"]) for row in rows]

    async def claim_cancelled(
        self, most: int, lease_seconds: float, place: str, *, suspects_from: int = 2
    ) -> list[Claim]:
        """Take up to `most` jobs whose end was asked for before their container ran."""
        async with self._database.queries() as queries:
            rows = await queries.rows(
                "claim_cancelled",
                most=most,
                lease=timedelta(seconds=lease_seconds),
                place=place,
                suspects_from=suspects_from,
                gone=AGENT_GONE,
                lost=MACHINE_LOST,
                bound=self._bound,
            )
        return [Claim(job_from(row), row["lease_token"]) for row in rows]

    async def suspects(self, place: str, suspects_from: int) -> int:
        """Return how many jobs are due here whose work has ended the process that often."""
        async with self._database.queries() as queries:
            count: int = await queries.value(
                "count_suspects", place=place, suspects_from=suspects_from, bound=self._bound
            )
        return count

    async def expire_leases(self, holder: str) -> None:
        """End the leases that a former process of this holder died with."""
        async with self._database.queries() as queries:
            await queries.value("expire_leases", holder=holder)

    async def lapse_leases(self, set_aside_from: int = 6, place: str = "", held: Collection[str] = ()) -> int:
        """Free the jobs whose lease ran out, whoever had it; return how many there were.

        Args:
            set_aside_from: the suspicion with which a job is not tried again.
            place: whose leases the caller's are.
            held: the jobs that the caller knows to hold; it sees to their leases itself.
        """
        async with self._database.queries() as queries:
            count: int = await queries.value(
                "lapse_leases", set_aside_from=set_aside_from, place=place, held=[uuid.UUID(each) for each in held]
            )
        return count

    async def trust(self, claim: Claim) -> None:
        """Say that a suspect has not ended the process for a while."""
        async with self._database.queries() as queries:
            await queries.value("trust_job", id=claim.job.id, lease_token=claim.token)

    async def wake_waiting(self, party: str) -> None:
        """Make due what waits for an outside party that is back."""
        async with self._database.queries() as queries:
            await queries.value("wake_waiting", party=party)

    async def agent_seen(self, place: str, host: str, version: str, *, starts: bool = False) -> None:
        """Note that this agent is here."""
        async with self._database.queries() as queries:
            await queries.value("agent_seen", place=place, host=host, version=version, starts=starts)

    async def agent_stopped(self, place: str) -> None:
        """Note that this agent has stopped in good order."""
        async with self._database.queries() as queries:
            await queries.value("agent_stopped", place=place)

    async def renew(self, claim: Claim, lease_seconds: float) -> bool:
        """Keep a lease; return whether somebody has asked for the job's end.

        Raises:
            LeaseLost: it is another's.
        """
        cancel = await self._renewals.renew(claim.job.id, claim.token, lease_seconds)
        if cancel is None:
            raise LeaseLost(f"the lease of job {claim.job.id} is another's")
        return cancel

    async def release(self, claim: Claim) -> None:
        """Give a job back as it was."""
        async with self._database.queries() as queries:
            await queries.value("release_lease", id=claim.job.id, lease_token=claim.token)

    async def move(
        self,
        claim: Claim,
        move: Move,
        note: str | None = None,
        done: Mapping[str, object] | None = None,
        keep_seconds: float | None = None,
    ) -> Claim | None:
        """Write where the job goes; when it has ended, have its Activity looked at again.

        `note` and `done` (how far the step had come, in files and bytes) are for the job's story. With `keep_seconds`
        the lease goes on for so long, and what is returned is the job in its next state.

        Raises:
            LeaseLost: another worker holds it; nothing is written.
        """
        moved = await self._moves.write(claim.job, claim.token, move, note, done, keep_seconds)
        if moved is None:
            raise LeaseLost(f"the lease of job {claim.job.id} is another's")
        return None if keep_seconds is None else Claim(moved, claim.token)

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

    async def annotated(self, job_id: str) -> list[str]:
        """Return which annotations of a run are on its Activity."""
        async with self._database.queries() as queries:
            return list(await queries.value("annotated", id=uuid.UUID(job_id)) or ())

    async def set_annotated(self, claim: Claim, kind: str) -> None:
        """Record that an annotation is on the Activity.

        Raises:
            LeaseLost: another worker holds the job.
        """
        async with self._database.queries() as queries:
            kept = await queries.value("set_annotated", id=claim.job.id, lease_token=claim.token, kind=kind)
        if kept is None:
            raise LeaseLost(f"the lease of job {claim.job.id} is another's")

    async def seconds_to_next(self, place: str, most: float) -> float:
        """Return how long to sleep until the next job falls due here, `most` seconds at the longest."""
        async with self._database.queries() as queries:
            seconds: float | None = await queries.value("next_job_due", place=place, bound=self._bound)
        return most if seconds is None else min(most, seconds)

    async def cancel(self, job_id: str) -> bool:
        """Ask for a job's end; return whether there was anything to end."""
        async with self._database.queries() as queries:
            return await queries.value("request_cancel", id=uuid.UUID(job_id)) is not None

    async def on_disk(self, job_ids: Collection[str]) -> dict[str, OnDisk]:
        """Return what is known of these jobs; one that this database does not have is left out."""
        async with self._database.queries() as queries:
            rows = await queries.rows("jobs_on_disk", ids=[uuid.UUID(each) for each in job_ids])
        return {str(row["id"]): OnDisk(State(row["state"]), row["place"], row["ended_seconds"]) for row in rows}


async def insert_job(
    queries: Queries,
    activity: Activity,
    plan: Plan,
    trigger: str,
    requested_by: str | None = None,
    exact_of: str | None = None,
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
        exact_of=uuid.UUID(exact_of) if exact_of else None,
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
        wishes=document.get("wishes", {}),
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
        launch=row["launch"],
        place=row["place"],
        due_at=row.get("due_at"),
        held_until=row.get("lease_until"),
        host=row.get("host"),
        host_seen_at=row.get("host_seen_at"),
        host_is_gone=row.get("host_is_gone") or False,
        waiting_for=row["waiting_for"],
        waiting_party=row["waiting_party"],
        waiting_seconds=row.get("waiting_seconds") or 0.0,
        suspicion=row["suspicion"],
        cancel_requested=row["cancel_requested"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        progress=row["progress"],
        resources=row["resources"],
        exact_of=str(row["exact_of"]) if row["exact_of"] else None,
    )
