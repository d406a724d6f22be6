"""How many steps our worker does, and how soon it begins, beside procrastinate's worker on the same PostgreSQL.

    python -m tests.bench.job_table [--quick]
    python -m tests.bench.job_table --profile 10     where a turn with so many places spends its time

Steps and tasks do nothing, so what is measured is the table of jobs and the loop around it. A job of ours is six
steps, each claimed, performed and moved; one of procrastinate's is fetched, performed and finished once. So moves are
compared with its jobs, and whole jobs are told beside them. Both are given the same number of places (ours a third for
each stage), the same pool, and take turns; machines are noisy, so take the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast
from unittest import mock

import asyncpg
import procrastinate
import structlog
from rich.console import Console
from rich.table import Table

from agent.adapters.disk import Room
from agent.db.database import Database
from agent.db.jobs import Claim, Jobs
from agent.db.outputs import Outputs
from agent.db.watched import WatchList
from agent.domain.activity import Activity
from agent.domain.job import Outcome, State
from agent.domain.webhook import Hint
from agent.pipeline import perform
from agent.pipeline.context import Context, Control
from agent.pipeline.worker import Worker
from agent.settings import AgentSettings
from tests.bench.peer import theirs
from tests.postgres import debian_server, processor_seconds
from tests.workers import PLAN, done

MOVES = 6
GOAL_RATIO = 4.0
_CONNECTIONS = 8
_PAUSE_SECONDS = 0.03
_LONGEST_SECONDS = 120.0
_OUT = Console(width=120)


class Side(Protocol):
    """One of the two that are compared."""

    begun: dict[str, float]

    async def empty(self) -> None: ...
    async def make(self, name: str) -> None: ...
    async def live(self) -> int: ...
    def working(self, places: int) -> Any: ...


@dataclass
class Ours:
    """The agent's own worker, with steps that do nothing."""

    database: Database
    begun: dict[str, float] = field(default_factory=dict)  # when a job's first step with work to do began
    wake: Callable[[], None] = lambda: None

    async def step(self, context: Context, claim: Claim, control: Control) -> Outcome:
        """Do nothing, and note when the files of a job were to be fetched."""
        if claim.job.state is State.STAGING:
            self.begun[claim.job.activity_id] = time.perf_counter()
        return await done(context, claim, control)

    async def empty(self) -> None:
        """Forget all jobs."""
        self.begun.clear()
        async with self.database.connection() as connection:
            await connection.execute("TRUNCATE jobs, node_runs, job_events, outputs, watched, deliveries")

    async def make(self, name: str) -> None:
        """Make a job as the evaluator does, after a hint on its Activity."""
        watch_list = WatchList(self.database)
        await watch_list.hint([Hint(name, "Activity", 0)], 3600, 3600)
        await self.start(name)

    async def start(self, name: str) -> None:
        """Make a job on an Activity that is known, and tell the worker."""
        await WatchList(self.database).start(Activity(name, 0, name, "project-1", (), ()), PLAN, "webhook")
        self.wake()

    async def live(self) -> int:
        """Return how many jobs have not ended."""
        async with self.database.connection() as connection:
            return int(await connection.fetchval("SELECT count(*) FROM jobs WHERE finished_at IS NULL"))

    @asynccontextmanager
    async def working(self, places: int) -> AsyncIterator[None]:
        """Run the worker."""
        third, rest = divmod(places, 3)
        stages = [third + (1 if number < rest else 0) for number in range(3)]
        nothing = cast("Any", None)
        context = Context(
            settings=AgentSettings(
                data_dir=Path("/nonexistent"),
                max_staging=stages[0],
                max_running=stages[1],
                max_collecting=stages[2],
            ),
            jobs=Jobs(self.database),
            outputs=Outputs(self.database),
            ovation=nothing,
            downloader=nothing,
            uploader=nothing,
            executor=nothing,
            room=Room(Path("/"), 0),
            cache=nothing,
        )
        worker = Worker(context, "here")
        self.wake = worker.wake
        with mock.patch.object(perform, "STEPS", dict.fromkeys(perform.STEPS, self.step)):
            task = asyncio.create_task(worker.run())
            try:
                yield
            finally:
                self.wake = lambda: None
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def filled(side: Side, jobs: int) -> None:
    """Leave so many jobs, and nothing else, to be done."""
    await side.empty()
    names = iter(f"job {number}" for number in range(jobs))

    async def some() -> None:
        for name in names:
            await side.make(name)

    await asyncio.gather(*(some() for _ in range(_CONNECTIONS)))


