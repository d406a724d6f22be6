"""An agent is replaced by a newer one, or by the one before, while a container runs: none notices."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from agent.db.migrate import migrations, works_from
from tests.agents import AgentProcess, agent_environment, until
from tests.integration.test_cli import command
from tests.lab import Lab, laboratory
from tests.workers import migrated

NEWEST = migrations()[-1][0]
GOES_ON = "echo begun; until [ -e /outputs/go ]; do sleep 0.05; done; echo ended; echo x > /outputs/result"


@asynccontextmanager
async def one_that_runs(directory: Path, database_url: str) -> AsyncIterator[tuple[Lab, str, Path]]:
    """Open a laboratory in which a container runs whose agent has been stopped."""
    async with migrated(database_url):
        pass
    async with laboratory(directory, AGENT_DATABASE_URL=database_url) as lab:
        activity_id = lab.activity(GOES_ON)
        job = await lab.agent.job(activity_id, states={"running"})
        run = lab.data_dir / "jobs" / job["id"] / "run-1"

        async def begun() -> bool | None:
            return (run / "stdout.log").read_text() == "begun\n" or None

        await until(begun, "the container runs", lab.agent.log)
        assert await lab.agent.stop() == 0
        yield lab, activity_id, run / "outputs"


async def finished(lab: Lab, database_url: str, activity_id: str, outputs: Path) -> None:
    """Start an agent, let the container come to its end, and see that it was the one run there is."""
    environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent", AGENT_DATABASE_URL=database_url)
    lab.watch(await AgentProcess.start(environment, lab.directory / "agent" / "agent.log"))
    (outputs / "go").touch()
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["launch"], job["attempt"]) == ("succeeded", 1, 0)
    assert len(await lab.agent.jobs(activity_id)) == 1
    assert (await lab.outputs(activity_id))["stdout.log"] == b"begun\nended\n"


async def test_a_newer_agent_goes_on_with_what_an_older_one_had_running(tmp_path: Path, database_url: str) -> None:
    async with one_that_runs(tmp_path, database_url) as (lab, activity_id, outputs):
        connection = await asyncpg.connect(database_url)
        await connection.execute("DROP TABLE node_runs")  # as the version before had left it
        await connection.execute("DELETE FROM schema_migrations WHERE number = 8")
        await connection.execute("ALTER TABLE schema_migrations DROP COLUMN works_from")
        await connection.close()
        environment = agent_environment(
            lab.sandbox.environment(), lab.directory / "agent", AGENT_DATABASE_URL=database_url
        )
        refused = await command("serve", environment=environment, cwd=lab.directory)
        assert refused.code == 1
        assert "run `ovation-agent migrate`" in refused.err
        done = await command("migrate", environment=environment, cwd=lab.directory)
        assert (done.code, done.out) == (0, "applied 0008_node_runs\n")
        await finished(lab, database_url, activity_id, outputs)


async def migrate_further(database_url: str, works: int) -> None:
    connection = await asyncpg.connect(database_url)
    await connection.execute("ALTER TABLE jobs ADD COLUMN of_the_future text")
    await connection.execute(
        "INSERT INTO schema_migrations (number, name, works_from) VALUES ($1, 'future', $2)", NEWEST + 1, works
    )
    await connection.close()


async def test_the_version_before_goes_on_with_what_a_newer_one_had_running(tmp_path: Path, database_url: str) -> None:
    async with one_that_runs(tmp_path, database_url) as (lab, activity_id, outputs):
        await migrate_further(database_url, works=NEWEST)
        await finished(lab, database_url, activity_id, outputs)
        [told] = lab.agent.events("schema_newer")
        assert (told["newest"], told["found"]) == (NEWEST, NEWEST + 1)


@pytest.mark.parametrize("works", [NEWEST + 1, None])
async def test_a_schema_that_an_older_version_cannot_work_with_is_refused(
    tmp_path: Path, database_url: str, works: int
) -> None:
    async with migrated(database_url):
        pass
    await migrate_further(database_url, works)
    environment = agent_environment({"OVATION_TOKEN": "a-token"}, tmp_path, AGENT_DATABASE_URL=database_url)
    refused = await command("serve", environment=environment, cwd=tmp_path)
    assert refused.code == 1
    assert f"at version {NEWEST + 1}, newer than this program's {NEWEST}: upgrade the agent" in refused.err


def test_what_a_migration_says_of_older_programs() -> None:
    assert works_from(8, "-- works from: 7\n-- Something.\n") == 7
    assert works_from(8, "-- Something.\n") == 8
    assert [works_from(number, sql) for number, _, sql in migrations()] == [1, 2, 3, 4, 5, 6, 7, 7]
