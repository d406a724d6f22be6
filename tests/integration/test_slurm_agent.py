"""A whole agent whose runs are batch jobs of a real Slurm: nothing is different for people."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agent.adapters import runner
from tests.agents import AgentProcess, agent_environment, until
from tests.lab import Lab, laboratory
from tests.slurm import Cluster, cluster

WAITS = "echo begun; echo part > /outputs/part; while [ ! -e /outputs/go ]; do sleep 0.05; done; echo ended"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest_asyncio.fixture
async def lab(tmp_path: Path, slurm: Cluster) -> AsyncIterator[Lab]:
    async with laboratory(
        tmp_path, **settings(slurm, AGENT_MAX_TIME_LIMIT_SECONDS="36000", AGENT_TIME_LIMIT_SECONDS="600")
    ) as opened:
        yield opened


def settings(slurm: Cluster, **more: str) -> dict[str, str]:
    return {"AGENT_EXECUTOR": "slurm", "SLURM_CONF": str(slurm.conf), "AGENT_SLURM_SILENCE_SECONDS": "3", **more}


async def begun(lab: Lab, activity_id: str, launch: int = 1) -> tuple[dict[str, Any], Path]:
    """Wait until a launch's script has begun; return its job and its directory."""

    async def look() -> tuple[dict[str, Any], Path] | None:
        for job in await lab.agent.jobs(activity_id):
            directory = lab.data_dir / "jobs" / job["id"] / f"run-{launch}"
            if job["state"] == "running" and (directory / "outputs/part").exists():
                return job, directory
        return None

    return await until(look, f"launch {launch} of {activity_id}", lab.agent.log)


async def test_results_and_a_failure_come_back(lab: Lab) -> None:
    good = lab.activity("echo hello; wc -c < /inputs/reads > /outputs/count", inputs=[lab.revision("reads", "12345")])
    bad = lab.activity("echo oh >&2; exit 4")
    job = await lab.agent.job(good)
    assert (job["state"], job["exit_code"], job["fault"]) == ("succeeded", 0, None)
    assert job["native_id"].isdigit()
    assert job["started_at"]
    assert job["resources"]["used"]["wall_seconds"] > 0
    assert await lab.outputs(good) == {"stdout.log": b"hello\n", "stderr.log": b"", "count": b"5\n"}
    failed = await lab.agent.job(bad)
    assert (failed["state"], failed["exit_code"], failed["fault"]["class"]) == ("failed", 4, "user_code")
    assert (await lab.outputs(bad))["stderr.log"] == b"oh\n"


async def test_wishes_of_the_activity_reach_slurm(lab: Lab, slurm: Cluster) -> None:
    activity_id = lab.activity(None)
    wishes = {"compute.cpus": 2, "compute.memory": "64M", "compute.time": "10h"}
    status, _ = await lab.agent.call(
        "POST",
        f"{lab.sandbox.api_url}/api/v1/o/0/entities/{activity_id}/annotations/properties",
        json={"properties": [{"key": key, "value": value} for key, value in wishes.items()]},
        headers={"Authorization": f"Bearer {lab.sandbox.service_token}"},
    )
    assert status == 201
    lab.sandbox.admin.link(activity_id, "inputs", lab.revision("script.sh", WAITS), "activities")
    job, directory = await begun(lab, activity_id)
    shown = slurm.run("scontrol", "show", "job", slurm.ids(f"ovation-{job['id']}-1")[0])
    assert "NumCPUs=2" in shown
    assert "MinMemoryNode=64M" in shown
    assert "TimeLimit=10:00:00" in shown
    (directory / "outputs/go").touch()
    done = await lab.agent.job(activity_id)
    wished = {"cpus": 2, "memory_bytes": 64 << 20, "time_seconds": 36_000}
    assert done["resources"]["asked"] == done["resources"]["granted"] == wished


