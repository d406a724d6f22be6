"""Five minutes and an Activity's id: what the commands of on-call find, follow and stop, on a real agent."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from agent.adapters import log_file
from tests.agents import ADMIN_TOKEN, AgentProcess, agent_environment, until
from tests.integration.test_cli import Done, command
from tests.lab import Lab, laboratory

ROOT = Path(__file__).resolve().parents[2]
on_call = pytest.mark.asyncio(loop_scope="module")


class Desk:
    """Somebody at the command line, who finds the agent in its data directory, wherever it listens."""

    def __init__(self, lab: Lab, port: str) -> None:
        self.lab = lab
        self.port = port
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "AGENT_DATA_DIR": str(lab.data_dir),
            "AGENT_ADMIN_TOKEN": ADMIN_TOKEN,
        }

    async def __call__(self, *arguments: str, stop: int = 0) -> Done:
        return await command(*arguments, environment=self.environment, cwd=self.lab.directory, stop=stop)

    async def kill_and_start(self) -> None:
        """Kill the agent, and start it again where Ovation's webhooks find it."""
        lab = self.lab
        await lab.agent.kill()
        lab.agent = await AgentProcess.start(
            agent_environment(lab.sandbox.environment(), lab.directory / "agent", AGENT_PORT=self.port),
            lab.directory / "agent" / "agent.log",
        )
        lab.agents.append(lab.agent)  # to be stopped in the end

    async def begin(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent", *arguments),
            env=self.environment,
            cwd=self.lab.directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])  # Ovation's webhooks find the agent there, also after it was started anew
    async with laboratory(tmp_path_factory.mktemp("call"), AGENT_PORT=port) as lab:
        yield Desk(lab, port)


async def ids(desk: Desk, *arguments: str) -> list[str]:
    done = await desk("jobs", "--json", *arguments)
    assert done.code == 0, done.err
    return [job["id"] for job in json.loads(done.out)]


@on_call
async def test_what_failed_lately_and_what_is_stuck(desk: Desk) -> None:
    good, _ = await desk.lab.run("true")
    bad, _ = await desk.lab.run("exit 3")
    assert await ids(desk, "--failed", "--since", "1h") == [bad["id"]]
    assert set(await ids(desk, "--since", "1h")) == {good["id"], bad["id"]}
    assert await ids(desk, "--stuck") == []
    desk.lab.sandbox.faults.add("status", status=503, target="store")
    try:
        waiting = desk.lab.activity("true")
        job = await desk.lab.agent.job(waiting, states={"staging"})
        assert await ids(desk, "--stuck") == []  # it has not waited for long
    finally:
        desk.lab.sandbox.faults.remove()
    await desk.lab.agent.job(waiting)
    assert set(await ids(desk, "--project", desk.lab.project_id)) == {good["id"], bad["id"], job["id"]}
    assert await ids(desk, "--project", "another") == []


def recipes() -> list[str]:
    """Return the programs for jq of the five recipes in the runbook."""
    text = (ROOT / "docs/operations.md").read_text().partition("### Five recipes")[2].partition("\n## ")[0]
    return re.findall(r"^ovation-agent logs -f --json \| (jq .*)$", text, re.MULTILINE)


