"""What may have changed in Ovation: hints as they come in, and what a look at each found."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from agent.db.database import Database, Queries
from agent.db.jobs import insert_job, live_job, plan_from
from agent.domain.activity import Activity, key
from agent.domain.delivery import Delivery, Receipt
from agent.domain.job import Job, Plan
from agent.domain.webhook import Hint

# Longer than the week for which the id of a signed webhook is known again.
KEEP_DELIVERIES = timedelta(days=30)
_SWEEP_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class Watched:
    """An entity that is due for a look, under a lease."""

    entity_id: str
    entity_type: str
    organization: int | None
    generation: int
    token: int
    attempt: int
    trigger: str  # what made it due: webhook or reconcile
    gained: frozenset[str]  # the inputs and related files that hints told were added
    history: frozenset[str] | None  # what was linked before the agent was installed, once somebody looked


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of an entity's last look, and the hints that led to it."""

    entity_id: str
    organization: int | None
    due_at: datetime | None
    judged_at: datetime | None
    reasons: tuple[str, ...]
    deliveries: tuple[tuple[datetime, str], ...]  # (received, source)


class WatchList:
    """The inbox and the list of entities to look at."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def hint(
        self, hints: Sequence[Hint], settle_seconds: float, longest_seconds: float = 300, source: str = "webhook"
    ) -> None:
        """Store hints, all or none, and make their entities due after the quiet time.

        Each further hint starts the quiet time of `settle_seconds` again, until the entity has waited for
        `longest_seconds`: what never comes to rest is looked at all the same.
        """
        async with self._database.queries() as queries:
            await _take(queries, [(hint, None) for hint in hints], settle_seconds, longest_seconds, source)

    async def take(
        self, deliveries: Sequence[Delivery], settle_seconds: float, longest_seconds: float
    ) -> list[Receipt]:
        """Store deliveries, all or none, as if each came alone; a message that was stored before changes nothing.

        Raises:
            DatabaseError: PostgreSQL is away; nothing is known to be stored.
        """
        fresh: set[str | None] = set()
        hints = []
        receipts = []
        for delivery in deliveries:
            repeated = delivery.message_id is not None and delivery.message_id in fresh
            receipts.append(Receipt.REPEATED if repeated else Receipt.STORED)
            if not repeated:
                fresh.add(delivery.message_id)
                hints += [(hint, delivery.message_id) for hint in delivery.hints]
        async with self._database.queries() as queries:
            kept = {None, *await _take(queries, hints, settle_seconds, longest_seconds, "webhook")}
        known_before = [delivery.message_id not in kept for delivery in deliveries]
        return [Receipt.REPEATED if known else receipt for known, receipt in zip(known_before, receipts, strict=True)]

    async def sweep(self, age: timedelta = KEEP_DELIVERIES) -> int:
        """Remove deliveries that are older than this, a bounded number at a time; return how many there were."""
        swept = 0
        while True:
            async with self._database.queries() as queries:
                gone: int = await queries.value("sweep_deliveries", age=age, most=_SWEEP_AT_ONCE)
            swept += gone
            if gone < _SWEEP_AT_ONCE:
                return swept

    async def claim(
        self, most: int, lease_seconds: float, holder: str, held: Collection[str] | None = None
    ) -> list[Watched]:
        """Take up to `most` entities that are due.

        `held` are those at which this holder is looking; another that is leased to it counts as free.
        """
        lease = timedelta(seconds=lease_seconds)
        async with self._database.queries() as queries:
            rows = await queries.rows(
                "claim_watched", most=most, lease=lease, holder=holder, held=None if held is None else list(held)
            )
        return [
            Watched(
                entity_id=row["entity_id"],
                entity_type=row["entity_type"],
                organization=row["organization"],
                generation=row["generation"],
                token=row["lease_token"],
                attempt=row["attempt"],
                trigger=row["cause"],
                gained=frozenset(row["gained"]),
                history=None if row["history"] is None else frozenset(row["history"]),
            )
            for row in rows
        ]

    async def leave(self, holder: str) -> None:
        """Give up the looks of a holder that stops."""
        async with self._database.queries() as queries:
            await queries.value("leave_watched", holder=holder)

    async def ran(self, activity_id: str) -> list[frozenset[str]]:
        """Return what each earlier run of an Activity worked on, as ids."""
        async with self._database.queries() as queries:
            rows = await queries.rows("plans_of_activity", activity_id=activity_id)
        return [key(plan_from(row["plan"])) for row in rows]

    async def live(self, activity_id: str) -> Job | None:
        """Return the Activity's job that has not ended, if any."""
        async with self._database.queries() as queries:
            return await live_job(queries, activity_id)

    async def start(
        self,
        activity: Activity,
        plan: Plan,
        trigger: str,
        requested_by: str | None = None,
        exact_of: str | None = None,
    ) -> tuple[Job, bool]:
        """Make a job, or return the Activity's live one; the second value says whether it was made now."""
        async with self._database.transaction() as queries:
            made = await insert_job(queries, activity, plan, trigger, requested_by, exact_of)
            if made is not None:
                return made, True
            live = await live_job(queries, activity.id)
        if live is None:  # it ended between the two statements
            return await self.start(activity, plan, trigger, requested_by, exact_of)
        return live, False

    async def judged(
        self,
        watched: Watched,
        *,
        reasons: Sequence[str] = (),
        due_at: datetime | None = None,
        attempt: int = 0,
        organization: int | None = None,
        history: frozenset[str] | None = None,
        more: Sequence[Hint] = (),
    ) -> None:
        """Close a look; `more` are entities that are due in turn. With `history`, what hints told is settled."""
        async with self._database.queries() as queries:
            if more:  # first, and alone: two rows held at once could make a ring with the inbox
                await _take(queries, [(hint, None) for hint in more], 0, 0, None)
            await queries.value(
                "judge_watched",
                entity_id=watched.entity_id,
                lease_token=watched.token,
                generation=watched.generation,
                reasons=list(reasons),
                due_at=due_at,
                attempt=attempt,
                organization=organization,
                history=None if history is None else sorted(history),
            )

    async def last_look(self, entity_id: str) -> Look | None:
        """Return what is known of an entity, or nothing when no hint ever named it."""
        async with self._database.queries() as queries:
            row = await queries.row("get_watched", entity_id=entity_id)
            deliveries = await queries.rows("list_deliveries", entity_id=entity_id, most=20)
        if row is None:
            return None
        return Look(
            entity_id=row["entity_id"],
            organization=row["organization"],
            due_at=row["due_at"],
            judged_at=row["judged_at"],
            reasons=tuple(row["reasons"]),
            deliveries=tuple((each["received_at"], each["source"]) for each in deliveries),
        )

    async def installed_at(self) -> datetime:
        """Return when the agent was first installed on this database."""
        async with self._database.queries() as queries:
            at: datetime = await queries.value("installed_at")
        return at

    async def seconds_to_next(self, most: float) -> float:
        """Return how long to sleep until the next look falls due, `most` seconds at the longest."""
        async with self._database.queries() as queries:
            seconds: float | None = await queries.value("next_look_due")
        return most if seconds is None else min(most, max(0.0, seconds))

    async def heard(self) -> tuple[float | None, int]:
        """Return how long ago the last webhook came (seconds), and how many runs of the last day none told of."""
        async with self._database.queries() as queries:
            row = await queries.row("heard")
        return (None, 0) if row is None else (row["last"], row["found"])

    async def looks_waiting_due(self) -> int:
        """Make due what a look failed at and waits for another; return how many those are."""
        async with self._database.queries() as queries:
            count: int = await queries.value("looks_waiting_due")
        return count


async def _take(
    queries: Queries,
    hints: Sequence[tuple[Hint, str | None]],
    settle_seconds: float,
    longest_seconds: float,
    source: str | None,
) -> list[str]:
    """Make entities due after the quiet time, and return the message ids that were not known before."""
    rows = await queries.rows(
        "take_hints",
        entity_ids=[hint.entity_id for hint, _ in hints],
        entity_types=[hint.type for hint, _ in hints],
        organizations=[hint.organization for hint, _ in hints],
        gained=[hint.gained for hint, _ in hints],
        message_ids=[message_id for _, message_id in hints],
        source=source,
        settle=timedelta(seconds=settle_seconds),
        longest=timedelta(seconds=longest_seconds),
    )
    return [row["message_id"] for row in rows]
