"""A whole agent whose batch jobs do the rest of each run on a node (`AGENT_STAGING=node`), on a real Slurm."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agent.adapters import runner
from agent.adapters.node import ORDERS
from agent.db.database import Database
from tests.agents import AgentProcess, agent_environment, secrets_in, until
from tests.lab import Lab, laboratory
from tests.slurm import Cluster, cluster

WAITS = "echo begun; echo part > /outputs/part; while [ ! -e /outputs/go ]; do sleep 0.05; done; echo ended"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


class NodeLab:
    """A laboratory, and what is on the nodes' disk, which is this machine's."""

    def __init__(self, lab: Lab, slurm: Cluster, database_url: str, node_dir: Path) -> None:
        self.lab = lab
        self.slurm = slurm
        self.database_url = database_url
        self.node_dir = node_dir

    def settings(self, **more: str) -> dict[str, str]:
        return settings(self.slurm, self.database_url, self.node_dir, **more)

    async def restarted(self) -> None:
        lab = self.lab
        environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent", **self.settings())
        lab.watch(await AgentProcess.start(environment, lab.directory / "agent" / "agent.log"))

    def runs(self, job_id: str) -> list[Path]:
        """Return the directories of the job's launches on nodes, newest last."""
        found = self.node_dir.glob(f"ovation-agent-*/*/jobs/{job_id}/run-*")
        return sorted(found, key=lambda path: path.stat().st_mtime)

    async def begun(self, activity_id: str, launch: int = 1) -> tuple[dict[str, Any], Path]:
        """Wait until a launch's script has begun; return its job and its directory on the node."""

        async def look() -> tuple[dict[str, Any], Path] | None:
            for job in await self.lab.agent.jobs(activity_id):
                for directory in self.runs(job["id"]):
                    if (directory / "outputs/part").exists() and job["launch"] == launch and job["state"] == "running":
                        return job, directory
            return None

        return await until(look, f"launch {launch} of {activity_id}", self.lab.agent.log)

    async def held(self, activity_id: str) -> dict[str, Any]:
        """Wait until Slurm holds the batch job, and people see it."""

        async def look() -> dict[str, Any] | None:
            for job in await self.lab.agent.jobs(activity_id):
                if "scontrol release" in (job["waiting_for"] or ""):
                    return job
            return None

        return await until(look, "what it waits for", self.lab.agent.log)

    async def saved(self, job_id: str, launch: int = 1) -> None:
        """Wait until the agent's machine has what the container has said."""
        log = self.lab.data_dir / "jobs" / job_id / f"run-{launch}" / "stdout.log"

        async def there() -> bool | None:
            return (log.exists() and log.read_bytes() == b"begun\n") or None

        await until(there, "the log on the agent's machine", self.lab.agent.log)

    @asynccontextmanager
    async def database(self) -> AsyncIterator[Database]:
        opened = await Database.open(self.database_url, "the test database")
        try:
            yield opened
        finally:
            await opened.close()

    async def closed(self, left: int = 0) -> None:
        """Wait until nothing is handed over any more, and see that nothing is left on the nodes or beside the jobs.

        But at most so many directories of programs that were killed, which the next one removes.
        """
        async with self.database() as database:

            async def none() -> bool | None:
                async with database.connection() as connection:
                    return await connection.fetchval("SELECT count(*) FROM node_runs") == 0 or None

            await until(none, "the end of what was handed over", self.lab.agent.log)
        names = [path.name for path in self.node_dir.glob("ovation-agent-*/*") if path.name != "cache"]
        assert len(names) <= left
        assert list((self.lab.data_dir / "nodes").glob("*")) == []


def settings(slurm: Cluster, database_url: str, node_dir: Path, **more: str) -> dict[str, str]:
    return {
        "AGENT_EXECUTOR": "slurm",
        "AGENT_STAGING": "node",
        "AGENT_NODE_DIR": str(node_dir),
        "AGENT_DATABASE_URL": database_url,
        "AGENT_SLURM_SILENCE_SECONDS": "3",
        "SLURM_CONF": str(slurm.conf),
        **more,
    }


