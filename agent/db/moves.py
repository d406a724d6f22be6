"""Moves of jobs, committed in groups: one writer takes all that wait and writes them at once, each by its own fence."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from agent.db.database import Database, Row
from agent.domain.job import TERMINAL, Job, Move
from agent.errors import DatabaseError

_MOST_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class _Mover:
    """A move, and the answer that its step waits for."""

    job: Job
    move: Mapping[str, object]
    answer: asyncio.Future[Row | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def tell(self, row: Row | None) -> None:
        if not self.answer.done():
            self.answer.set_result(row)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Moves:
    """Writes moves. An idle one has no task of its own, and writes what comes at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[_Mover] = deque()
        self._writer: asyncio.Task[None] | None = None

    async def write(
        self,
        job: Job,
        lease_token: int,
        move: Move,
        note: str | None = None,
        done: Mapping[str, object] | None = None,
        keep_seconds: float | None = None,
    ) -> Job | None:
        """Commit a move; return the job where it is now, or nothing when the lease is another's.

        `note` and `done` are for the job's story; with `keep_seconds` the lease goes on for so long.

        Raises:
            DatabaseError: PostgreSQL is away; it may have been committed all the same.
        """
        mover = _Mover(job, _document(job, lease_token, move, note, done, keep_seconds))
        self._waiting.append(mover)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="moves")
        row = await mover.answer
        return None if row is None else _moved(job, move, row)

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                taken = [self._waiting.popleft() for _ in range(min(_MOST_AT_ONCE, len(self._waiting)))]
                # Who was cancelled does not want it: the job is given back as it is.
                if wanted := [mover for mover in taken if not mover.answer.done()]:
                    await self._write(wanted)
        finally:
            self._writer = None

    async def _write(self, movers: Sequence[_Mover]) -> None:
        """Commit these moves and answer; one that cannot be written is found by halves and fails alone."""
        try:
            rows = await self._commit(movers)
        except DatabaseError as error:
            for mover in movers:
                mover.fail(DatabaseError(str(error)))
        except Exception as error:  # noqa: BLE001 a bug is its own job's alone, and loud where that one is worked at
            if len(movers) == 1:
                movers[0].fail(error)
                return
            half = len(movers) // 2
            await self._write(movers[:half])
            await self._write(movers[half:])
        else:
            for mover in movers:
                mover.tell(rows.get(mover.job.id))

    async def _commit(self, movers: Sequence[_Mover]) -> dict[str, Row]:
        moves = [mover.move for mover in movers]
        async with self._database.queries() as queries:
            return {str(row["id"]): row for row in await queries.rows("move_jobs", moves=moves)}


def _document(
    job: Job,
    lease_token: int,
    move: Move,
    note: str | None,
    done: Mapping[str, object] | None,
    keep_seconds: float | None,
) -> dict[str, object]:
    """Return a move as the query reads it."""
    return {
        "id": job.id,
        "lease_token": lease_token,
        "from_state": job.state,
        "state": move.state,
        "wait": move.wait_seconds,
        "attempt": move.attempt,
        "launch": move.launch,
        "waiting_for": move.waiting_for,
        "waiting_party": move.waiting_party,
        "elsewhere": move.elsewhere,
        "place": move.place,
        "verdict": move.verdict,
        "fault_class": move.fault.cls if move.fault else None,
        "fault_message": move.fault.message if move.fault else None,
        "exit_code": move.exit_code,
        "native_id": move.native_id,
        "started_at": move.started_at.isoformat() if move.started_at else None,
        "terminal": move.state in TERMINAL,
        "keep": keep_seconds,
        "note": note,
        "done": done or None,
        "resources": dict(move.resources) if move.resources else None,
    }


def _moved(job: Job, move: Move, row: Row) -> Job:
    """Return a job as it stands in the database after a move."""
    return replace(
        job,
        state=move.state,
        attempt=move.attempt,
        launch=move.launch,
        verdict=move.verdict,
        fault=move.fault,
        exit_code=move.exit_code,
        native_id=move.native_id,
        started_at=move.started_at,
        waiting_for=move.waiting_for,
        waiting_party=move.waiting_party,
        waiting_seconds=0.0,
        suspicion=0,
        progress={},
        resources={**job.resources, **(move.resources or {})},
        due_at=row["due_at"],
        held_until=row["lease_until"],
        folder_id=row["folder_id"],
        cancel_requested=row["cancel_requested"],
    )
