"""Leases that are kept, many in one statement: an agent may watch a thousand runs, and keeps each every few seconds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from agent.db.database import Database
from agent.errors import DatabaseError

_GATHER_SECONDS = 0.1  # what comes within this is written together; a lease lasts for many times as long


@dataclass(frozen=True, slots=True)
class _Renewal:
    job_id: str
    token: int
    seconds: float
    answer: asyncio.Future[bool | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Renewals:
    """Keeps leases. An idle one has no task of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[_Renewal] = []
        self._writer: asyncio.Task[None] | None = None

    async def renew(self, job_id: str, token: int, seconds: float) -> bool | None:
        """Keep a lease for so long; return whether the job's end was asked for, None when the lease is another's.

        Raises:
            DatabaseError: PostgreSQL is away.
        """
        renewal = _Renewal(job_id, token, seconds)
        self._waiting.append(renewal)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="renewals")
        return await renewal.answer

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(_GATHER_SECONDS)
                taken, self._waiting = self._waiting, []
                await self._write([each for each in taken if not each.answer.done()])  # else its step has ended
        finally:
            self._writer = None

    async def _write(self, renewals: list[_Renewal]) -> None:
        if not renewals:
            return
        leases = [{"id": each.job_id, "lease_token": each.token, "seconds": each.seconds} for each in renewals]
        try:
            async with self._database.queries() as queries:
                rows = await queries.rows("renew_leases", leases=leases)
        except Exception as error:  # noqa: BLE001 each of those that wait is to hear of it
            said = DatabaseError(str(error)) if isinstance(error, DatabaseError) else error
            for each in renewals:
                if not each.answer.done():
                    each.answer.set_exception(said)
            return
        kept = {str(row["id"]): bool(row["cancel_requested"]) for row in rows}
        for each in renewals:
            if not each.answer.done():
                each.answer.set_result(kept.get(each.job_id))