@asynccontextmanager
async def node_laboratory(directory: Path, slurm: Cluster, database_url: str, **more: str) -> AsyncIterator[NodeLab]:
    database = await Database.open(database_url, "the test database")
    await database.migrate()
    await database.close()
    node_dir = directory / "nodes-disk"
    node_dir.mkdir(parents=True)
    async with laboratory(directory, **settings(slurm, database_url, node_dir, **more)) as lab:
        yield NodeLab(lab, slurm, database_url, node_dir)


@pytest_asyncio.fixture
async def nodes(tmp_path: Path, slurm: Cluster, database_url: str) -> AsyncIterator[NodeLab]:
    async with node_laboratory(tmp_path, slurm, database_url) as opened:
        yield opened


async def test_results_and_a_failure_come_back_and_nothing_stays_on_the_node(nodes: NodeLab) -> None:
    lab = nodes.lab
    good = lab.activity("echo hello; wc -c < /inputs/reads > /outputs/count", inputs=[lab.revision("reads", "12345")])
    bad = lab.activity("echo oh >&2; exit 4")
    job = await lab.agent.job(good)
    assert (job["state"], job["exit_code"], job["fault"], job["launch"]) == ("succeeded", 0, None, 1)
    assert job["resources"]["used"]["wall_seconds"] > 0
    assert await lab.outputs(good) == {"stdout.log": b"hello\n", "stderr.log": b"", "count": b"5\n"}
    failed = await lab.agent.job(bad)
    assert (failed["state"], failed["exit_code"], failed["fault"]["class"]) == ("failed", 4, "user_code")
    assert (await lab.outputs(bad))["stderr.log"] == b"oh\n"
    crate = await lab.crate(good)
    assert any(each.get("name") == "reads" for each in crate["@graph"])
    await nodes.closed()
    # Its logs are still here for whoever looks, and so is what the program on the node said.
    status, said = await lab.agent.call("GET", f"/api/jobs/{job['id']}/logs/stdout")
    assert (status, said) == (200, "hello\n")
    log = (lab.data_dir / "jobs" / job["id"] / "run-1" / "node.log").read_text()
    assert '"node_begins"' in log
    assert '"node_ends"' in log


async def test_credentials_are_gone_before_the_container_runs(nodes: NodeLab) -> None:
    lab = nodes.lab
    activity_id = lab.activity(WAITS)
    job, directory = await nodes.begun(activity_id)
    [shared] = (lab.data_dir / "nodes").iterdir()
    assert not list(shared.glob(f"{ORDERS.removesuffix('.json')}*"))
    name = next(name for name in nodes.slurm.jobs() if job["id"] in name)
    shown = nodes.slurm.run("scontrol", "show", "job", "-dd", nodes.slurm.ids(name)[0])
    written = [path.read_text(errors="replace") for path in shared.iterdir() if path.is_file()]
    environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent", **nodes.settings())
    hidden = {name: value for name, value in environment.items() if name != "AGENT_ADMIN_TOKEN"}
    assert secrets_in("\n".join([shown, *written]), hidden) == []
    assert nodes.database_url not in "\n".join([shown, *written])
    (directory / "outputs/go").touch()
    assert (await lab.agent.job(activity_id))["state"] == "succeeded"
    await nodes.closed()


async def test_an_agent_that_is_killed_finds_its_runs_done(nodes: NodeLab) -> None:
    lab = nodes.lab
    activity_id = lab.activity(WAITS)
    job, directory = await nodes.begun(activity_id)
    await lab.agent.kill()
    (directory / "outputs/go").touch()
    await nodes.restarted()
    done = await lab.agent.job(activity_id)
    assert (done["state"], done["launch"]) == ("succeeded", 1)
    assert sum(job["id"] in name for name in nodes.slurm.jobs()) == 1
    assert (await lab.outputs(activity_id))["stdout.log"] == b"begun\nended\n"
    await nodes.closed()


