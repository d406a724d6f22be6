"""Stops, kills and outages: runs go on and end once, and what was delivered is there once."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.sandbox.faults import FaultKind
from agent.sandbox.server import Sandbox
from tests.agents import AgentProcess, agent_environment, running_agent, until
from tests.lab import Lab, laboratory


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    """A laboratory of the test's own, since it kills the agent."""
    async with laboratory(tmp_path) as opened:
        yield opened


async def start_again(lab: Lab, **settings: str) -> AgentProcess:
    """Start another agent on the same data directory, at another port as it happens."""
    environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent", **settings)
    agent = await AgentProcess.start(environment, lab.directory / "agent" / "agent.log")
    lab.watch(agent)
    return agent


WAITS_FOR_A_SIGN = """
    echo start >> /outputs/starts
    i=0; while [ ! -e /outputs/sign ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done
    rm -f /outputs/sign; echo end >> /outputs/ends
"""


async def running_job(lab: Lab, script: str = WAITS_FOR_A_SIGN) -> tuple[str, Path]:
    """Start a run that waits for a sign, and return its Activity and its output directory."""
    activity_id = lab.activity(script)
    job = await lab.agent.job(activity_id, states={"running"})
    outputs = lab.data_dir / "jobs" / job["id"] / "run-1" / "outputs"

    async def began() -> bool | None:
        return (outputs / "starts").exists() or None

    await until(began, "the container has begun", lab.agent.log)
    return activity_id, outputs


async def test_a_run_survives_the_agents_death(lab: Lab) -> None:
    activity_id, outputs = await running_job(lab)
    await lab.agent.kill()
    agent = await start_again(lab)
    try:
        job = await agent.job(activity_id, states={"running"})
        (outputs / "sign").touch()
        job = await agent.job(activity_id)
        assert (job["state"], job["exit_code"], job["run"]) == ("succeeded", 0, 1)
        found = await lab.outputs(activity_id)
        assert (found["starts"], found["ends"]) == (b"start\n", b"end\n")
    finally:
        await agent.stop()


async def test_a_run_that_ended_while_the_agent_was_dead_is_delivered(lab: Lab) -> None:
    activity_id, outputs = await running_job(lab)
    await lab.agent.kill()
    (outputs / "sign").touch()

    async def over() -> bool | None:
        return (outputs.parent / "exit.json").exists() or None

    await until(over, "the container has ended", lab.agent.log)
    agent = await start_again(lab)
    try:
        job = await agent.job(activity_id)
        assert (job["state"], job["exit_code"]) == ("succeeded", 0)
        assert (await lab.outputs(activity_id))["ends"] == b"end\n"
    finally:
        await agent.stop()


async def test_a_stop_lets_containers_go_on_and_costs_no_attempt(lab: Lab) -> None:
    activity_id, outputs = await running_job(lab)
    began = time.monotonic()
    assert await lab.agent.stop() == 0
    assert time.monotonic() - began < 20
    assert not (outputs.parent / "exit.json").exists()
    agent = await start_again(lab)
    try:
        job = await agent.job(activity_id, states={"running"})
        assert job["attempt"] == 0
        (outputs / "sign").touch()
        assert (await agent.job(activity_id))["state"] == "succeeded"
    finally:
        await agent.stop()


async def test_staging_goes_on_where_it_stopped(lab: Lab) -> None:
    small, large = lab.revision("small.bin", b"s" * 1000), lab.revision("large.bin", b"l" * 4_000_000)
    lab.sandbox.faults.add(FaultKind.DRIP, r"GET .*large\.bin", target="store", bytes_per_second=200_000)
    activity_id = lab.activity("cat /inputs/*.bin | wc -c > /outputs/size", inputs=[small, large])
    job = await lab.agent.job(activity_id, states={"staging"})
    inputs = lab.data_dir / "jobs" / job["id"] / "inputs"

    async def half() -> bool | None:
        return ((inputs / "small.bin").exists() and any(lab.data_dir.rglob(".*.part"))) or None

    await until(half, "one file in place, one on its way", lab.agent.log)
    inode = (inputs / "small.bin").stat().st_ino
    await lab.agent.kill()
    lab.sandbox.faults.remove()
    assert (inputs / "small.bin").stat().st_ino == inode
    agent = await start_again(lab)
    try:
        job = await agent.job(activity_id)
        assert job["state"] == "succeeded", job
        assert (await lab.outputs(activity_id))["size"] == b"4001000\n"
    finally:
        await agent.stop()


