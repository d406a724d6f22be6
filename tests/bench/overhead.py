"""What the agent adds to a run: before its container starts, after it ends, and to many small ones back to back.

    python -m tests.bench.overhead [--quick]

A real `serve` process with a PostgreSQL server, real Apptainer, and the sandbox, which answers at once; it shares this
machine's cores. Beside it, in turns, the very command with which the agent starts its container, by itself. The
script in the container prints the time as it begins and as it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
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
from tests.images import images, write_script
from tests.lab import Lab
from tests.postgres import debian_server, processor_seconds

GOAL_SECONDS = 0.15
GOAL_SHARE = 0.8
RUNNING = 2
WAIT = "wait.sh"
SCRIPT = """began=$EPOCHREALTIME
. /inputs/wait.sh
echo "some result" > /outputs/result.txt
echo "$began $EPOCHREALTIME"
"""
_SETTINGS = {
    "AGENT_SETTLE_SECONDS": "0",
    "AGENT_RECONCILE_SECONDS": "86400",
    "AGENT_KEEP_SECONDS": "86400",
    "AGENT_MAX_RUNNING": str(RUNNING),
}
_LONGEST_SECONDS = 900.0
_OUT = Console(width=120)


@dataclass(frozen=True, slots=True)
class Times:
    """One run, in seconds: from its being asked for to the script's beginning, and from its end to the last result."""

    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Bare:
    """The agent's command for its container, on files of its own."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    inputs: Path

    @classmethod
    def like(cls, run: Path, directory: Path) -> Bare:
        """Take over the command that the agent ran in the directory `run`, with what it binds."""
        spec = json.loads((run / "spec.json").read_text())
        there, here = str(run.parent), str(directory)
        for name in ("inputs", "related", "run-1/outputs", "run-1/scratch", "run-1/private"):
            (directory / name).mkdir(parents=True)
        for name in ("outputs", "scratch"):
            (directory / "run-1" / name).chmod(0o777)  # the container runs as somebody else
        write_script(directory / "inputs", SCRIPT)
        argv = [word.replace(there, here) for word in spec["argv"]]
        shutil.copy(images().scripted, argv[-1])
        environment = {name: value.replace(there, here) for name, value in spec["environment"].items()}
        return cls(argv, environment, directory / "inputs")

    async def run(self, seconds: float) -> Times:
        """Run it once, with a script that takes so long."""
        (self.inputs / WAIT).write_text(_wait(seconds))
        began = time.time()
        process = await asyncio.create_subprocess_exec(
            *self.argv,
            env=dict(self.environment),
            cwd="/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        printed, _ = await process.communicate()
        ended = time.time()
        assert process.returncode == 0, printed
        script_began, script_ended = map(float, printed.split())
        return Times(script_began - began, ended - script_ended)


class Bench:
    """A laboratory whose Activities are told of by the bench itself, so that the moment is known."""

    def __init__(
        self, lab: Lab, agent: AgentProcess, database: asyncpg.Connection, http: aiohttp.ClientSession
    ) -> None:
        self._lab = lab
        self._agent = agent
        self._database = database
        self._http = http
        self._script = lab.revision("script.sh", SCRIPT)
        self._waits: dict[float, str] = {}
        self._image = lab.image()

    def activity(self, seconds: float) -> str:
        """Make an Activity that nobody is told of yet, whose script takes so long."""
        if seconds not in self._waits:
            self._waits[seconds] = self._lab.revision(WAIT, _wait(seconds))
        return self._lab.activity(None, inputs=[self._script, self._waits[seconds]], related=[self._image])

    def cpu_seconds(self) -> dict[str, float]:
        """Return what each party has had of the processors so far; containers and their runners are not in it."""
        fields = Path(f"/proc/{self._agent.process.pid}/stat").read_text().rpartition(")")[2].split()
        own, children = (sum(map(int, fields[first : first + 2])) / os.sysconf("SC_CLK_TCK") for first in (11, 13))
        return {
            "agent": own,
            "its programs": children,
            "PostgreSQL": processor_seconds(),
            "sandbox and bench": time.process_time(),
        }

    async def tell(self, activity_id: str) -> float:
        """Send its webhook; return when that was accepted."""
        body = {"type": "Activity", "_id": activity_id, "organization_id": 0}
        headers = {"Authorization": aiohttp.encode_basic_auth(WEBHOOK_KEY, WEBHOOK_KEY)}
        async with self._http.post(f"{self._agent.address}/webhooks/ovation", json=body, headers=headers) as response:
            assert response.status == 202, await response.text()
        return time.time()

    async def job(self) -> tuple[Times, Path]:
        """Have one Activity run."""
        accepted = await self.tell(activity_id := self.activity(0))
        job_id = await self.ended([activity_id])
        linked: float = await self._database.fetchval(
            "SELECT extract(epoch FROM at)::float8 FROM job_events WHERE job_id = $1 AND state = 'reporting'", job_id
        )
        run = self._lab.data_dir / "jobs" / str(job_id) / "run-1"
        began, ended = map(float, (run / "stdout.log").read_text().split())
        return Times(began - accepted, linked - ended), run

    async def ended(self, activity_ids: Sequence[str]) -> Any:
        """Wait until a run of each has ended well, and return the id of the last one's job."""
        query = "SELECT count(*), max(id::text) FROM jobs WHERE activity_id = ANY($1) AND state = 'succeeded'"

        async def look() -> Any:
            count, job_id = await self._database.fetchrow(query, activity_ids)
            return job_id if count == len(activity_ids) else None

        return await until(look, f"the end of {len(activity_ids)} runs", self._agent.log, _LONGEST_SECONDS)


