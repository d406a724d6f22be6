"""What an agent costs that has nothing to do, and how soon the command line answers.

    python -m tests.bench.idle [--seconds 60]

A real `serve` process on a PostgreSQL server and the sandbox: what it takes of the processor and of memory by itself,
with the server's share of the processor beside it. `--help` in turns with a Python that does nothing at all.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.db.database import Database
from agent.sandbox.server import Sandbox
from tests.agents import running_agent
from tests.postgres import debian_server

GOAL_MIB = 90.0
GOAL_SHARE = 0.005
GOAL_HELP_SECONDS = 0.3
_REST_SECONDS = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")
_OUT = Console(width=120)


def cpu_seconds(pid: int) -> float:
    """Return what a process has had of the processor so far, its ended children included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def resident_mib(pid: int) -> float:
    """Return how much of a process is in memory."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def sessions(postmaster: int) -> list[int]:
    """Return the processes of a PostgreSQL server."""
    return [postmaster, *map(int, Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split())]


async def idle(seconds: float, directory: Path) -> None:
    """Watch an agent that has nothing to do."""
    async with AsyncExitStack() as stack:
        url = stack.enter_context(debian_server())
        database = await Database.open(url, "the bench's database")
        await database.migrate()
        await database.close()
        [socket] = re.findall(r"host=(\S+)", url)
        postmaster = int((Path(socket) / "data" / "postmaster.pid").read_text().splitlines()[0])
        sandbox = await stack.enter_async_context(Sandbox(directory / "sandbox"))
        environment = {**sandbox.environment(), "AGENT_DATABASE_URL": url}
        agent = await stack.enter_async_context(running_agent(environment, directory / "agent"))
        await asyncio.sleep(_REST_SECONDS)
        pid, servers = agent.process.pid, sessions(postmaster)
        began, used, served = time.monotonic(), cpu_seconds(pid), {each: cpu_seconds(each) for each in servers}
        await asyncio.sleep(seconds)
        share = (cpu_seconds(pid) - used) / (time.monotonic() - began)
        still = [each for each in servers if Path(f"/proc/{each}").exists()]
        server = sum(cpu_seconds(each) - served[each] for each in still) / (time.monotonic() - began)
        resident = resident_mib(pid)
    table = Table(title=f"An idle agent, {seconds:.0f} s", caption=_load())
    for heading in ("", "of a core", "resident MiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("agent", f"{share:.2%}", f"{resident:.1f}")
    table.add_row("PostgreSQL", f"{server:.2%}", "")
    _OUT.print(table)
    _verdict(f"less than {GOAL_SHARE:.1%} of a core", share < GOAL_SHARE)
    _verdict(f"at most {GOAL_MIB:.0f} MiB", resident <= GOAL_MIB)


def helped(rounds: int) -> None:
    """Time `--help`, in turns with Python alone."""
    commands = {"ovation-agent --help": ["-m", "agent", "--help"], "python -c pass": ["-c", "pass"]}
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, arguments in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            found[name].append(time.perf_counter() - began)
    table = Table(title=f"{rounds} times each, in turns, in ms", caption=_load())
    for heading in ("", "median", "least to most"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, each in found.items():
        table.add_row(
            name, f"{statistics.median(each) * 1000:.0f}", f"{min(each) * 1000:.0f} to {max(each) * 1000:.0f}"
        )
    _OUT.print(table)
    median = statistics.median(found["ovation-agent --help"])
    _verdict(f"--help within {GOAL_HELP_SECONDS} s", median < GOAL_HELP_SECONDS)
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import agent.cli"], check=True, capture_output=True, text=True
    ).stderr
    lines = [line.split("|") for line in told.splitlines()[1:]]
    slowest = sorted(((int(own.rpartition(":")[2]), name.strip()) for own, _, name in lines), reverse=True)[:10]
    _OUT.print("slowest imports of agent.cli by themselves, in ms:", style="dim")
    _OUT.print(", ".join(f"{name} {own / 1000:.1f}" for own, name in slowest), style="dim")


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


def _verdict(goal: str, reached: bool) -> None:
    _OUT.print(f"goal: {goal}: {'reached' if reached else 'MISSED'}\n", style="green" if reached else "bold red")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="to watch an idle agent for")
    parser.add_argument("--rounds", type=int, default=10, help="turns of `--help`")
    options = parser.parse_args()
    _OUT.print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, {_load()} before\n")
    helped(options.rounds)
    with tempfile.TemporaryDirectory(prefix="ovation-bench-") as directory:
        asyncio.run(idle(options.seconds, Path(directory)))


if __name__ == "__main__":
    main()