@pytest.mark.parametrize("after", [1, 3, 6])
async def test_outputs_are_there_once_although_delivery_was_interrupted(lab: Lab, after: int) -> None:
    names = [f"{number}.txt" for number in range(12)]
    activity_id = lab.activity("; ".join(f"echo {name} > /outputs/{name}" for name in names))

    async def some_are_linked() -> bool | None:
        return len(await lab.output_documents(activity_id)) >= after or None

    await until(some_are_linked, f"{after} outputs linked", lab.agent.log)
    await lab.agent.kill()
    agent = await start_again(lab)
    try:
        job = await agent.job(activity_id)
        assert (job["state"], job["exit_code"]) == ("succeeded", 0)
        found = await lab.outputs(activity_id)
        assert found == {
            "stdout.log": b"",
            "stderr.log": b"",
            **{name: f"{name}\n".encode() for name in names},
        }
        project = (await lab.get(f"/api/v1/o/0/projects/{lab.project_id}"))["project"]
        folders = (await lab.get(project["relationships"]["folders"]["related"]))["folders"]
        assert len(folders) == 1
        files = (await lab.get(folders[0]["relationships"]["files"]["related"]))["files"]
        assert len(files) == len(found) + 1  # and the crate
    finally:
        await agent.stop()


async def test_the_time_limit_ends_everything_inside(tmp_path: Path) -> None:
    async with laboratory(tmp_path, AGENT_TIME_LIMIT_SECONDS="2") as lab:
        job, outputs = await lab.run("echo begun; echo part > /outputs/part; setsid sleep 7654 & sleep 600")
        assert (job["state"], job["fault"]["class"]) == ("failed", "time_limit")
        assert (outputs["part"], outputs["stdout.log"]) == (b"part\n", b"begun\n")
        assert not [each for each in Path("/proc").glob("[0-9]*/cmdline") if _has(each, b"sleep\x007654")]


async def test_an_outage_of_ovation_is_waited_out(lab: Lab) -> None:
    activity_id, outputs = await running_job(lab)
    lab.sandbox.faults.add(FaultKind.STATUS, target="api", status=503)
    (outputs / "sign").touch()
    job = await lab.agent.job(activity_id, states={"collecting"})

    async def waits() -> str | None:
        [found] = await lab.agent.jobs(activity_id)
        reason: str | None = found["waiting_for"]
        return reason

    assert "waiting for Ovation" in await until(waits, "a reason", lab.agent.log)
    lab.sandbox.faults.remove()
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["attempt"]) == ("succeeded", 0)
    assert (await lab.outputs(activity_id))["ends"] == b"end\n"


async def test_the_embedded_server_stops_with_the_agent_that_follows_a_killed_one(lab: Lab) -> None:
    postgres = lab.data_dir / "postgres"
    await lab.agent.kill()
    assert (postgres / "postmaster.pid").exists()
    agent = await start_again(lab)
    assert await agent.stop() == 0
    assert not (postgres / "postmaster.pid").exists()


async def test_one_agent_a_data_directory(lab: Lab) -> None:
    environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent")
    with pytest.raises(AssertionError, match="another agent runs on"):
        await AgentProcess.start(environment, lab.directory / "second.log")
    assert (await lab.run("echo 1 > /outputs/one"))[0]["state"] == "succeeded"


async def test_the_same_on_a_given_server(tmp_path: Path, database_url: str) -> None:
    async with Sandbox(tmp_path / "sandbox") as sandbox:
        lab = Lab(sandbox, tmp_path)
        settings = {"AGENT_DATABASE_URL": database_url}
        environment = agent_environment(sandbox.environment(), tmp_path / "agent", **settings)
        migrate = await asyncio.create_subprocess_exec(sys.executable, "-m", "agent", "migrate", env=environment)
        assert await migrate.wait() == 0
        async with running_agent(sandbox.environment(), tmp_path / "agent", **settings) as agent:
            lab.watch(agent)
            job, outputs = await lab.run("echo 1 > /outputs/one")
            assert job["state"] == "succeeded"
            assert outputs["one"] == b"1\n"
        assert not (tmp_path / "agent" / "data" / "postgres").exists()


def _has(path: Path, words: bytes) -> bool:
    try:
        return words in path.read_bytes()
    except OSError:
        return False
