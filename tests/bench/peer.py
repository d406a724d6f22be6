"""procrastinate's worker, with a task that does nothing: what `tests.bench.job_table` compares ours with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import procrastinate
from procrastinate import PsycopgConnector


@dataclass
class Theirs:
    """procrastinate's worker, with a task that does nothing."""

    app: procrastinate.App
    begun: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the task known."""

        @self.app.task(name="nothing")
        async def nothing(name: str) -> None:
            self.begun[name] = time.perf_counter()

        self._task = nothing

    async def empty(self) -> None:
        """Forget all jobs."""
        self.begun.clear()
        await self.app.connector.execute_query_async("TRUNCATE procrastinate_jobs CASCADE")

    async def make(self, name: str) -> None:
        """Make a job."""
        await self._task.defer_async(name=name)

    async def live(self) -> int:
        """Return how many jobs have not ended."""
        query = "SELECT count(*) AS live FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
        return int((await self.app.connector.execute_query_one_async(query))["live"])

    @asynccontextmanager
    async def working(self, places: int) -> AsyncIterator[None]:
        """Run the worker."""
        worker = self.app.run_worker_async(concurrency=places, install_signal_handlers=False)
        task = asyncio.create_task(worker)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def theirs(address: str, connections: int) -> AsyncIterator[Theirs]:
    """Open it on an empty database."""
    connector = PsycopgConnector(conninfo=address, min_size=connections, max_size=connections)
    async with procrastinate.App(connector=connector).open_async() as app:
        await app.schema_manager.apply_schema_async()
        yield Theirs(app)
