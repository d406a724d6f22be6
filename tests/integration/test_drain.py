"""SIGTERM drains: nothing new is begun, steps get a while to end, containers go on, and the agent ends with 0."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from agent.sandbox.faults import FaultKind
from agent.sandbox.server import Sandbox
from tests.agents import WEBHOOK_KEY, AgentProcess, agent_environment, running_agent, until
from tests.lab import Lab
from tests.workers import migrated

WAITS_FOR_A_SIGN = """
    echo start >> /outputs/starts
    i=0; while [ ! -e /outputs/sign ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done
    rm -f /outputs/sign; echo end >> /outputs/ends
"""


class Place:
    """A laboratory whose database outlives its agents."""

    def __init__(self, lab: Lab, database_url: str, connection: asyncpg.Connection, settings: dict[str, str]) -> None:
        self.lab = lab
        self.database_url = database_url
        self._connection = connection
        self._settings = settings

    async def again(self, **settings: str) -> AgentProcess:
        """Start the next agent on the same data directory."""
        environment = agent_environment(
            self.lab.sandbox.environment(), self.lab.directory / "agent", **{**self._settings, **settings}
        )
        self.lab.agent = await AgentProcess.start(environment, self.lab.directory / "agent" / "agent.log")
        self.lab.watch(self.lab.agent)
        return self.lab.agent

    async def one(self, query: str, *values: object) -> Any:
        """Ask the database for one value."""
        return await self._connection.fetchval(query, *values)

    async def is_left_in_order(self) -> None:
        """See that an agent that stopped has let go of everything, and said so."""
        assert await self.one("SELECT count(*) FROM jobs WHERE lease_until IS NOT NULL") == 0
        assert await self.one("SELECT count(*) FROM jobs WHERE attempt > 0 OR suspicion > 0") == 0
        assert await self.one("SELECT count(*) FROM agents WHERE stopped_at IS NULL") == 0
        assert await self.one("SELECT count(*) FROM job_events WHERE note LIKE '%stopped answering%'") == 0


@asynccontextmanager
async def place(directory: Path, database_url: str, **settings: str) -> AsyncIterator[Place]:
    """Open a laboratory on a given server."""
    settings = {"AGENT_DATABASE_URL": database_url, "AGENT_DRAIN_SECONDS": "30", **settings}
    async with Sandbox(directory / "sandbox") as sandbox:
        lab = Lab(sandbox, directory)
        async with migrated(database_url):
            pass
        connection = await asyncpg.connect(database_url)
        async with running_agent(sandbox.environment(), directory / "agent", **settings) as agent:
            lab.watch(agent)
            opened = Place(lab, database_url, connection, settings)
            try:
                yield opened
            finally:
                if lab.agent.process.returncode is None:
                    await lab.agent.kill()
                await connection.close()


async def stop(agent: AgentProcess, number: signal.Signals = signal.SIGTERM) -> float:
    """Send a signal, wait for the agent's end with 0, and return how many seconds that took."""
    began = time.monotonic()
    agent.process.send_signal(number)
    assert await asyncio.wait_for(agent.process.wait(), 60) == 0, agent.log.read_text()[-4000:]
    return time.monotonic() - began


async def drains(agent: AgentProcess) -> None:
    """Wait until an agent drains."""

    async def look() -> bool | None:
        return bool(agent.events("draining")) or None

    await until(look, "it drains", agent.log)


async def stages_slowly(lab: Lab, bytes_per_second: int, size: int) -> tuple[str, Path]:
    """Begin a run one of whose inputs drips in, wait until it does, and return the Activity and where it goes."""
    lab.sandbox.faults.add(FaultKind.DRIP, r"GET .*large\.bin", target="store", bytes_per_second=bytes_per_second)
    files = [lab.revision("small.bin", b"s" * 1000), lab.revision("large.bin", b"l" * size)]
    activity_id = lab.activity("cat /inputs/*.bin | wc -c > /outputs/size", inputs=files)
    job = await lab.agent.job(activity_id, states={"staging"})
    inputs = lab.data_dir / "jobs" / job["id"] / "inputs"

    async def comes() -> bool | None:
        return ((inputs / "small.bin").exists() and any(lab.data_dir.rglob(".*.part"))) or None

    await until(comes, "one file in place, one on its way", lab.agent.log)
    return activity_id, inputs


async def test_a_step_that_ends_in_time_ends(tmp_path: Path, database_url: str) -> None:
    async with place(tmp_path, database_url) as here:
        activity_id, _ = await stages_slowly(here.lab, 200_000, 800_000)
        seconds = await stop(here.lab.agent)
        assert 2.2 < seconds < 20, seconds  # more than a worker's idle wait, less than the deadline
        assert await here.one("SELECT state FROM jobs WHERE activity_id = $1", activity_id) == "launching"
        await here.is_left_in_order()
        agent = await here.again()
        assert (await agent.job(activity_id))["state"] == "succeeded"
        assert (await here.lab.outputs(activity_id))["size"] == b"801000\n"


async def test_a_step_that_does_not_is_cut_and_gone_on_with(tmp_path: Path, database_url: str) -> None:
    async with place(tmp_path, database_url, AGENT_DRAIN_SECONDS="1") as here:
        activity_id, inputs = await stages_slowly(here.lab, 20_000, 2_000_000)
        inode = (inputs / "small.bin").stat().st_ino
        seconds = await stop(here.lab.agent)
        assert 0.9 < seconds < 8, seconds
        assert await here.one("SELECT state FROM jobs WHERE activity_id = $1", activity_id) == "staging"
        await here.is_left_in_order()
        here.lab.sandbox.faults.remove()
        assert (inputs / "small.bin").stat().st_ino == inode
        agent = await here.again()
        job = await agent.job(activity_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 0)
        assert (await here.lab.outputs(activity_id))["size"] == b"2001000\n"


async def test_asked_twice_it_ends_at_once(tmp_path: Path, database_url: str) -> None:
    async with place(tmp_path, database_url) as here:
        await stages_slowly(here.lab, 20_000, 2_000_000)
        agent = here.lab.agent
        agent.process.send_signal(signal.SIGINT)
        await drains(agent)
        assert await stop(agent, signal.SIGINT) < 5
        await here.is_left_in_order()


async def test_containers_go_on_and_what_is_delivered_ends(tmp_path: Path, database_url: str) -> None:
    """One job runs, one delivers; what nobody has begun by then is begun by the next agent."""
    async with place(tmp_path, database_url, AGENT_MAX_RUNNING="1", AGENT_SETTLE_SECONDS="0") as here:
        lab = here.lab
        lab.sandbox.faults.add(FaultKind.LATENCY, r"^PUT .*slow", target="store", seconds=3)
        delivers = lab.activity("echo 1 > /outputs/slow")
        await lab.agent.job(delivers, states={"collecting"})
        runs = lab.activity(WAITS_FOR_A_SIGN)
        job = await lab.agent.job(runs, states={"running"})
        outputs = lab.data_dir / "jobs" / job["id"] / "run-1" / "outputs"
        waits = lab.activity("true")
        await lab.agent.job(waits, states={"launching"})

        async def is_slow() -> bool | None:
            return any(fault.hits for fault in lab.sandbox.faults.faults) or None

        await until(is_slow, "a slow upload", lab.agent.log)
        before = await here.one("SELECT max(id) FROM job_events")
        await stop(lab.agent)
        await here.is_left_in_order()
        moves = "SELECT array_agg(activity_id || ' ' || e.state) FROM job_events e JOIN jobs j ON j.id = e.job_id"
        moved = await here.one(f"{moves} WHERE e.id > $1", before)
        assert moved == [f"{delivers} reporting"]
        assert not (outputs.parent / "exit.json").exists()
        (outputs / "sign").touch()
        agent = await here.again()
        for activity_id in (delivers, runs, waits):
            job = await agent.job(activity_id)
            assert (job["state"], job["attempt"], job["launch"]) == ("succeeded", 0, 1)
        found = await lab.outputs(runs)
        assert (found["starts"], found["ends"]) == (b"start\n", b"end\n")
        assert (await lab.outputs(delivers))["slow"] == b"1\n"


async def test_no_webhook_is_lost_while_it_drains(tmp_path: Path, database_url: str) -> None:
    """What was answered with 202 is in the database; everything else is refused, and the sender tries again."""
    async with place(tmp_path, database_url) as here:
        await stages_slowly(here.lab, 200_000, 500_000)
        agent = here.lab.agent
        taken: list[str] = []
        refused: list[int] = []
        goes_on = True

        async def send(sender: int) -> None:
            headers = {"Authorization": aiohttp.encode_basic_auth(WEBHOOK_KEY, WEBHOOK_KEY)}
            async with aiohttp.ClientSession(headers=headers) as http:
                number = 0
                while goes_on:
                    entity_id, number = f"{sender}-{number}", number + 1
                    body = {"type": "Activity", "id": entity_id}
                    try:
                        async with http.post(f"{agent.address}/webhooks/ovation", json=body) as response:
                            if response.status == 202:
                                taken.append(entity_id)
                            else:
                                refused.append(response.status)
                    except aiohttp.ClientError:
                        refused.append(0)
                    await asyncio.sleep(0.01)

        senders = [asyncio.create_task(send(number)) for number in range(4)]
        await asyncio.sleep(0.3)
        before = len(taken)
        await stop(agent)
        goes_on = False
        await asyncio.gather(*senders)
        assert before > 0
        assert len(taken) > before  # webhooks are taken while it drains
        assert set(refused) <= {503, 0}
        kept = await here.one("SELECT array_agg(entity_id) FROM deliveries")
        assert set(taken) <= set(kept)


async def test_while_it_drains_people_can_still_cancel(tmp_path: Path, database_url: str) -> None:
    async with place(tmp_path, database_url) as here:
        activity_id, _ = await stages_slowly(here.lab, 20_000, 2_000_000)
        agent = here.lab.agent
        [job] = await agent.jobs(activity_id)
        agent.process.send_signal(signal.SIGTERM)
        await drains(agent)
        assert (await agent.call("POST", f"/api/jobs/{job['id']}/cancel"))[0] == 202
        assert await asyncio.wait_for(agent.process.wait(), 15) == 0
        assert await here.one("SELECT verdict FROM jobs") == "cancelled"
        await here.is_left_in_order()


async def test_an_agent_that_is_still_starting_ends(tmp_path: Path) -> None:
    """Ovation takes the first question and never answers: that keeps nobody from stopping the agent."""
    async with Sandbox(tmp_path / "sandbox") as sandbox:
        sandbox.faults.add(FaultKind.BLACK_HOLE, target="api")
        environment = agent_environment(sandbox.environment(), tmp_path / "agent")
        log = tmp_path / "agent.log"
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "agent", "serve", env=environment, stderr=stderr
            )

        async def is_asked() -> bool | None:
            return any(fault.hits for fault in sandbox.faults.faults) or None

        await until(is_asked, "Ovation is asked", log)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0, log.read_text()
        assert time.monotonic() - began < 10
        assert not (tmp_path / "agent" / "data" / "postgres" / "postmaster.pid").exists()