async def test_an_agent_that_is_killed_before_it_submits_submits_once(
    tmp_path: Path, slurm: Cluster, database_url: str
) -> None:
    async with node_laboratory(tmp_path, slurm, database_url, AGENT_SLURM_ARGUMENTS="--hold") as nodes:
        lab = nodes.lab
        activity_id = lab.activity("echo hello")

        job = await nodes.held(activity_id)
        assert job["state"] == "staging"
        await lab.agent.kill()
        await nodes.restarted()
        await nodes.held(activity_id)
        [name] = [name for name in slurm.jobs() if job["id"] in name]
        slurm.run("scontrol", "release", *slurm.ids(name))
        done = await lab.agent.job(activity_id)
        assert (done["state"], done["waiting_for"], done["launch"]) == ("succeeded", None, 1)
        assert len(slurm.ids(name)) == 1


async def test_cancel_reaches_the_node_and_delivers_what_there_is(nodes: NodeLab) -> None:
    lab = nodes.lab
    activity_id = lab.activity(WAITS)
    job, _ = await nodes.begun(activity_id)
    status, _ = await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")
    assert status == 202
    assert (await lab.agent.job(activity_id))["state"] == "cancelled"
    assert await lab.outputs(activity_id) == {"stdout.log": b"begun\n", "stderr.log": b"", "part": b"part\n"}
    await nodes.closed()


