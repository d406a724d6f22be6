"""Where a job's log is read from: this machine's disk, or the agent that has it on its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from agent.adapters import log_file
from agent.adapters.log_file import Begin
from agent.db.log_questions import LogQuestions
from agent.domain.job import Job
from agent.domain.workdir import Layout
from agent.errors import DatabaseError


class LogSource(Protocol):
    """A log, wherever it is."""

    async def begin(self, begin: Begin) -> int | None:
        """Return the byte to begin with; nothing where there is no such log, or nobody tells."""
        ...

    async def read(self, position: int) -> bytes | None:
        """Return the next bytes, empty where there are none now; None where nobody tells."""
        ...


class HereLog:
    """On this machine's disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def begin(self, begin: Begin) -> int | None:
        """Return the byte to begin with, nothing where there is no such log."""
        if not await asyncio.to_thread(self._path.is_file):
            return None
        return await asyncio.to_thread(begin.find, self._path)

    async def read(self, position: int) -> bytes | None:
        """Return the next bytes."""
        return await asyncio.to_thread(log_file.read, self._path, position)


class ThereLog:
    """On another agent's disk, which is asked through the database.

    What of a run on a compute node was saved here is told where that node does not answer.
    """

    def __init__(self, questions: LogQuestions, place: str, job: Job, stream: str, saved: HereLog) -> None:
        self._questions = questions
        self._where = (place, job.id, job.launch, stream)
        self._saved = saved
        self._is_saved = False

    async def begin(self, begin: Begin) -> int | None:
        """Return the byte to begin with; nothing where there is no such log, or that agent does not answer."""
        piece = await self._questions.ask(*self._where, begin.offset, lines=begin.lines, most_bytes=begin.most_bytes)
        if piece is not None:
            return piece.begins
        position = await self._saved.begin(begin)
        self._is_saved = position is not None
        return position

    async def read(self, position: int) -> bytes | None:
        """Return the next bytes; None while that agent, or the database, is away."""
        if self._is_saved:
            return await self._saved.read(position)
        try:
            piece = await self._questions.ask(*self._where, position)
        except DatabaseError:
            return None
        return None if piece is None else piece.content


def source_of(questions: LogQuestions, data_dir: Path, job: Job, stream: str) -> LogSource:
    """Return where a job's log is read from."""
    here = HereLog(Path(Layout(data_dir, job.id).log(stream, job.launch)))
    if job.place is not None and job.place != questions.place:
        return ThereLog(questions, job.place, job, stream, here)
    return here
