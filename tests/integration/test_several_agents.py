"""Any number of agents on one database, each with a data directory of its own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from agent.db.database import Database
from agent.sandbox.faults import FaultKind
from agent.sandbox.server import Sandbox
from tests.agents import AgentProcess, agent_environment, until
from tests.lab import Lab
from tests.promise_database import violations

WAITS_FOR_A_SIGN = """
    trap "exit 143" TERM; echo begun; echo start >> /outputs/starts
    i=0; while [ ! -e /outputs/sign ] && [ $i -lt 900 ]; do sleep 0.1; i=$((i+1)); done
    rm -f /outputs/sign; echo end >> /outputs/ends
"""
MOVES = "SELECT array_agg(state ORDER BY id) FROM job_events WHERE job_id = $1"


class Fleet:
    """Several agents, one laboratory, one database."""

    def __init__(self, lab: Lab, connection: asyncpg.Connection, database_url: str) -> None:
        self.lab = lab
        self.agents: list[AgentProcess] = []
        self._connection = connection
        self._database_url = database_url

    def directory(self, number: int) -> Path:
        """Return where an agent has its things."""
        return self.lab.directory / f"agent-{number}"

    def jobs_directory(self, number: int) -> Path:
        """Return where an agent has its jobs' files."""
        return self.directory(number) / "data" / "jobs"

    def settings(self, number: int, **settings: str) -> dict[str, str]:
        """Return an agent's environment."""
        return agent_environment(
            self.lab.sandbox.environment(),
            self.directory(number),
            AGENT_DATABASE_URL=self._database_url,
            AGENT_DRAIN_SECONDS="0",
            **settings,
        )

    async def begin(self, number: int) -> AgentProcess:
        """Start an agent, or start it again."""
        agent = await AgentProcess.start(self.settings(number), self.directory(number) / "agent.log")
        if number < len(self.agents):
            self.agents[number] = agent
        else:
            self.agents.append(agent)
        return agent

    async def one(self, query: str, *values: object) -> Any:
        """Ask the database for one value."""
        return await self._connection.fetchval(query, *values)

    async def violations(self) -> list[str]:
        """Return what the database has that is not as it should be once all is done."""
        return await violations(self._connection.fetch)

    async def time_passes(self, number: int) -> None:
        """Let the leases of an agent, and the time after which it is taken for gone, run out."""
        place = (self.directory(number) / "data" / "place").read_text().strip()
        await self.one("UPDATE jobs SET lease_until = now() - interval '1 s' WHERE lease_holder = $1", place)
        await self.one("UPDATE agents SET seen_at = now() - interval '1 hour' WHERE place = $1", place)

    async def holder(self, job_id: str) -> int:
        """Return which agent has a job's files."""
        place = await self.one("SELECT place FROM jobs WHERE id = $1", job_id)
        [number] = [
            number
            for number in range(len(self.agents))
            if (self.directory(number) / "data" / "place").read_text().strip() == place
        ]
        return number

    async def runs(self, script: str = WAITS_FOR_A_SIGN) -> tuple[str, str, Path]:
        """Begin a run, and wait until its container has begun; return the Activity, the job and its outputs."""
        activity_id = self.lab.activity(script)
        job = await self.agents[0].job(activity_id, states={"running"})
        outputs = self.jobs_directory(await self.holder(job["id"])) / job["id"] / "run-1" / "outputs"

        async def began() -> bool | None:
            return (outputs / "starts").exists() or None

        await until(began, "the container has begun", self.agents[0].log)
        return activity_id, job["id"], outputs

    async def gives_signs(self) -> None:
        """Let each container end that waits for a sign, and those that come, until cancelled."""
        given: set[Path] = set()
        while True:
            begun = set(self.lab.directory.glob("agent-*/data/jobs/*/run-1/outputs/starts"))
            for starts in begun - given:
                (starts.parent / "sign").touch()
            given |= begun
            await asyncio.sleep(0.05)

    async def stages_slowly(self) -> tuple[str, str, Path]:
        """Begin a run one of whose inputs drips in; return the Activity, the job and where its inputs go."""
        drip = {"target": "store", "bytes_per_second": 20_000}
        self.lab.sandbox.faults.add(FaultKind.DRIP, r"GET .*large\.bin", **drip)
        files = [self.lab.revision("small.bin", b"s" * 1000), self.lab.revision("large.bin", b"l" * 2_000_000)]
        activity_id = self.lab.activity("cat /inputs/*.bin | wc -c > /outputs/size", inputs=files)
        job = await self.agents[0].job(activity_id, states={"staging"})
        inputs = self.jobs_directory(await self.holder(job["id"])) / job["id"] / "inputs"

        async def comes() -> bool | None:
            return ((inputs / "small.bin").exists() and any(inputs.parents[2].rglob(".*.part"))) or None

        await until(comes, "one file in place, one on its way", self.agents[0].log)
        return activity_id, job["id"], inputs