async def test_cancel_before_it_begins_takes_it_out_of_the_queue(
    tmp_path: Path, slurm: Cluster, database_url: str
) -> None:
    async with node_laboratory(tmp_path, slurm, database_url, AGENT_SLURM_ARGUMENTS="--hold") as nodes:
        lab = nodes.lab
        activity_id = lab.activity("echo hello")

        job = await nodes.held(activity_id)
        assert (await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel"))[0] == 202
        assert (await lab.agent.job(activity_id))["state"] == "cancelled"
        await nodes.closed()
        [name] = [name for name in slurm.jobs() if job["id"] in name]
        assert slurm.jobs()[name] == "CANCELLED"


async def test_somebody_cancels_it_in_slurm(nodes: NodeLab) -> None:
    lab = nodes.lab
    activity_id = lab.activity(WAITS)
    job, _ = await nodes.begun(activity_id)
    [name] = [name for name in nodes.slurm.jobs() if job["id"] in name]
    nodes.slurm.run("scancel", *nodes.slurm.ids(name))
    failed = await lab.agent.job(activity_id)
    assert (failed["state"], failed["launch"], failed["fault"]["class"]) == ("failed", 1, "platform")
    assert "scancel" in failed["fault"]["message"]
    # The outputs were on the node's disk; what it had said is here.
    assert (await lab.outputs(activity_id))["stdout.log"] == b"begun\n"
    await nodes.closed(left=1)


async def test_a_node_that_dies_is_not_waited_for(nodes: NodeLab) -> None:
    lab = nodes.lab
    activity_id = lab.activity(WAITS)
    job, directory = await nodes.begun(activity_id)
    [shared] = (lab.data_dir / "nodes").iterdir()
    saved = lab.data_dir / "jobs" / job["id"] / "run-1" / "stdout.log"

    async def is_saved() -> bool | None:
        return (saved.exists() and saved.read_text() == "begun\n") or None

    await until(is_saved, "a copy of what the container said", lab.agent.log)
    kill_all(shared, directory)
    # Nobody answers on the node any more, and what was saved of it is here.
    assert await lab.agent.call("GET", f"/api/jobs/{job['id']}/logs/stdout") == (200, "begun\n")
    _, second = await nodes.begun(activity_id, launch=2)
    (second / "outputs/go").touch()
    done = await lab.agent.job(activity_id)
    assert (done["state"], done["launch"]) == ("succeeded", 2)
    assert (await lab.outputs(activity_id))["stdout.log"] == b"begun\nended\n"
    told = lab.agent.events("node_run_over")
    assert [each["next_state"] for each in told] == ["staging"]


async def test_the_program_on_the_node_is_killed_and_takes_its_container_along(nodes: NodeLab) -> None:
    lab = nodes.lab
    activity_id = lab.activity(WAITS)
    job, directory = await nodes.begun(activity_id)
    [shared] = (lab.data_dir / "nodes").iterdir()
    program, container = records(shared, directory, runner.STARTED)
    await nodes.saved(job["id"])
    runner.send(program["pid"], signal.SIGKILL)

    async def gone() -> bool | None:
        return not runner.session_members(container["pid"]) or None

    await until(gone, "the container's end", lab.agent.log)
    _, second = await nodes.begun(activity_id, launch=2)
    await nodes.saved(job["id"], launch=2)
    assert not directory.exists()  # the next one has tidied up what was left there
    [shared] = (lab.data_dir / "nodes").iterdir()
    runner.send(records(shared, second, runner.STARTED)[0]["pid"], signal.SIGKILL)
    failed = await lab.agent.job(activity_id)
    assert (failed["state"], failed["launch"], failed["fault"]["class"]) == ("failed", 2, "node")
    assert "on the compute node ended (137) before the run did" in failed["fault"]["message"]
    assert (await lab.outputs(activity_id))["stdout.log"] == b"begun\n"
    await nodes.closed(left=1)


async def test_another_agent_sees_to_what_one_had_handed_over(nodes: NodeLab) -> None:
    lab = nodes.lab
    activity_id = lab.activity(WAITS)
    job, directory = await nodes.begun(activity_id)
    await lab.agent.kill()
    async with nodes.database() as database, database.connection() as connection:
        await connection.execute("UPDATE agents SET seen_at = now() - interval '2 minutes' WHERE host IS NOT NULL")
    other = lab.directory / "other"
    environment = agent_environment(lab.sandbox.environment(), other, **nodes.settings())
    lab.watch(await AgentProcess.start(environment, other / "agent.log"))
    (directory / "outputs/go").touch()
    done = await lab.agent.job(activity_id)
    assert (done["state"], done["launch"]) == ("succeeded", 1)
    assert sum(job["id"] in name for name in nodes.slurm.jobs()) == 1


async def test_logs_are_followed_while_it_runs_on_a_node(nodes: NodeLab) -> None:
    lab = nodes.lab
    activity_id = lab.activity(WAITS)
    job, directory = await nodes.begun(activity_id)

    async def said() -> bool | None:
        status, text = await lab.agent.call("GET", f"/api/jobs/{job['id']}/logs/stdout")
        return (status == 200 and text == "begun\n") or None

    await until(said, "what the container says", lab.agent.log)
    (directory / "outputs/go").touch()
    assert (await lab.agent.job(activity_id))["state"] == "succeeded"


async def test_an_image_that_is_none_waits_for_no_node(nodes: NodeLab) -> None:
    lab = nodes.lab
    before = len(nodes.slurm.jobs())
    activity_id = lab.activity("echo hello", related=[lab.revision("not-an-image.sif", b"hello")])
    failed = await lab.agent.job(activity_id)
    assert (failed["state"], failed["fault"]["class"]) == ("failed", "image")
    assert len(nodes.slurm.jobs()) == before


def records(shared: Path, directory: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the batch job's runner and the container's have on record."""
    outer, inner = runner.read_json(str(shared), name), runner.read_json(str(directory), name)
    assert outer is not None
    assert inner is not None
    return outer, inner


def kill_all(shared: Path, directory: Path) -> None:
    """Kill what a node that dies takes with it: the batch script, the runner, the agent's program, the container."""
    claims, started = records(shared, directory, runner.CLAIM), records(shared, directory, runner.STARTED)
    script = int(Path(f"/proc/{claims[0]['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    container = runner.session_members(started[1]["pid"])
    for pid in [script, claims[0]["pid"], started[0]["pid"], claims[1]["pid"], *container]:
        runner.send(pid, signal.SIGKILL)
