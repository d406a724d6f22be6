"""Batch jobs that do the rest of a run on a compute node, and the agents that see to them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from agent.db.database import Database
from agent.db.jobs import AGENT_GONE, Claim, job_from


@dataclass(frozen=True, slots=True)
class NodeRun:
    """A job that was handed over, and how it stands.

    `over`: it has ended, or goes on elsewhere. `held`: somebody works at it. `directory` is what the cluster and the
    agent share; nothing before it is submitted. `verdict` is of a job that has ended there.
    """

    place: str
    job_id: str
    directory: Path | None
    launch: int
    resources: Mapping[str, object]
    cancel_requested: bool
    held: bool
    over: bool
    verdict: str | None
    fault_class: str | None


class NodeRuns:
    """The table of them, for the agent of one place."""

    def __init__(self, database: Database, agent: str) -> None:
        self._database = database
        self._agent = agent

    async def mine(self) -> Sequence[NodeRun]:
        """Return what this agent sees to; what an agent did that is gone, it sees to from now on.

        Raises:
            DatabaseError: PostgreSQL is away; so say all of these.
        """
        async with self._database.queries() as queries:
            await queries.value("adopt_node_runs", agent=self._agent, gone=AGENT_GONE)
            rows = await queries.rows("node_runs", agent=self._agent)
        return [
            NodeRun(
                place=row["place"],
                job_id=str(row["job_id"]),
                directory=None if row["directory"] is None else Path(row["directory"]),
                launch=row["launch"],
                resources=row["resources"],
                cancel_requested=row["cancel_requested"],
                held=row["held"],
                over=row["over"],
                verdict=row["verdict"],
                fault_class=row["fault_class"],
            )
            for row in rows
        ]

    async def place(self, run: NodeRun, directory: Path) -> Path | None:
        """Record where its files are, unless that is on record; return where, nothing when it is closed."""
        async with self._database.queries() as queries:
            found = await queries.value("place_node_run", place=run.place, directory=str(directory))
        return None if found is None else Path(found)

    async def waits(self, run: NodeRun, waiting_for: str) -> None:
        """Tell what it waits for before it begins."""
        async with self._database.queries() as queries:
            await queries.value("node_run_waits", id=uuid.UUID(run.job_id), place=run.place, waiting_for=waiting_for)

    async def take(self, run: NodeRun, lease_seconds: float) -> Claim | None:
        """Take the job back; nothing when somebody works at it, or it is not there any more."""
        async with self._database.queries() as queries:
            row = await queries.row(
                "take_from_node",
                id=uuid.UUID(run.job_id),
                place=run.place,
                agent=self._agent,
                lease=timedelta(seconds=lease_seconds),
            )
        return None if row is None else Claim(job_from(row), row["lease_token"])

    async def close(self, run: NodeRun) -> bool:
        """Note that nothing of it is left; say whether it was this call that did."""
        async with self._database.queries() as queries:
            closed = await queries.value("close_node_run", id=uuid.UUID(run.job_id), place=run.place, agent=self._agent)
        return bool(closed)


async def goes_on(database: Database, place: str) -> bool:
    """Say whether a job is still to be worked at by the batch job of this place."""
    async with database.queries() as queries:
        found: bool = await queries.value("node_run_goes_on", place=place)
    return found