@asynccontextmanager
async def fleet(directory: Path, database_url: str) -> AsyncIterator[Fleet]:
    """Open a laboratory on a migrated database; agents are begun by the test, and end with it."""
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox(directory / "sandbox"))
        database = await Database.open(database_url, "the test database", size=1)
        await database.migrate()
        await database.close()
        connection = await asyncpg.connect(database_url)
        stack.push_async_callback(connection.close)
        opened = Fleet(Lab(sandbox, directory), connection, database_url)
        try:
            yield opened
        finally:
            for agent in opened.agents:
                if agent.process.returncode is None:
                    await agent.kill()


async def test_each_run_is_done_once_by_one_of_them(tmp_path: Path, database_url: str) -> None:
    async with fleet(tmp_path, database_url) as here:
        for number in range(3):
            await here.begin(number)
        here.lab.watch(here.agents[0])
        here.lab.watch(here.agents[1])  # who hears of a change is not who does the work
        # More than two agents let in: 2 that run and 6 that are ahead of them each.
        activities = [here.lab.activity(WAITS_FOR_A_SIGN) for _ in range(20)]

        async def all_have_some() -> bool | None:
            return await here.one("SELECT count(DISTINCT place) = 3 FROM jobs") or None

        await until(all_have_some, "each agent has some of the runs", here.agents[2].log)
        signs = asyncio.create_task(here.gives_signs())
        jobs = [await here.agents[2].job(activity_id) for activity_id in activities]
        signs.cancel()
        assert {job["state"] for job in jobs} == {"succeeded"}
        for activity_id, job in zip(activities, jobs, strict=True):
            [_] = await here.agents[0].jobs(activity_id)
            found = await here.lab.outputs(activity_id)
            assert (found["starts"], found["ends"]) == (b"start\n", b"end\n")
            has_it = [number for number in range(3) if (here.jobs_directory(number) / job["id"]).exists()]
            assert has_it == [await here.holder(job["id"])]
        assert await here.one("SELECT max(attempt) FROM job_events") == 0

        async def is_in_order() -> bool | None:
            return True if not await here.violations() else None

        await until(is_in_order, "nothing is held or due", here.agents[0].log)


async def test_what_a_dead_agent_staged_is_staged_by_another_and_what_it_ran_waits_for_it(
    tmp_path: Path, database_url: str
) -> None:
    async with fleet(tmp_path, database_url) as here:
        first = await here.begin(0)
        here.lab.watch(first)
        runs, runs_id, outputs = await here.runs()
        stages, stages_id, inputs = await here.stages_slowly()
        await first.kill()
        here.lab.sandbox.faults.remove()
        second = await here.begin(1)
        await here.time_passes(0)
        job = await second.job(stages)
        assert (job["state"], job["attempt"], job["launch"]) == ("succeeded", 0, 1)
        assert await here.holder(stages_id) == 1
        assert (await here.lab.outputs(stages))["size"] == b"2001000\n"

        [job] = await second.jobs(runs)
        assert (job["state"], job["attempt"]) == ("running", 0)
        assert "waiting for the agent on" in job["waiting_for"]
        assert job["agent"]["host"] in job["waiting_for"]
        (outputs / "sign").touch()
        await here.begin(0)
        job = await second.job(runs)
        assert (job["state"], job["attempt"], job["launch"]) == ("succeeded", 0, 1)
        assert await here.holder(runs_id) == 0
        found = await here.lab.outputs(runs)
        assert (found["starts"], found["ends"]) == (b"start\n", b"end\n")
        assert await here.one(MOVES, stages_id) == [
            "queued", "staging", "staging", "launching", "running", "collecting", "reporting", "succeeded",
        ]  # fmt: skip
        assert inputs.exists()  # nobody touches what another may still own; the sweep removes it in its time


async def test_what_an_agent_staged_when_it_stopped_goes_to_another_at_once(tmp_path: Path, database_url: str) -> None:
    async with fleet(tmp_path, database_url) as here:
        first = await here.begin(0)
        here.lab.watch(first)
        stages, stages_id, _ = await here.stages_slowly()
        second = await here.begin(1)
        here.lab.sandbox.faults.remove()
        assert await first.stop() == 0
        job = await second.job(stages)
        assert (job["state"], job["attempt"]) == ("succeeded", 0)
        assert await here.holder(stages_id) == 1