async def throughput(side: Side, jobs: int, places: int) -> float:
    """Return how many jobs a second the worker brings to their end, its own start included."""
    await filled(side, jobs)
    began = time.perf_counter()
    async with side.working(places):
        await _until(side, jobs)
        return jobs / (time.perf_counter() - began)


async def latencies(side: Side, jobs: int, places: int) -> list[float]:
    """Return the seconds from asking for a job to the beginning of its work, on an idle worker."""
    await side.empty()
    found = []
    async with side.working(places):
        await asyncio.sleep(0.5)  # it has started, and rests
        for number in range(jobs):
            name = f"job {number}"
            make: Callable[[str], Awaitable[None]] = side.make
            if isinstance(side, Ours):
                await WatchList(side.database).hint([Hint(name, "Activity", 0)], 3600, 3600)
                make = side.start
            asked = time.perf_counter()
            await make(name)
            await _until(side, number + 1)
            found.append(side.begun[name] - asked)
            await asyncio.sleep(_PAUSE_SECONDS)
    return found


async def _until(side: Side, jobs: int) -> None:
    """Wait until so many have begun and none is left: the database is asked only at the end."""
    deadline = time.perf_counter() + _LONGEST_SECONDS
    while len(side.begun) < jobs or await side.live():
        assert time.perf_counter() < deadline, f"{len(side.begun)} of {jobs} jobs have begun"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def sides() -> AsyncIterator[dict[str, Side]]:
    """Open both on one PostgreSQL, each with a database of its own and as many connections."""
    async with AsyncExitStack() as stack:
        url = stack.enter_context(debian_server())
        address = {}
        connection = await asyncpg.connect(url)
        for name in ("ours", "theirs"):
            await connection.execute(f"CREATE DATABASE {name}")
            address[name] = url.replace("/postgres?", f"/{name}?")
        await connection.close()
        database = await Database.open(address["ours"], "the bench's database", size=_CONNECTIONS)
        stack.push_async_callback(database.close)
        await database.migrate()
        peer = await stack.enter_async_context(theirs(address["theirs"], _CONNECTIONS))
        yield {"ours": Ours(database), "procrastinate": peer}


async def bench(options: argparse.Namespace) -> None:
    """Let them take turns, and say what came of it."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    version = procrastinate.__version__
    _OUT.print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, procrastinate {version}, {_load()} before\n")
    async with sides() as both:
        for places in options.places:
            rates: dict[str, list[float]] = {name: [] for name in both}
            for number in range(options.rounds):
                for name, side in both.items():
                    rates[name].append(await throughput(side, options.jobs, places))
                _OUT.print(f"{places} places: round {number + 1} of {options.rounds}, {_load()}", style="dim")
            _tell_rates(rates, places, options.jobs)
        waits: dict[str, list[list[float]]] = {name: [] for name in both}
        for number in range(options.rounds):
            for name, side in both.items():
                waits[name].append(await latencies(side, options.single, options.places[0]))
            _OUT.print(f"one at a time: round {number + 1} of {options.rounds}, {_load()}", style="dim")
        _tell_waits(waits)


async def profile(options: argparse.Namespace) -> None:
    """Say where a turn of each side spends its time: in this process, in PostgreSQL's, or in waiting."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    table = Table(title=f"{options.profile} places, {options.jobs} jobs a turn, in seconds; ms of processor a step")
    for heading in ("", "wall", "this process", "PostgreSQL", "steps", "this process, ms", "PostgreSQL, ms"):
        table.add_column(heading, justify="left" if not heading else "right")
    async with sides() as both:
        for name, side in both.items():
            await throughput(side, 100, options.profile)  # to warm up
            await filled(side, options.jobs)
            wall, own, servers = time.perf_counter(), time.process_time(), processor_seconds()
            async with side.working(options.profile):
                await _until(side, options.jobs)
            spent = [
                time.perf_counter() - wall,
                time.process_time() - own,
                processor_seconds() - servers,
            ]
            steps = options.jobs * (MOVES if name == "ours" else 1)
            each = [f"{seconds / steps * 1000:.2f}" for seconds in spent[1:]]
            table.add_row(name, *(f"{seconds:.2f}" for seconds in spent), f"{steps:,}", *each)
        await filled(both["ours"], options.jobs)
        profiler = cProfile.Profile()
        async with both["ours"].working(options.profile):
            profiler.enable()
            await _until(both["ours"], options.jobs)
            profiler.disable()
    _OUT.print(table)
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(20)