async def test_an_agent_that_is_killed_finds_its_runs_again(lab: Lab, slurm: Cluster) -> None:
    activity_id = lab.activity(WAITS)
    job, directory = await begun(lab, activity_id)
    await lab.agent.kill()
    (directory / "outputs/go").touch()
    environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent", **settings(slurm))
    lab.watch(await AgentProcess.start(environment, lab.directory / "agent" / "agent.log"))
    done = await lab.agent.job(activity_id)
    assert (done["state"], done["launch"]) == ("succeeded", 1)
    assert len(slurm.ids(f"ovation-{job['id']}-1")) == 1
    assert (await lab.outputs(activity_id))["stdout.log"] == b"begun\nended\n"


async def test_cancel_ends_the_batch_job_and_delivers_what_there_is(lab: Lab, slurm: Cluster) -> None:
    activity_id = lab.activity(WAITS)
    job, _ = await begun(lab, activity_id)
    status, _ = await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")
    assert status == 202
    assert (await lab.agent.job(activity_id))["state"] == "cancelled"
    assert await lab.outputs(activity_id) == {"stdout.log": b"begun\n", "stderr.log": b"", "part": b"part\n"}
    assert slurm.jobs()[f"ovation-{job['id']}-1"] not in {"PENDING", "RUNNING"}


async def test_somebody_cancels_it_in_slurm(lab: Lab, slurm: Cluster) -> None:
    activity_id = lab.activity(WAITS)
    job, _ = await begun(lab, activity_id)
    slurm.run("scancel", *slurm.ids(f"ovation-{job['id']}-1"))
    failed = await lab.agent.job(activity_id)
    assert (failed["state"], failed["launch"], failed["fault"]["class"]) == ("failed", 1, "platform")
    assert "scancel" in failed["fault"]["message"]
    assert (await lab.outputs(activity_id))["part"] == b"part\n"


async def test_a_run_that_its_node_lost_is_run_once_more(lab: Lab) -> None:
    activity_id = lab.activity(WAITS)
    _, directory = await begun(lab, activity_id)
    claim = runner.read_json(str(directory), runner.CLAIM)
    started = runner.read_json(str(directory), runner.STARTED)
    assert claim is not None
    assert started is not None
    for pid in [_parent(claim["pid"]), claim["pid"], *runner.session_members(started["pid"])]:
        runner.send(pid, signal.SIGKILL)
    _, second = await begun(lab, activity_id, launch=2)
    (second / "outputs/go").touch()
    done = await lab.agent.job(activity_id)
    assert (done["state"], done["launch"]) == ("succeeded", 2)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_what_it_waits_for_is_shown_while_it_does_and_a_refusal_ends_it(tmp_path: Path, slurm: Cluster) -> None:
    held = settings(slurm, AGENT_SLURM_ARGUMENTS="--hold '--comment=of the site'")
    async with laboratory(tmp_path / "held", **held) as lab:
        activity_id = lab.activity(WAITS)

        async def waits() -> dict[str, Any] | None:
            for job in await lab.agent.jobs(activity_id):
                if "scontrol release" in (job["waiting_for"] or ""):
                    return job
            return None

        job = await until(waits, "what it waits for", lab.agent.log)
        slurm.run("scontrol", "release", *slurm.ids(f"ovation-{job['id']}-1"))
        _, directory = await begun(lab, activity_id)

        async def waits_no_more() -> bool | None:
            [job] = await lab.agent.jobs(activity_id)
            assert job["state"] == "running"
            return job["waiting_for"] is None or None

        await until(waits_no_more, "it waits for nothing", lab.agent.log)
        (directory / "outputs/go").touch()
        done = await lab.agent.job(activity_id)
        assert (done["state"], done["waiting_for"]) == ("succeeded", None)
    async with laboratory(tmp_path / "nowhere", **settings(slurm, AGENT_SLURM_PARTITION="nowhere")) as lab:
        job, outputs = await lab.run("echo hello")
        assert (job["state"], job["fault"]["class"]) == ("failed", "platform")
        assert "invalid partition" in job["fault"]["message"].lower()
        assert outputs == {"stdout.log": b"", "stderr.log": b""}