async def test_an_agent_that_was_asleep_past_its_lease_changes_nothing(tmp_path: Path, database_url: str) -> None:
    async with fleet(tmp_path, database_url) as here:
        first = await here.begin(0)
        here.lab.watch(first)
        here.lab.sandbox.faults.add(FaultKind.LATENCY, r"^PUT .*slow", target="store", seconds=2)
        delivers = here.lab.activity("echo 1 > /outputs/slow; echo 2 > /outputs/quick")
        delivering = await first.job(delivers, states={"collecting"})

        async def is_slow() -> bool | None:
            return any(fault.hits for fault in here.lab.sandbox.faults.faults) or None

        stages, stages_id, _ = await here.stages_slowly()
        await until(is_slow, "a slow upload", first.log)
        first.process.send_signal(signal.SIGSTOP)
        second = await here.begin(1)
        here.lab.sandbox.faults.remove()
        await here.time_passes(0)
        assert (await second.job(stages))["state"] == "succeeded"
        before = await here.one(MOVES, stages_id)
        [job] = await second.jobs(delivers)
        assert job["state"] == "collecting"  # its files are where the first one is

        first.process.send_signal(signal.SIGCONT)

        async def has_lost_both() -> bool | None:
            return len(first.events("lease_lost")) >= 2 or None

        await until(has_lost_both, "both leases are lost", first.log)
        job = await second.job(delivers)
        assert (job["state"], job["attempt"]) == ("succeeded", 0)
        found = await here.lab.outputs(delivers)  # each is there once
        assert set(found) == {"stdout.log", "stderr.log", "slow", "quick"}
        assert await here.one(MOVES, stages_id) == before
        assert await here.holder(stages_id) == 1
        assert (await here.lab.outputs(stages))["size"] == b"2001000\n"
        assert not (here.jobs_directory(0) / stages_id / "run-1").exists()
        assert await here.holder(delivering["id"]) == 0


async def test_cancel_through_another_agent(tmp_path: Path, database_url: str) -> None:
    async with fleet(tmp_path, database_url) as here:
        first = await here.begin(0)
        here.lab.watch(first)
        runs, runs_id, _ = await here.runs()
        stages, stages_id, _ = await here.stages_slowly()
        second = await here.begin(1)
        for job_id in (runs_id, stages_id):
            assert (await second.call("POST", f"/api/jobs/{job_id}/cancel"))[0] == 202
        async with asyncio.timeout(25):  # the lease is renewed every 5 s; the container has 10 s to end
            jobs = [await second.job(activity_id) for activity_id in (stages, runs)]
        assert [job["state"] for job in jobs] == ["cancelled", "cancelled"]
        assert [await here.holder(job_id) for job_id in (runs_id, stages_id)] == [0, 0]
        found = await here.lab.outputs(runs)
        assert (found["starts"], found["stdout.log"]) == (b"start\n", b"begun\n")


async def test_cancel_while_its_agent_is_started_again(tmp_path: Path, database_url: str) -> None:
    """Another agent that is there meanwhile does not end the run without its logs, nor leave the container behind."""
    async with fleet(tmp_path, database_url) as here:
        first = await here.begin(0)
        here.lab.watch(first)
        runs, runs_id, outputs = await here.runs()
        second = await here.begin(1)
        assert await first.stop() == 0
        assert (await second.call("POST", f"/api/jobs/{runs_id}/cancel"))[0] == 202
        await asyncio.sleep(2.5)  # longer than an idle worker waits
        await here.begin(0)
        job = await second.job(runs)
        assert job["state"] == "cancelled"
        assert (outputs.parent / "exit.json").exists()
        found = await here.lab.outputs(runs)
        assert (found["starts"], found["stdout.log"]) == (b"start\n", b"begun\n")


async def test_cancel_while_its_machine_is_gone(tmp_path: Path, database_url: str) -> None:
    """A run ends without what is on that machine; nobody has to wait for one that never comes back."""
    async with fleet(tmp_path, database_url) as here:
        first = await here.begin(0)
        here.lab.watch(first)
        runs, runs_id, outputs = await here.runs()
        await first.kill()
        await here.time_passes(0)
        second = await here.begin(1)
        [job] = await second.jobs(runs)
        assert "waiting for the agent on" in job["waiting_for"]
        assert (await second.call("POST", f"/api/jobs/{runs_id}/cancel"))[0] == 202
        assert (await second.job(runs))["state"] == "cancelled"
        (outputs / "sign").touch()  # there is no machine any more, but this test's is still here


async def test_a_log_is_read_from_any_agent_whoever_runs_the_container(tmp_path: Path, database_url: str) -> None:
    async with fleet(tmp_path, database_url) as here:
        first = await here.begin(0)
        here.lab.watch(first)
        activity_id, job_id, outputs = await here.runs(f"seq 1 40000; {WAITS_FOR_A_SIGN} echo over >&2; echo last")
        second = await here.begin(1)
        path = f"/api/jobs/{job_id}/logs"
        whole = "".join(f"{number}\n" for number in range(1, 40001)) + "begun\n"
        assert await second.call("GET", f"{path}/stdout") == (200, whole)
        assert await second.call("GET", f"{path}/stdout", params={"tail": "2"}) == (200, "40000\nbegun\n")
        assert await second.call("GET", f"{path}/stdout", params={"offset": str(len(whole) - 6)}) == (200, "begun\n")
        following = asyncio.create_task(second.call("GET", f"{path}/stdout", params={"follow": "1"}))
        (outputs / "sign").touch()
        assert await asyncio.wait_for(following, 60) == (200, f"{whole}last\n")
        await first.job(activity_id)
        assert await second.call("GET", f"{path}/stderr") == (200, "over\n")
        assert await here.one("SELECT count(*) FROM log_questions") == 0
        await first.kill()
        status, answer = await second.call("GET", f"{path}/stderr")
        assert status == 404
        assert "does not answer" in answer["errors"]["detail"]
