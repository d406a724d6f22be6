"""How soon runs start and end on Slurm, beside bare `sbatch`, and what a thousand runs in flight cost.

    python -m tests.bench.slurm [--runs 20] [--tracked 1000]

A real Slurm of two nodes on this machine. A run is a container that says when it begins and ends; a bare job is a
batch script that says the same, and is asked about every half second. Both take turns, each after a pause of random
length: Slurm's scheduler looks once a second, and turns as long as each other would always meet it at the same point.
For the thousand, jobs that Slurm holds are waited for by one executor while a few run among them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.adapters.executor import Ended, RunRequest
from agent.adapters.slurm import SlurmExecutor
from agent.domain.slurm import Site
from tests.containers import make_request
from tests.slurm import Cluster, cluster, quick

GOAL_SECONDS = 2.0
_SCRIPT = 'began=$(cat /proc/uptime); sleep 0.5; echo "${began%% *}"; cut -d" " -f1 /proc/uptime'
_OVER = {"COMPLETED", "FAILED"}
_OUT = Console(width=120)


def _uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def _request(place: Path, script: str = _SCRIPT) -> RunRequest:
    return replace(make_request(place, script), name=f"ovation-{uuid.uuid4()}-1", time_limit_seconds=3600)


async def one(executor: SlurmExecutor, place: Path) -> tuple[float, float, float]:
    """Run a container; return the seconds to its batch script, on to itself, and from its end until that is known."""
    request = _request(place)
    asked = _uptime()
    await executor.start(request)
    end = await executor.wait(request, 60)
    known = _uptime()
    assert isinstance(end, Ended), end
    began, ended = map(float, request.stdout.read_text().split())
    script = (request.directory / "slurm.log").stat().st_mtime - (time.time() - _uptime())  # made then, and left empty
    return script - asked, began - script, known - ended


async def bare(slurm: Cluster, place: Path) -> tuple[float, float, float]:
    """Run a batch script, as one does by hand; the same figures."""
    place.mkdir()
    script = _SCRIPT.replace("echo", "sleep 0; echo")
    asked = _uptime()
    job = slurm.run("sbatch", "--parsable", f"--output={place}/out", "--wrap", script).strip()
    while slurm.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip() not in _OVER:  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    known = _uptime()
    began, ended = map(float, (place / "out").read_text().split())
    return began - asked, 0.0, known - ended


async def lags(slurm: Cluster, place: Path, runs: int) -> None:
    """Measure both in turns."""
    executor = SlurmExecutor(quick(tick_seconds=2.0), slurm.environment)
    found: dict[str, list[tuple[float, float, float]]] = {"agent": [], "bare sbatch": []}
    for number in range(runs):
        await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311 no secret
        found["agent"].append(await one(executor, place / f"a{number}"))
        await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311 no secret
        found["bare sbatch"].append(await bare(slurm, place / f"b{number}"))
    table = Table(title=f"{runs} runs each, in turns, in ms: median (least to most)", caption=_load())
    for heading in ("", "asked for → batch script begun", "→ container begun", "ended → known"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, pairs in found.items():
        table.add_row(name, *(_spread(values) for values in zip(*pairs, strict=True)))
    _OUT.print(table)


async def tracked(slurm: Cluster, place: Path, count: int, running: int = 20) -> None:
    """Wait for many at once, most of which are held, and see the ends of those that run."""
    held = SlurmExecutor(quick(site=Site(arguments=("--hold",)), tick_seconds=2.0), slurm.environment)
    waiting = [_request(place / f"h{number}") for number in range(count - running)]
    began = time.monotonic()
    await asyncio.gather(*(held.start(request) for request in waiting))
    submitted = (time.monotonic() - began) / len(waiting)
    tasks = [asyncio.create_task(held.wait(request, 600)) for request in waiting]
    await asyncio.sleep(4)
    cpu, calls, began = _cpu_seconds(), held.client.calls, time.monotonic()
    await asyncio.sleep(30)
    passed = time.monotonic() - began
    share, a_tick = (_cpu_seconds() - cpu) / passed, (held.client.calls - calls) / (passed / 2.0)
    free = SlurmExecutor(quick(tick_seconds=2.0), slurm.environment)
    free.client = held.client  # one for all, as in an agent
    lag = [(await one(free, place / f"r{number}"))[-1] for number in range(running)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    slurm.run("scancel", f"--user={os.geteuid()}")
    table = Table(title=f"{count:,} runs in flight", caption=_load())
    for heading in ("a submission", "of a core, waiting", "calls a tick", "ended → known, ms"):
        table.add_column(heading, justify="right")
    table.add_row(f"{submitted * 1000:.0f} ms", f"{share:.1%}", f"{a_tick:.2f}", _spread(lag))
    _OUT.print(table)
    reached = max(lag) <= GOAL_SECONDS and a_tick <= 1.1
    _OUT.print(f"goal: seen within {GOAL_SECONDS:g} s, one call a tick: {'reached' if reached else 'MISSED'}")


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _spread(values: Sequence[float]) -> str:
    shown = [round(value * 1000) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]:,} ({shown[1]:,} to {shown[2]:,})"


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


async def _measure(runs: int, count: int) -> None:
    with cluster() as slurm, tempfile.TemporaryDirectory(prefix="ovation-bench-") as directory:
        Path(directory).chmod(0o755)
        await lags(slurm, Path(directory), runs)
        await tracked(slurm, Path(directory), count)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each, in turns")
    parser.add_argument("--tracked", type=int, default=1000, help="runs in flight")
    options = parser.parse_args()
    _OUT.print(f"{os.cpu_count()} cores, {_load()} before\n")
    asyncio.run(_measure(options.runs, options.tracked))


if __name__ == "__main__":
    main()