@on_call
async def test_the_five_recipes_find_what_they_are_for(desk: Desk) -> None:
    good, _ = await desk.lab.run("true")
    bad, _ = await desk.lab.run("exit 7")
    desk.lab.sandbox.faults.add("status", status=503, target="store")
    waiting = desk.lab.activity("true")

    async def away() -> bool | None:
        return bool(desk.lab.agent.events("party_away")) or None

    try:
        await until(away, "the store is away", desk.lab.agent.log)
    finally:
        desk.lab.sandbox.faults.remove()
    await desk.lab.agent.job(waiting)
    log = "\n".join(line for line in desk.lab.agent.log.read_text().splitlines() if line.startswith("{"))
    log += '\n{"event": "step", "job_id": "slow", "state": "staging", "seconds": 61.5, "level": "info"}\n'
    found = []
    for recipe in recipes():
        command = recipe.replace('"ID"', f'"{good["activity_id"]}"')
        done = await asyncio.to_thread(
            subprocess.run, ["bash", "-c", command], input=log, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (recipe, done.stderr)
        found.append(done.stdout.splitlines())
    wrong, one, ends, slow, parties = found
    assert {json.loads(line)["event"] for line in wrong} >= {"party_away"}
    assert [json.loads(line)["next"] for line in one if json.loads(line)["event"] == "step"][-1] == "succeeded"
    assert all(json.loads(line)["event"] for line in one)
    verdicts = {line.split("\t")[1]: line.split("\t")[2:] for line in ends}
    assert verdicts[good["id"]][0] == "succeeded"
    assert verdicts[bad["id"]] == ["failed", bad["fault"]["message"]]
    assert [json.loads(line)["job_id"] for line in slow] == ["slow"]
    assert {json.loads(line)["event"] for line in parties} >= {"party_away", "party_back"}


@on_call
async def test_show_says_who_works_at_a_job_and_how_far_that_is(desk: Desk) -> None:
    activity_id = desk.lab.activity("sleep 30")
    job = await desk.lab.agent.job(activity_id, states={"running"})
    shown = (await desk("show", job["id"])).out
    assert "now\tworked at (lease until 20" in shown
    desk.lab.sandbox.faults.add("status", status=503, target="api")
    try:
        await desk.lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")

        async def waits() -> str | None:
            out = (await desk("show", job["id"])).out
            return out if "now\tdue 20" in out and "Ovation" in out else None

        await until(waits, "the job waits for Ovation", desk.lab.agent.log)
    finally:
        desk.lab.sandbox.faults.remove()
    await desk.lab.agent.job(activity_id)
    assert "now\t" not in (await desk("show", job["id"])).out


@on_call
@pytest.mark.parametrize("time", ["1", "h", "0s", "1w", "-1h", "1 h", ""])
async def test_a_time_that_is_none(desk: Desk, time: str) -> None:
    done = await desk("jobs", f"--since={time}")
    assert done.code == 2
    assert "is no time such as 90s, 10m, 1h or 7d" in done.err


@on_call
async def test_a_log_is_followed_through_kills_of_the_agent_without_a_gap_or_a_repetition(desk: Desk) -> None:
    lab = desk.lab
    activity_id = lab.activity("i=0; while [ $i -lt 120 ]; do echo line $i; i=$((i+1)); sleep 0.05; done")
    job = await lab.agent.job(activity_id, states={"running"})
    follower = await desk.begin("logs", "-f", job["id"])
    assert follower.stdout is not None
    seen = [await asyncio.wait_for(follower.stdout.readline(), 20) for _ in range(10)]
    for _ in range(2):
        await desk.kill_and_start()
        seen += [await asyncio.wait_for(follower.stdout.readline(), 20) for _ in range(10)]
    rest, complaints = await asyncio.wait_for(follower.communicate(), 60)
    assert b"".join(seen) + rest == b"".join(b"line %d\n" % number for number in range(120))
    assert follower.returncode == 0
    assert complaints.count(b"trying again") in {1, 2}
    await lab.agent.job(activity_id)


@on_call
async def test_the_last_lines(desk: Desk) -> None:
    job, _ = await desk.lab.run("seq 1 1000; echo wrong >&2")
    assert (await desk("logs", "--tail", "3", job["id"])).out == "998\n999\n1000\n"
    assert (await desk("logs", "--tail", "0", job["id"])).out == ""
    assert (await desk("logs", "--stderr", "--tail", "9", job["id"])).out == "wrong\n"


@on_call
@pytest.mark.parametrize("query", ["offset=1099511627777", "offset=-1", "tail=x", "follow=2", "tail=1000001"])
async def test_a_place_in_a_log_that_is_none(desk: Desk, query: str) -> None:
    job, _ = await desk.lab.run("true")
    status, answer = await desk.lab.agent.call("GET", f"/api/jobs/{job['id']}/logs/stdout?{query}")
    assert status == 400
    assert query.partition("=")[0] in answer["errors"]["detail"]


@on_call
async def test_a_log_from_beyond_its_end_is_empty(desk: Desk) -> None:
    job, _ = await desk.lab.run("echo something")
    path = f"/api/jobs/{job['id']}/logs/stdout?offset=1099511627776"
    assert await desk.lab.agent.call("GET", path) == (200, "")


@on_call
async def test_the_jobs_own_lines_and_the_containers_are_told_apart(desk: Desk) -> None:
    activity_id = desk.lab.activity("echo one; echo two >&2; sleep 1; printf 'no end'; exit 4")
    job = await desk.lab.agent.job(activity_id, states={"running"})
    done = await desk("logs", "-f", "--all", job["id"])
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    said = sorted(line for line in lines if not line.startswith("job | "))
    assert said == ["err | two", "out | no end", "out | one"]  # the two streams come in no order
    moves = [line for line in lines if line.startswith("job | ")]
    for state in ("queued", "staging", "running", "failed"):
        assert any(state in move for move in moves)
    assert "exit code 4" in moves[-1]


@on_call
async def test_the_agents_own_log(desk: Desk) -> None:
    job, _ = await desk.lab.run("true")
    lines = [json.loads(line) for line in (await desk("logs", "--json")).out.splitlines()]
    steps = [line for line in lines if line["event"] == "step" and line["job_id"] == job["id"]]
    assert [line["state"] for line in steps][-1] == "reporting"
    assert {"timestamp", "level"} <= steps[0].keys()
    assert len((await desk("logs", "--tail", "2")).out.splitlines()) == 2
    assert "step" in (await desk("logs", "--since", "10m")).out
    assert (await desk("logs", "--since", "10m", job["id"])).code == 2
    assert (await desk("logs", "--all")).code == 2


@on_call
async def test_the_agents_own_log_is_followed_through_a_kill_of_the_agent(desk: Desk) -> None:
    follower = await desk.begin("logs", "-f", "--json")
    found: list[dict[str, Any]] = []

    async def ended(job_id: str) -> None:
        assert follower.stdout is not None
        while not any(line.get("job_id") == job_id and line.get("next") == "succeeded" for line in found):
            found.append(json.loads(await asyncio.wait_for(follower.stdout.readline(), 30)))

    first, _ = await desk.lab.run("true")
    await ended(first["id"])
    await desk.kill_and_start()
    second, _ = await desk.lab.run("true")
    await ended(second["id"])
    assert [line["event"] for line in found].count("agent_started") >= 1  # the new process's first lines came too
    lines = [(line["timestamp"], line["event"], line.get("job_id")) for line in found]
    assert len(set(lines)) == len(lines)
    follower.send_signal(signal.SIGINT)
    assert await follower.wait() == 130


@on_call
async def test_a_machine_is_emptied_and_filled_again(desk: Desk) -> None:
    running = desk.lab.activity("sleep 3")
    await desk.lab.agent.job(running, states={"running"})
    drain = await desk.begin("drain")
    assert drain.stdout is not None
    first = (await asyncio.wait_for(drain.stdout.readline(), 20)).decode()
    assert first.startswith("no queued job is let in here until")
    later = desk.lab.activity("true")
    out, _ = await asyncio.wait_for(drain.communicate(), 40)
    assert out.decode().splitlines()[-1] == "nothing is under way here"
    assert (await desk.lab.agent.job(running))["state"] == "succeeded"
    assert (await desk.lab.agent.job(later, states={"queued"}))["state"] == "queued"
    assert (await desk("drain", "--off")).out == "queued jobs are let in again\n"
    assert (await desk.lab.agent.job(later))["state"] == "succeeded"


@on_call
async def test_jobs_are_watched(desk: Desk) -> None:
    watcher = await desk.begin("jobs", "--watch", "--limit", "1")
    assert watcher.stdout is not None
    await asyncio.wait_for(watcher.stdout.readline(), 20)
    activity_id = desk.lab.activity("sleep 4", name="Watched")
    lines = ""
    while "Watched" not in lines or "succeeded" not in lines.rpartition("Watched")[0].rpartition("\n")[2]:
        lines += (await asyncio.wait_for(watcher.stdout.readline(), 30)).decode()
    assert "\trunning\tWatched" in lines
    watcher.send_signal(signal.SIGINT)
    assert await watcher.wait() == 130
    await desk.lab.agent.job(activity_id)


@on_call
async def test_jobs_are_watched_on_a_terminal(desk: Desk) -> None:
    process_id, terminal = pty.fork()
    if process_id == 0:
        os.chdir(desk.lab.directory)
        environment = {**desk.environment, "TERM": "xterm", "COLUMNS": "200", "LINES": "40"}
        os.execve(sys.executable, [sys.executable, "-m", "agent", "jobs", "--watch"], environment)  # noqa: S606 none wanted
    shown = b""
    while b"how far, or why" not in shown:
        shown += await asyncio.to_thread(os.read, terminal, 4096)
    os.kill(process_id, signal.SIGINT)
    _, status = await asyncio.to_thread(os.waitpid, process_id, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_shells_complete_the_commands(shell: str, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("ovation-agent")
    environment = {"PATH": os.environ["PATH"], "_OVATION_AGENT_COMPLETE": f"{shell}_source"}
    process = await asyncio.create_subprocess_exec(
        program, env=environment, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert b"ovation-agent" in out
    environment = {
        "PATH": os.environ["PATH"],
        "_OVATION_AGENT_COMPLETE": "bash_complete",
        "COMP_WORDS": "ovation-agent jobs --st",
        "COMP_CWORD": "2",
    }
    process = await asyncio.create_subprocess_exec(
        program, env=environment, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert {line.split(",")[1] for line in out.decode().splitlines()} == {"--state", "--stuck"}


@given(st.lists(st.sampled_from([b"a", b"\n", b"bb"]), max_size=12), st.integers(0, 6), st.sampled_from([1, 2, 3, 7]))
def test_the_last_lines_of_any_file(pieces: list[bytes], lines: int, piece_bytes: int) -> None:
    content = b"".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_file, "PIECE_BYTES", piece_bytes)
        found = content[log_file.before_lines(io.BytesIO(content), len(content), lines) :]
    assert found == (b"".join(content.splitlines(keepends=True)[-lines:]) if lines else b"")
