"""Walks through whole organizations: which is due, who does it, and what each saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from agent.db.database import Database


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk through one organization, under a lease."""

    organization: int
    token: int


@dataclass(frozen=True, slots=True)
class Seen:
    """An Activity as a walk saw it. `recent`: made or changed since the agent was installed."""

    activity_id: str
    updated_at: str
    recent: bool


class Reconciliations:
    """The table of walks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def make_due(self) -> None:
        """Have every organization walked now."""
        async with self._database.queries() as queries:
            await queries.value("make_reconciliation_due")

    async def claim(self, organization: int, lease_seconds: float, holder: str | None = None) -> Walk | None:
        """Take an organization's walk when it is due and nobody else walks there; this holder does not."""
        lease = timedelta(seconds=lease_seconds)
        async with self._database.queries() as queries:
            token = await queries.value("claim_reconciliation", organization=organization, lease=lease, holder=holder)
        return None if token is None else Walk(organization, token)

    async def leave(self, holder: str | None) -> None:
        """Give up the walk of a holder that stops."""
        async with self._database.queries() as queries:
            await queries.value("leave_walks", holder=holder)

    async def note(self, walk: Walk, seen: Sequence[Seen]) -> int:
        """Keep what a walk saw; return how many Activities are due for a look because of it."""
        async with self._database.queries() as queries:
            count: int = await queries.value(
                "note_listed",
                organization=walk.organization,
                ids=[each.activity_id for each in seen],
                listed_at=[each.updated_at for each in seen],
                recent=[each.recent for each in seen],
            )
        return count

    async def look_slowly(self, walk: Walk, most: int, age_seconds: float) -> int:
        """Make up to `most` Activities due that nobody has looked at for `age_seconds`; return how many those are."""
        async with self._database.queries() as queries:
            count: int = await queries.value(
                "look_again_slowly", organization=walk.organization, most=most, age=timedelta(seconds=age_seconds)
            )
        return count

    async def end(self, walk: Walk, next_seconds: float, activities: int | None, changed: int | None) -> None:
        """Close a walk; the next one is due in `next_seconds`."""
        async with self._database.queries() as queries:
            await queries.value(
                "end_reconciliation",
                organization=walk.organization,
                lease_token=walk.token,
                next=timedelta(seconds=next_seconds),
                activities=activities,
                changed=changed,
            )
