"""How many webhooks the agent takes, and how soon it answers. `make bench` runs it and prints tables.

Sender, agent and PostgreSQL (the embedded one, with fsync) share this machine's cores, so figures of two machines, or
of two hours on one, say little: the kinds of inbox take turns within one run, and their ratios are what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.db.database import Database
from agent.db.embedded import EmbeddedServer
from tests.agents import running_agent
from tests.bench.load import Load

KINDS = {"none": "no database", "each": "one INSERT each", "group": "group commit"}
GOAL_SHARE = 0.4
GOAL_P99_SECONDS = 0.05
_WARM_SECONDS = 3.0
_OUT = Console(width=120)


async def program(module: str, *arguments: str) -> asyncio.subprocess.Process:
    """Start one of the bench's own programs."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"tests.bench.{module}", *arguments, stdout=asyncio.subprocess.PIPE
    )


@asynccontextmanager
async def front(kind: str, dsn: str) -> AsyncIterator[str]:
    """Run a front door and yield its address."""
    process = await program("front", kind, dsn)
    assert process.stdout is not None
    try:
        yield json.loads(await process.stdout.readline())
    finally:
        process.terminate()
        await process.wait()


async def load(kind: str, address: str, seconds: float, rate: float, connections: int) -> Load:
    """Let a sender of its own process run."""
    process = await program("load", kind, address, str(seconds), str(rate), str(connections))
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return Load(**json.loads(printed))


async def saturation(options: argparse.Namespace, directory: Path) -> None:
    """Compare the kinds of inbox, in turns."""
    server = await EmbeddedServer.start(directory / "postgres")
    found: dict[str, list[Load]] = {kind: [] for kind in KINDS}
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop)
        database = await Database.open(server.dsn, "the bench's database")
        await database.migrate()
        await database.close()
        addresses = {kind: await stack.enter_async_context(front(kind, server.dsn)) for kind in KINDS}
        for kind, address in addresses.items():
            await load("saturate", address, 1, 0, options.connections)
            _OUT.print(f"warm: {KINDS[kind]}", style="dim")
        for number in range(options.rounds):
            for kind, address in addresses.items():
                found[kind].append(await load("saturate", address, options.seconds, 0, options.connections))
            _OUT.print(f"round {number + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}", style="dim")
    table = Table(title=f"At saturation, {options.connections} connections, {options.rounds} rounds in turns")
    for heading in ("", "deliveries/s", "least to most", "p99 ms", "share", "least to most", "refused"):
        table.add_column(heading, justify="left" if not heading else "right")
    shares: dict[str, list[float]] = {}
    for kind, name in KINDS.items():
        rates = [each.answers / each.seconds for each in found[kind]]
        without = [each.answers / each.seconds for each in found["none"]]
        shares[kind] = [rate / most for rate, most in zip(rates, without, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(rates):,.0f}",
            f"{min(rates):,.0f} to {max(rates):,.0f}",
            f"{statistics.median(each.p99 for each in found[kind]) * 1000:.0f}",
            f"{statistics.median(shares[kind]):.2f}",
            f"{min(shares[kind]):.2f} to {max(shares[kind]):.2f}",
            str(sum(each.refused for each in found[kind])),
        )
    _OUT.print(table)
    _verdict(f"group commit at least {GOAL_SHARE} of no database", statistics.median(shares["group"]) >= GOAL_SHARE)


async def endurance(options: argparse.Namespace, directory: Path) -> None:
    """Send at a steady rate to a whole agent with its embedded database, and to a front door that has none."""
    async with front("none", "") as address:
        bare = await load("steady", address, options.steady_seconds / 3, options.rate, options.connections)
    nowhere = {"OVATION_API_URL": "http://127.0.0.1:9", "OVATION_TOKEN": "nothing", "OVATION_HOSTS": "127.0.0.1"}
    resting = {"AGENT_SETTLE_SECONDS": "3600", "AGENT_SETTLE_MAX_SECONDS": "3600", "AGENT_RECONCILE_SECONDS": "86400"}
    async with running_agent(nowhere, directory / "agent", **resting) as agent:
        await load("steady", agent.address, _WARM_SECONDS, options.rate, options.connections)
        sending = asyncio.create_task(
            load("steady", agent.address, options.steady_seconds, options.rate, options.connections)
        )
        syncs: list[float] = []
        probing = asyncio.create_task(_probe_disk(directory / "probe", syncs))
        sizes = [_resident_mib(agent.process.pid)]
        for _ in range(2):
            await asyncio.sleep(options.steady_seconds / 2)
            sizes.append(_resident_mib(agent.process.pid))
        sent = await sending
        probing.cancel()
    table = Table(title=f"{options.rate:,.0f} deliveries a second for {options.steady_seconds:.0f} s, latency in ms")
    for heading in ("", "answers", "refused", "median", "p99", "longest", "sender's lag p99", "resident MiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    resident = ", ".join(f"{size:.1f}" for size in sizes)
    for name, each, memory in (("no database", bare, ""), ("a whole agent", sent, resident)):
        times = [f"{seconds * 1000:.1f}" for seconds in (each.median, each.p99, each.longest, each.lag)]
        table.add_row(name, f"{each.answers:,}", str(each.refused), *times, memory)
    median, p99 = (sorted(syncs)[int(len(syncs) * share)] * 1000 for share in (0.5, 0.99))
    table.caption = (
        f"load average {os.getloadavg()[0]:.1f} at the end; memory at the start, in the middle, at the end;"
        f" meanwhile an fsync of the bench's own took {median:.1f} ms, p99 {p99:.1f} ms"
    )
    _OUT.print(table)
    _verdict(f"p99 below {GOAL_P99_SECONDS * 1000:.0f} ms", sent.p99 < GOAL_P99_SECONDS and sent.refused == 0)


async def _probe_disk(path: Path, seconds: list[float]) -> None:
    """Measure what a commit costs at least: a block written and synced, ten times a second."""

    def sync() -> float:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(b"x" * 8192)
            file.flush()
            os.fdatasync(file.fileno())
        return time.perf_counter() - began

    while True:
        seconds.append(await asyncio.to_thread(sync))
        await asyncio.sleep(0.1)


def _resident_mib(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def _verdict(goal: str, reached: bool) -> None:
    _OUT.print(f"goal: {goal}: {'reached' if reached else 'MISSED'}\n", style="green" if reached else "bold red")


async def bench(options: argparse.Namespace) -> None:
    """Run what was asked for."""
    one, five, _ = os.getloadavg()
    _OUT.print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, load average {one:.1f}, {five:.1f} before\n")
    with tempfile.TemporaryDirectory(prefix="ovation-bench-") as directory:
        if options.only != "steady":
            await saturation(options, Path(directory))
        if options.only != "saturation":
            await endurance(options, Path(directory))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["saturation", "steady"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kind at saturation")
    parser.add_argument("--seconds", type=float, default=4, help="of each turn")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1000, help="deliveries a second")
    parser.add_argument("--steady-seconds", type=float, default=60)
    asyncio.run(bench(parser.parse_args()))


if __name__ == "__main__":
    main()
