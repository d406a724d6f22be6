"""What a machine's restart takes away: the run is `node`, and is started once more from staging."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from agent.adapters import runner
from tests.agents import AgentProcess, agent_environment, until
from tests.lab import Lab, laboratory

SCRIPT = """
    echo begun; echo part > /outputs/part
    i=0; while [ ! -e /outputs/sign ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done
    rm -f /outputs/sign; echo ended
"""


@pytest_asyncio.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    """A laboratory of the test's own, since it kills the agent."""
    async with laboratory(tmp_path) as opened:
        yield opened


async def start_again(lab: Lab, **settings: str) -> AgentProcess:
    """Start another agent on the same data directory."""
    environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent", **settings)
    lab.agent = await AgentProcess.start(environment, lab.directory / "agent" / "agent.log")
    lab.watch(lab.agent)
    return lab.agent


async def running(lab: Lab, activity_id: str, launch: int = 1) -> tuple[dict[str, Any], Path]:
    """Wait until a launch of an Activity's run has begun; return the job and the launch's directory."""

    async def look() -> tuple[dict[str, Any], Path] | None:
        for job in await lab.agent.jobs(activity_id):
            directory = lab.data_dir / "jobs" / job["id"] / f"run-{launch}"
            if job["state"] == "running" and job["launch"] == launch and (directory / "outputs" / "part").exists():
                return job, directory
        return None

    return await until(look, f"launch {launch} runs", lab.agent.log)


def lose(directory: Path) -> None:
    """End a run as the loss of power does: nothing of it is left but its records, which another boot wrote."""
    claim = runner.read_json(str(directory), runner.CLAIM)
    started = runner.read_json(str(directory), runner.STARTED)
    assert claim is not None
    assert started is not None
    os.kill(claim["pid"], signal.SIGKILL)
    for member in runner.session_members(started["pid"]):
        runner.send(member, signal.SIGKILL)
    boot = str(uuid.uuid4())
    for name, record in ((runner.CLAIM, claim), (runner.STARTED, started)):
        (directory / name).write_text(json.dumps({**record, "boot": boot}))


async def story(lab: Lab, job: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Return a job's story."""
    _, answer = await lab.agent.call("GET", f"/api/jobs/{job['id']}/events")
    return [(event["state"], event["note"]) for event in answer["events"]]


async def test_a_run_that_a_restart_took_away_is_run_again(lab: Lab) -> None:
    activity_id = lab.activity(SCRIPT)
    _, directory = await running(lab, activity_id)
    await lab.agent.kill()
    lose(directory)
    await start_again(lab)
    job, second = await running(lab, activity_id, launch=2)
    status, log = await lab.agent.call("GET", f"/api/jobs/{job['id']}/logs/stdout")
    assert (status, log) == (200, "begun\n")
    (second / "outputs" / "sign").touch()
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["exit_code"], job["fault"], job["attempt"]) == ("succeeded", 0, None, 0)
    assert (job["run"], job["launch"]) == (1, 2)
    assert await lab.outputs(activity_id) == {
        "stdout.log": b"begun\nended\n",
        "stderr.log": b"",
        "part": b"part\n",
    }
    told = await story(lab, job)
    assert [state for state, _ in told] == [
        "queued", "staging", "launching", "running",
        "running",  # the agent stopped answering
        "staging", "launching", "running", "collecting", "reporting", "succeeded",
    ]  # fmt: skip
    [note] = [note for state, note in told if state == "staging" and note]
    assert note.endswith("It is run again.")
    assert not (directory / "outputs").exists()
    status, log = await lab.agent.call("GET", f"/api/jobs/{job['id']}/logs/stdout")
    assert (status, log) == (200, "begun\nended\n")


async def test_a_second_loss_ends_it_with_what_there_is(lab: Lab) -> None:
    activity_id = lab.activity(SCRIPT)
    _, directory = await running(lab, activity_id)
    lose(directory)  # the agent sees it at once
    _, directory = await running(lab, activity_id, launch=2)
    lose(directory)
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["fault"]["class"], job["launch"]) == ("failed", "node", 2)
    assert await lab.outputs(activity_id) == {"stdout.log": b"begun\n", "stderr.log": b"", "part": b"part\n"}


async def test_it_can_be_left_at_the_first_loss(lab: Lab) -> None:
    await lab.agent.stop()
    await start_again(lab, AGENT_NODE_RETRIES="0")
    activity_id = lab.activity(SCRIPT)
    _, directory = await running(lab, activity_id)
    lose(directory)
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["fault"]["class"], job["launch"]) == ("failed", "node", 1)
    assert await lab.outputs(activity_id) == {"stdout.log": b"begun\n", "stderr.log": b"", "part": b"part\n"}


async def test_a_lost_run_whose_end_was_asked_for_is_not_run_again(lab: Lab) -> None:
    activity_id = lab.activity(SCRIPT)
    job, directory = await running(lab, activity_id)
    os.kill(runner.read_json(str(directory), runner.CLAIM)["pid"], signal.SIGSTOP)  # type: ignore[index]
    assert (await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel"))[0] == 202
    lose(directory)
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["fault"], job["launch"]) == ("cancelled", None, 1)
    assert (await lab.outputs(activity_id))["part"] == b"part\n"
