"""What a delivery and a run cost, and what that says of many a day.

    python -m tests.bench.scaling [--runs 60] [--deliveries 2000] [--runs-a-day 100000] [--deliveries-a-day 1000000]

A real `serve` process on a PostgreSQL server and the sandbox, with tiny files and scripts. Counted are the processor
time of the agent, transactions, rows, bytes of write-ahead log and of tables, and requests to Ovation and the store.
The model multiplies: it says where the limit is, not how long anything takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
from rich.console import Console
from rich.table import Table

from agent.db.database import Database
from agent.sandbox.server import Sandbox
from tests.agents import WEBHOOK_KEY, AgentProcess, running_agent, until
from tests.lab import Lab
from tests.postgres import debian_server

_DAY_SECONDS = 86_400
_TABLES = ("deliveries", "watched", "jobs", "job_events", "outputs")
_OUT = Console(width=120)


@dataclass(frozen=True, slots=True)
class Cost:
    """What so many of something have cost: seconds, counts, bytes."""

    cpu_seconds: float
    transactions: float
    rows: float
    wal_bytes: float
    table_bytes: float
    ovation_calls: float
    store_calls: float

    def each(self, count: int) -> Cost:
        """Return what one has cost."""
        return Cost(*(getattr(self, name) / count for name in self.__slots__))

    def minus(self, other: Cost) -> Cost:
        """Return what was added since `other`."""
        return Cost(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))


class Meter:
    """Reads what has been used so far."""

    def __init__(self, agent: AgentProcess, database: asyncpg.Connection, calls: Counter[str]) -> None:
        self._agent = agent
        self._database = database
        self._calls = calls

    async def read(self) -> Cost:
        """Return everything since the beginning."""
        fields = Path(f"/proc/{self._agent.process.pid}/stat").read_text().rpartition(")")[2].split()
        await self._database.execute("SELECT pg_stat_force_next_flush()")
        await asyncio.sleep(1.5)  # the other sessions report once a second
        commits, rows = await self._database.fetchrow(
            "SELECT xact_commit, tup_inserted + tup_updated FROM pg_stat_database WHERE datname = current_database()"
        )
        wal = await self._database.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8")
        size = sum(
            [await self._database.fetchval("SELECT pg_total_relation_size($1::regclass)", each) for each in _TABLES]
        )
        return Cost(
            cpu_seconds=sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"),
            transactions=commits,
            rows=rows,
            wal_bytes=wal,
            table_bytes=size,
            ovation_calls=self._calls["api"],
            store_calls=self._calls["store"],
        )


async def measure(directory: Path, runs: int, deliveries: int) -> tuple[Cost, Cost]:
    """Return what a delivery and what a run costs."""
    async with AsyncExitStack() as stack:
        url = stack.enter_context(debian_server())
        database = await Database.open(url, "the bench's database")
        await database.migrate()
        await database.close()
        connection = await asyncpg.connect(url)
        stack.push_async_callback(connection.close)
        sandbox = await stack.enter_async_context(Sandbox(directory / "sandbox"))
        calls: Counter[str] = Counter()
        match = sandbox.faults.match

        def count(target: str, method: str, where: str) -> Any:
            calls[target] += 1
            return match(target, method, where)

        sandbox.faults.match = count  # type: ignore[method-assign]
        lab = Lab(sandbox, directory)
        settings = {"AGENT_DATABASE_URL": url, "AGENT_SETTLE_SECONDS": "1", "AGENT_RECONCILE_SECONDS": "86400"}
        agent = await stack.enter_async_context(running_agent(sandbox.environment(), directory / "agent", **settings))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        script, image = lab.revision("script.sh", "echo result > /outputs/result.txt"), lab.image()
        warm = lab.activity(None, inputs=[script], related=[image])
        await _tell(http, agent, warm)
        await agent.job(warm)
        meter = Meter(agent, connection, calls)

        before = await meter.read()
        for _ in range(deliveries):
            await _tell(http, agent, warm)
        await asyncio.sleep(3)  # the look that they lead to
        a_delivery = (await meter.read()).minus(before).each(deliveries)

        activities = [lab.activity(None, inputs=[script], related=[image]) for _ in range(runs)]
        before = await meter.read()
        for activity_id in activities:
            await _tell(http, agent, activity_id)

        async def all_ended() -> bool | None:
            ended = await connection.fetchval("SELECT count(*) FROM jobs WHERE finished_at IS NOT NULL")
            return bool(ended >= runs + 1) or None

        await until(all_ended, "all runs", agent.log, seconds=600)
        return a_delivery, (await meter.read()).minus(before).each(runs)


async def _tell(http: aiohttp.ClientSession, agent: AgentProcess, activity_id: str) -> None:
    body = {"type": "Activity", "_id": activity_id, "organization_id": 0}
    headers = {"Authorization": aiohttp.encode_basic_auth(WEBHOOK_KEY, WEBHOOK_KEY)}
    async with http.post(f"{agent.address}/webhooks/ovation", json=body, headers=headers) as response:
        assert response.status == 202, await response.text()


def show(a_delivery: Cost, a_run: Cost, runs: int, deliveries: int) -> None:
    """Print the coefficients and the model."""
    table = Table(title="What one costs", caption=f"load average {os.getloadavg()[0]:.1f}")
    for heading in ("", "a delivery", "a run", f"a day of {deliveries:,} and {runs:,}", "a second, on average"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, title in {
        "cpu_seconds": "agent's processor, s",
        "transactions": "transactions",
        "rows": "rows written",
        "wal_bytes": "write-ahead log, bytes",
        "table_bytes": "tables and indexes, bytes",
        "ovation_calls": "requests to Ovation",
        "store_calls": "requests to the store",
    }.items():
        one, other = getattr(a_delivery, name), getattr(a_run, name)
        day = one * deliveries + other * runs
        table.add_row(title, f"{one:,.4g}", f"{other:,.4g}", f"{day:,.3g}", f"{day / _DAY_SECONDS:,.3g}")
    _OUT.print(table)
    cores = (a_delivery.cpu_seconds * deliveries + a_run.cpu_seconds * runs) / _DAY_SECONDS
    _OUT.print(f"processor cores that agents need on average: {cores:.2f}, without Apptainer and the containers")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--deliveries", type=int, default=2000)
    parser.add_argument("--runs-a-day", type=int, default=100_000)
    parser.add_argument("--deliveries-a-day", type=int, default=1_000_000)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ovation-bench-") as directory:
        costs = asyncio.run(measure(Path(directory), options.runs, options.deliveries))
    show(*costs, options.runs_a_day, options.deliveries_a_day)
    _OUT.print(f"measured in {time.monotonic() - began:.0f} s", style="dim")


if __name__ == "__main__":
    main()
