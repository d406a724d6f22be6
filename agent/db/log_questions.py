"""Logs that are on another agent's disk, asked for and answered through the database that both have.

Agents need not reach each other: they listen on loopback by default, and stand behind firewalls.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from agent.db.database import Database

_LOOK_SECONDS = 0.1
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Question:
    """A piece of a log that is wanted: from `position` on, but of what is there only so many last lines or bytes."""

    id: int
    job_id: str
    launch: int
    stream: str
    position: int
    lines: int | None
    most_bytes: int | None


@dataclass(frozen=True, slots=True)
class Piece:
    """An answer: the bytes from `begins` on; `begins` is None where there is no such file."""

    begins: int | None
    content: bytes


class LogQuestions:
    """Asks, and answers what this agent is asked.

    Args:
        database: what the agents share.
        place: the data directory whose logs are this agent's to tell of.
    """

    def __init__(self, database: Database, place: str) -> None:
        self._database = database
        self.place = place

    async def ask(
        self,
        place: str,
        job_id: str,
        launch: int,
        stream: str,
        position: int,
        *,
        lines: int | None = None,
        most_bytes: int | None = None,
    ) -> Piece | None:
        """Ask the agent of another place for a piece, and wait for its answer; nothing when none comes in ten seconds.

        Raises:
            DatabaseError: PostgreSQL is away.
        """
        async with self._database.queries() as queries:
            number = await queries.value(
                "ask_log",
                place=place,
                job_id=uuid.UUID(job_id),
                launch=launch,
                stream=stream,
                position=position,
                lines=lines,
                most_bytes=most_bytes,
            )
        until = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < until:
            await asyncio.sleep(_LOOK_SECONDS)
            async with self._database.queries() as queries:
                row = await queries.row("fetch_log_answer", id=number)
            if row is not None:
                return Piece(row["begins"], row["content"] or b"")
        return None

    async def asked(self) -> Sequence[Question]:
        """Return what this agent is asked.

        Raises:
            DatabaseError: PostgreSQL is away.
        """
        async with self._database.queries() as queries:
            rows = await queries.rows("log_questions", place=self.place)
        names = ("id", "launch", "stream", "position", "lines", "most_bytes")
        return [Question(job_id=str(row["job_id"]), **{name: row[name] for name in names}) for row in rows]

    async def answer(self, question: Question, begins: int | None, content: bytes) -> None:
        """Answer a question.

        Raises:
            DatabaseError: PostgreSQL is away.
        """
        async with self._database.queries() as queries:
            await queries.value("answer_log", id=question.id, begins=begins, content=content)