def _tell_rates(rates: dict[str, list[float]], places: int, jobs: int) -> None:
    table = Table(title=f"{places} places, {jobs} jobs a turn, {len(rates['ours'])} turns each")
    for heading in ("", "steps/s", "least to most", "jobs/s", "steps to its jobs", "least to most", "jobs to jobs"):
        table.add_column(heading, justify="left" if not heading else "right")
    peer = rates["procrastinate"]
    for name, each in rates.items():
        steps = [rate * (MOVES if name == "ours" else 1) for rate in each]
        ratios = [step / other for step, other in zip(steps, peer, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(steps):,.0f}",
            f"{min(steps):,.0f} to {max(steps):,.0f}",
            f"{statistics.median(each):,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(each) / statistics.median(peer):.2f}",
        )
    _OUT.print(table)
    ratio = statistics.median(MOVES * ours / other for ours, other in zip(rates["ours"], peer, strict=True))
    _verdict(f"steps at least {GOAL_RATIO:g} times procrastinate's jobs", ratio >= GOAL_RATIO)


def _tell_waits(waits: dict[str, list[list[float]]]) -> None:
    table = Table(title="A job is asked for → its work begins, on an idle worker, in ms")
    for heading in ("", "median", "least to most of the turns", "p95", "share", "least to most"):
        table.add_column(heading, justify="left" if not heading else "right")
    peer = [statistics.median(turn) for turn in waits["procrastinate"]]
    for name, turns in waits.items():
        medians = [statistics.median(turn) for turn in turns]
        shares = [median / other for median, other in zip(medians, peer, strict=True)]
        every = sorted(wait for turn in turns for wait in turn)
        table.add_row(
            name,
            f"{statistics.median(every) * 1000:.2f}",
            f"{min(medians) * 1000:.2f} to {max(medians) * 1000:.2f}",
            f"{every[int(len(every) * 0.95)] * 1000:.2f}",
            f"{statistics.median(shares):.2f}",
            f"{min(shares):.2f} to {max(shares):.2f}",
        )
    _OUT.print(table)
    ours = statistics.median(wait for turn in waits["ours"] for wait in turn)
    theirs = statistics.median(wait for turn in waits["procrastinate"] for wait in turn)
    _verdict("start latency no longer than procrastinate's", ours <= theirs)


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


def _verdict(goal: str, reached: bool) -> None:
    _OUT.print(f"goal: {goal}: {'reached' if reached else 'MISSED'}\n", style="green" if reached else "bold red")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute less, and a rougher answer")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--jobs", type=int, default=1000, help="of each turn")
    parser.add_argument("--single", type=int, default=100, help="jobs one at a time, of each turn")
    parser.add_argument("--places", type=int, nargs="+", default=[10, 30], help="jobs at once")
    parser.add_argument("--profile", type=int, metavar="PLACES", help="instead, where a turn spends its time")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.jobs, options.single = 3, 300, 40
    asyncio.run(profile(options) if options.profile else bench(options))


if __name__ == "__main__":
    main()
