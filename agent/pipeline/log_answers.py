"""Answer other agents that ask for logs which are on this one's disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agent.adapters import log_file
from agent.adapters.log_file import Begin
from agent.db.log_questions import LogQuestions, Question
from agent.domain.workdir import Layout
from agent.errors import DatabaseError
from agent.logs import logger

_LOOK_SECONDS = 1.0
_BUSY_SECONDS = 0.1


async def answer_questions(questions: LogQuestions, data_dir: Path, *, beat: Callable[[], None] = lambda: None) -> None:
    """Answer until cancelled: looked for every second, and more often while somebody follows."""
    while True:
        beat()
        asked = 0
        try:
            with suppress(DatabaseError):  # the worker tells of it, once
                for question in await questions.asked():
                    asked += 1
                    begins, content = await asyncio.to_thread(_piece, data_dir, question)
                    await questions.answer(question, begins, content)
        except OSError as error:
            logger().warning("log_unreadable", error=str(error))
        await asyncio.sleep(_BUSY_SECONDS if asked else _LOOK_SECONDS)


def _piece(data_dir: Path, question: Question) -> tuple[int | None, bytes]:
    path = Path(Layout(data_dir, question.job_id).log(question.stream, question.launch))
    if not path.is_file():
        return None, b""
    begins = Begin(question.position, question.lines, question.most_bytes).find(path)
    return begins, log_file.read(path, begins)
