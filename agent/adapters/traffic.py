"""Who may use how many connections to the object store, and how fast bytes may pass.

A connection is lent for one request: a small file, a range of a large one, a part of an upload. Whoever holds the
fewest gets the next, so that a job with a few small files is not stuck behind one with a large one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

CONNECTIONS = 32
JOB_CONNECTIONS = 8
Direction = Literal["down", "up"]
_BURST_SECONDS = 0.25  # of what may pass in a second: so much may pass at once


@dataclass(slots=True)
class _Waiting:
    job: str
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Traffic:
    """The limits of one process.

    Args:
        connections: at most so many requests at once.
        job_connections: at most so many of them for one job.
        bytes_per_second: at most so many bytes a second, downloads and uploads together; None for no limit.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        connections: int = CONNECTIONS,
        job_connections: int = JOB_CONNECTIONS,
        bytes_per_second: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job_connections = min(job_connections, connections)
        self._free = connections
        self._held: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []
        self._bytes_per_second = bytes_per_second
        self._clock = clock
        self._passed_by = float("-inf")  # when what has been let pass so far will have passed
        self._lock = threading.Lock()
        self.moved = {"down": 0, "up": 0}
        """Bytes that have passed, from and to the object store."""

    @asynccontextmanager
    async def connection(self, job: str) -> AsyncIterator[None]:
        """Wait for a job's turn, and lend it a connection."""
        waiting = _Waiting(job)
        self._waiting.append(waiting)
        self._let_in()
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not waiting.turn.cancelled():
                self._give_back(job)
            raise
        try:
            yield
        finally:
            self._give_back(job)

    def delay_seconds(self, count: int, direction: Direction) -> float:
        """Let `count` bytes pass, and return for how many seconds whoever moved them is to pause. From any thread."""
        with self._lock:
            self.moved[direction] += count
            if self._bytes_per_second is None:
                return 0.0
            now = self._clock()
            self._passed_by = max(self._passed_by, now - _BURST_SECONDS) + count / self._bytes_per_second
            return max(0.0, self._passed_by - now)

    def _give_back(self, job: str) -> None:
        self._free += 1
        self._held[job] -= 1
        if not self._held[job]:
            del self._held[job]
        self._let_in()

    def _let_in(self) -> None:
        """Give what is free to those that wait: the job that holds the fewest first, then whoever came first."""
        self._waiting = [each for each in self._waiting if not each.turn.done()]
        while self._free and self._waiting:
            first = min(self._waiting, key=lambda each: self._held[each.job])
            if self._held[first.job] >= self.job_connections:
                return
            self._waiting.remove(first)
            self._free -= 1
            self._held[first.job] += 1
            first.turn.set_result(None)
