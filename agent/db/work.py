"""How much work there is, how old it is, and what the last days were like: for whoever looks from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from agent.db.database import Database
from agent.db.jobs import AGENT_GONE
from agent.metrics import Numbers


@dataclass(frozen=True, slots=True)
class Day:
    """What ended on one day (UTC). `waited_seconds`: the median time from a job's making to its container's start."""

    day: datetime
    succeeded: int
    failed: int
    cancelled: int
    waited_seconds: float
    bytes: float


@dataclass(frozen=True, slots=True)
class WaitingActivity:
    """An Activity that was judged and not run, and why."""

    entity_id: str
    organization: int | None
    reasons: Sequence[str]
    changed_at: datetime
    judged_at: datetime | None
    due_at: datetime | None


class Work:
    """What the database says of the work that there is, seen from one data directory."""

    def __init__(self, database: Database, place: str) -> None:
        self._database = database
        self._place = place

    async def numbers(self) -> Numbers:
        """Count it.

        Raises:
            DatabaseError: PostgreSQL is away.
        """
        async with self._database.queries() as queries:
            row = await queries.row("count_work", place=self._place, gone=AGENT_GONE)
        return Numbers(**(row or {}))

    async def waiting_activities(self, most: int = 50) -> list[WaitingActivity]:
        """Return the Activities that changed within a week and were not run, the last one first.

        Raises:
            DatabaseError: PostgreSQL is away.
        """
        async with self._database.queries() as queries:
            return [WaitingActivity(**row) for row in await queries.rows("waiting_activities", most=most)]

    async def last_days(self) -> list[Day]:
        """Return the last seven days, the oldest first.

        Raises:
            DatabaseError: PostgreSQL is away.
        """
        async with self._database.queries() as queries:
            return [Day(**row) for row in await queries.rows("last_days")]

    async def here(self) -> int:
        """Return how many jobs are under way at this place.

        Raises:
            DatabaseError: PostgreSQL is away.
        """
        async with self._database.queries() as queries:
            count: int = await queries.value("count_here", place=self._place)
        return count