async def one_by_one(bench: Bench, bare: Bare, rounds: int) -> None:
    """Compare single runs, in turns."""
    jobs, alone = [], []
    for _ in range(rounds):
        jobs.append((await bench.job())[0])
        alone.append(await bare.run(0))
    table = Table(title=f"One run at a time, {rounds} of each in turns, in ms")
    for heading in ("", "", "median", "quartiles", "p95"):
        table.add_column(heading, justify="left" if not heading else "right")
    reached = True
    for what, part in (("asked for → script begins", "before"), ("script ends → last result", "after")):
        agents, bares = ([getattr(each, part) for each in every] for every in (jobs, alone))
        added = [agent - bare for agent, bare in zip(agents, bares, strict=True)]
        reached = reached and statistics.median(added) <= GOAL_SECONDS
        for name, found in (("agent", agents), ("apptainer run", bares), ("added", added)):
            low, middle, high = (each * 1000 for each in statistics.quantiles(found, n=4))
            last = sorted(found)[int(len(found) * 0.95)] * 1000
            table.add_row(what, name, f"{middle:.0f}", f"{low:.0f} to {high:.0f}", f"{last:.0f}")
    table.caption = _load()
    _OUT.print(table)
    _verdict(f"at most {GOAL_SECONDS * 1000:.0f} ms are added on either side", reached)


async def back_to_back(bench: Bench, bare: Bare, jobs: int, seconds: float) -> None:
    """Compare many runs that take so long, as many at a time."""
    activity_ids = [bench.activity(seconds) for _ in range(jobs)]
    used, began = bench.cpu_seconds(), time.perf_counter()
    await asyncio.gather(*(bench.tell(activity_id) for activity_id in activity_ids))
    await bench.ended(activity_ids)
    took = time.perf_counter() - began
    used = {party: spent - used[party] for party, spent in bench.cpu_seconds().items()}
    left = iter(range(jobs))

    async def loop() -> None:
        for _ in left:
            await bare.run(seconds)

    began = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(RUNNING)))
    alone = time.perf_counter() - began
    table = Table(title=f"{jobs} runs of a script of {seconds:g} s back to back, {RUNNING} at a time", caption=_load())
    for heading in ("", "runs/s", "share"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("agent", f"{jobs / took:.2f}", f"{alone / took:.2f}")
    table.add_row("apptainer run", f"{jobs / alone:.2f}", "1.00")
    _OUT.print(table)
    each = ", ".join(f"{party} {spent / jobs * 1000:.0f} ms" for party, spent in used.items())
    _OUT.print(f"processor time a run: {each}; of {os.cpu_count()} cores for {took / jobs * 1000:.0f} ms", style="dim")
    _verdict(f"at least {GOAL_SHARE} of the runs without the agent", alone / took >= GOAL_SHARE)


async def bench(options: argparse.Namespace) -> None:
    """Open everything, and run what was asked for."""
    _OUT.print(f"{os.cpu_count()} cores, {_load()} before\n")
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ovation-bench-")))
        directory.chmod(0o755)
        url = stack.enter_context(debian_server())
        database = await Database.open(url, "the bench's database")
        await database.migrate()
        await database.close()
        connection = await asyncpg.connect(url)
        stack.push_async_callback(connection.close)
        sandbox = await stack.enter_async_context(Sandbox(directory / "sandbox"))
        lab = Lab(sandbox, directory)
        settings = {**_SETTINGS, "AGENT_DATABASE_URL": url}
        agent = await stack.enter_async_context(running_agent(sandbox.environment(), directory / "agent", **settings))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        runs = Bench(lab, agent, connection, http)
        _, run = await runs.job()
        bare = Bare.like(run, directory / "bare")
        await bare.run(0)
        if options.only != "many":
            await one_by_one(runs, bare, options.single)
        if options.only != "single":
            await back_to_back(runs, bare, options.jobs, 0)
            await back_to_back(runs, bare, options.jobs // 10, 1)


def _wait(seconds: float) -> str:
    return f"sleep {seconds:g}\n" if seconds else "true\n"


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


def _verdict(goal: str, reached: bool) -> None:
    _OUT.print(f"goal: {goal}: {'reached' if reached else 'MISSED'}\n", style="green" if reached else "bold red")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["single", "many"])
    parser.add_argument("--quick", action="store_true", help="100 runs back to back")
    parser.add_argument("--single", type=int, default=40, help="runs one at a time")
    parser.add_argument("--jobs", type=int, default=1000, help="runs back to back; a tenth of them of a second each")
    options = parser.parse_args()
    if options.quick:
        options.single, options.jobs = 15, 100
    asyncio.run(bench(options))


if __name__ == "__main__":
    main()
