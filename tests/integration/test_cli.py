"""The commands as people and scripts start them: real processes, their exit codes, and the one line that helps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest
import pytest_asyncio

from agent.client import AgentRefused, Client
from agent.sandbox.faults import FaultKind
from agent.sandbox.server import Sandbox
from agent.settings import Settings
from tests.agents import ADMIN_TOKEN, AgentProcess, agent_environment, running_agent, secrets_in
from tests.lab import Lab, laboratory

HOSTILE = "evil\x1b]0;owned\x07\x9b31m\nforged"


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


async def command(*arguments: str, environment: dict[str, str], cwd: Path, seconds: float = 30, stop: int = 0) -> Done:
    """Run a command to its end; with `stop`, send that signal once it has written something.

    Whatever it says, it is none of the secrets that it was given.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent", *arguments),
        env=environment,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    first = b""
    try:
        async with asyncio.timeout(seconds):
            if stop:
                first = await process.stdout.read(1)
                process.send_signal(stop)
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    done = Done(process.returncode, (first + out).decode(), err.decode())
    assert not (said := secrets_in(f"{done.out}\n{done.err}", environment)), said
    return done


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as running:
        yield running


async def refused(environment: dict[str, str], cwd: Path, code: int, seconds: float = 30) -> str:
    """Start `serve`, which must end by itself, with one clear line; return it."""
    done = await command("serve", environment=environment, cwd=cwd, seconds=seconds)
    told = [line for line in done.err.splitlines() if not line.startswith("{")]
    assert done.code == code, done.err
    assert len(told) == 1, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    return told[0].removeprefix("ovation-agent: ")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_serve_without_webhook_credentials(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = agent_environment(sandbox.environment(), tmp_path)
    del environment["AGENT_WEBHOOK_USERNAME"], environment["AGENT_WEBHOOK_PASSWORD"]
    line = await refused(environment, tmp_path, 2, seconds=10)
    assert "set AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD" in line
    assert not (tmp_path / "data").exists()


async def test_serve_with_empty_webhook_credentials(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = agent_environment(
        sandbox.environment(), tmp_path, AGENT_WEBHOOK_USERNAME="", AGENT_WEBHOOK_PASSWORD=""
    )
    assert "webhooks would be taken from anybody" in await refused(environment, tmp_path, 2, seconds=10)


async def test_serve_with_a_bad_setting(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = agent_environment(sandbox.environment(), tmp_path, AGENT_PROT="8080")
    line = await refused(environment, tmp_path, 2, seconds=10)
    assert line == "environment: AGENT_PROT: no such setting; did you mean AGENT_PORT?"


async def test_serve_with_a_missing_file_of_settings(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = agent_environment(sandbox.environment(), tmp_path, AGENT_CONFIG="nowhere.toml")
    assert "nowhere.toml: cannot be read: No such file" in await refused(environment, tmp_path, 2, seconds=10)


async def test_serve_without_the_database_server(sandbox: Sandbox, tmp_path: Path) -> None:
    url = f"postgresql://agent:hunter2@127.0.0.1:{free_port()}/agent"
    environment = agent_environment(sandbox.environment(), tmp_path, AGENT_DATABASE_URL=url)
    line = await refused(environment, tmp_path, 1)
    assert "PostgreSQL at 127.0.0.1:" in line
    assert "cannot be reached" in line
    assert "hunter2" not in line


async def test_serve_without_the_database(sandbox: Sandbox, tmp_path: Path, server_url: str) -> None:
    url = server_url.replace("/postgres?", "/nothing?")
    environment = agent_environment(sandbox.environment(), tmp_path, AGENT_DATABASE_URL=url)
    assert 'database "nothing" does not exist; create it with' in await refused(environment, tmp_path, 1)


async def test_serve_before_and_after_migrate(sandbox: Sandbox, tmp_path: Path, database_url: str) -> None:
    environment = agent_environment(sandbox.environment(), tmp_path, AGENT_DATABASE_URL=database_url)
    assert "run `ovation-agent migrate`" in await refused(environment, tmp_path, 1)
    first = await command("migrate", environment=environment, cwd=tmp_path)
    assert first.code == 0
    assert "applied 0001_initial" in first.out
    again = await command("migrate", environment=environment, cwd=tmp_path)
    assert again == Done(0, "the schema is up to date\n", "")
    async with running_agent(sandbox.environment(), tmp_path, AGENT_DATABASE_URL=database_url) as agent:
        assert await agent.call("GET", "/readyz") == (200, {"status": "ready"})
    assert await agent.stop() == 0


async def test_serve_on_a_newer_database(sandbox: Sandbox, tmp_path: Path, database_url: str) -> None:
    environment = agent_environment(sandbox.environment(), tmp_path, AGENT_DATABASE_URL=database_url)
    await command("migrate", environment=environment, cwd=tmp_path)
    connection = await asyncpg.connect(database_url)
    await connection.execute("INSERT INTO schema_migrations (number, name) VALUES (9999, 'from_the_future')")
    await connection.close()
    line = await refused(environment, tmp_path, 1)
    assert "is at version 9999, newer than this program's" in line
    assert "upgrade the agent" in line


async def test_serve_with_a_token_that_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.AAAA"
    environment = agent_environment(sandbox.environment(), tmp_path, OVATION_TOKEN=token)
    line = await refused(environment, tmp_path, 1)
    assert line.startswith(f"{sandbox.api_url} does not accept the agent's token")
    assert token not in line


async def test_serve_without_any_token(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = agent_environment(sandbox.environment(), tmp_path, OVATION_TOKEN="")
    line = await refused(environment, tmp_path, 2)
    assert "set OVATION_TOKEN, or OVATION_CLIENT_ID and OVATION_CLIENT_SECRET" in line


async def test_serve_starts_while_ovation_is_away(sandbox: Sandbox, tmp_path: Path) -> None:
    away = {**sandbox.environment(), "OVATION_API_URL": f"http://127.0.0.1:{free_port()}"}
    async with running_agent(away, tmp_path) as agent:
        (warning,) = agent.events("party_away")
        assert warning["level"] == "warning"
        assert await agent.call("GET", "/readyz") == (200, {"status": "ready"})


async def test_serve_starts_while_ovation_is_broken(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.faults.add(FaultKind.STATUS, target="api", status=503)
    async with running_agent(sandbox.environment(), tmp_path) as agent:
        assert len(agent.events("party_away")) == 1


async def test_serve_without_apptainer(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = agent_environment(sandbox.environment(), tmp_path, PATH=str(tmp_path))
    assert "Neither apptainer nor singularity is on PATH" in await refused(environment, tmp_path, 1)


async def test_serve_on_a_port_in_use(sandbox: Sandbox, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        environment = agent_environment(sandbox.environment(), tmp_path, AGENT_PORT=str(port))
        line = await refused(environment, tmp_path, 2)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line
    assert "AGENT_PORT" in line


@pytest.mark.parametrize("place", ["file", "file/data", "/proc/data"])
async def test_serve_where_it_cannot_write(place: str, sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    data_dir = str(tmp_path / place)
    environment = agent_environment(sandbox.environment(), tmp_path, AGENT_DATA_DIR=data_dir)
    line = await refused(environment, tmp_path, 2)
    assert line.startswith(f"AGENT_DATA_DIR: {data_dir} cannot be used: ")


async def test_ctrl_c_ends_serve_in_order(sandbox: Sandbox, tmp_path: Path) -> None:
    async with running_agent(sandbox.environment(), tmp_path) as agent:
        agent.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(agent.process.wait(), 20) == 0
    assert agent.events("agent_stopped")
    assert not [line for line in agent.log.read_text().splitlines() if not line.startswith("{")]


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["try", "-h"], ["--version"]], ids=" ".join)
def test_help_imports_little(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom agent.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'aiohttp', 'pydantic', 'asyncpg', 'asyncio', 'rich', 'structlog', 'botocore'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=20)
    assert time.monotonic() - began < 2  # 0.06 s on two idle cores; machines that test are busy


class Desk:
    """Somebody at the command line, next to an agent with two ended jobs and a hostile name."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.agent: AgentProcess = lab.agent
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "AGENT_DATA_DIR": str(lab.data_dir),
            "AGENT_ADMIN_TOKEN": ADMIN_TOKEN,
        }
        self.activity_id = ""
        self.job: dict[str, Any] = {}

    async def __call__(self, *arguments: str, stop: int = 0, **environment: str) -> Done:
        return await command(
            *arguments, environment={**self.environment, **environment}, cwd=self.lab.directory, stop=stop
        )

    def on_terminal(self, *arguments: str) -> str:
        """Run a command on a pseudo-terminal and return what it shows."""
        shown = bytearray()
        process_id, terminal = pty.fork()
        if process_id == 0:
            os.chdir(self.lab.directory)
            environment = {**self.environment, "TERM": "xterm", "COLUMNS": "300"}
            os.execve(sys.executable, [sys.executable, "-m", "agent", *arguments], environment)  # noqa: S606 none wanted
        with contextlib.suppress(OSError):  # the terminal is gone when the command is
            while piece := os.read(terminal, 4096):
                shown += piece
        os.close(terminal)
        _, status = os.waitpid(process_id, 0)
        assert os.waitstatus_to_exitcode(status) == 0, shown.decode()
        return shown.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    async with laboratory(tmp_path_factory.mktemp("desk")) as lab:
        opened = Desk(lab)
        opened.activity_id = lab.activity("printf 'out\\033[2J'; echo trouble >&2; exit 3", name=HOSTILE)
        opened.job = await lab.agent.job(opened.activity_id)
        yield opened


on_call = pytest.mark.asyncio(loop_scope="module")


@on_call
async def test_jobs(desk: Desk) -> None:
    done = await desk("jobs", "--activity", desk.activity_id)
    assert done.code == 0
    (line,) = done.out.splitlines()
    assert line.split("\t")[:2] == [desk.job["id"], "failed"]
    assert "exit code 3" in line
    as_json = json.loads((await desk("jobs", "--json", "--limit", "1", "--state", "failed")).out)
    assert [job["id"] for job in as_json] == [desk.job["id"]]
    assert as_json[0]["activity_name"] == HOSTILE
    assert (await desk("jobs", "--state", "queued")).out == ""


@on_call
async def test_show(desk: Desk) -> None:
    done = await desk("show", desk.job["id"])
    assert done.code == 0
    assert f"activity_id\t{desk.activity_id}" in done.out
    assert "user_code: " in done.out
    assert "\tcollecting\t" in done.out
    as_json = json.loads((await desk("show", "--json", desk.job["id"])).out)
    assert as_json["exit_code"] == 3
    assert as_json["events"][-1]["state"] == "failed"


@on_call
async def test_why(desk: Desk) -> None:
    done = await desk("why", desk.activity_id)
    assert done.code == 0
    assert "webhook" in done.out
    assert desk.job["id"] in done.out
    as_json = json.loads((await desk("why", "--json", desk.activity_id)).out)
    assert as_json["id"] == desk.activity_id
    assert [job["id"] for job in as_json["jobs"]] == [desk.job["id"]]


@on_call
async def test_logs(desk: Desk) -> None:
    assert await desk("logs", desk.job["id"]) == Done(0, "out\x1b[2J", "")
    assert await desk("logs", "--stderr", "-f", desk.job["id"]) == Done(0, "trouble\n", "")


@on_call
@pytest.mark.parametrize("name", ["jobs", "show", "why", "logs"])
@pytest.mark.parametrize("as_json", [False, True])
async def test_nothing_foreign_reaches_a_terminal(desk: Desk, name: str, as_json: bool) -> None:
    subject = {"jobs": [], "why": [desk.activity_id]}.get(name, [desk.job["id"]])
    options = ["--json"] if as_json and name != "logs" else []
    shown = await asyncio.to_thread(desk.on_terminal, name, *options, *subject)
    assert not {"\x07", "\x9b"} & set(shown)
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    assert ("out" if name == "logs" else desk.job["id"]) in shown


@on_call
@pytest.mark.parametrize("name", ["show", "logs", "cancel", "rerun"])
@pytest.mark.parametrize("job", ["nonsense", "00000000-0000-4000-8000-000000000000", "../jobs", "a?b#c/%00", "\u00e9"])
async def test_an_unknown_job_is_one_clear_line(desk: Desk, name: str, job: str) -> None:
    assert await desk(name, job) == Done(1, "", "ovation-agent: no such job\n")


@on_call
async def test_an_unknown_activity_is_one_clear_line(desk: Desk) -> None:
    done = await desk("why", "00000000-0000-4000-8000-000000000000")
    assert done == Done(1, "", "ovation-agent: no webhook and no person has named this Activity\n")
    assert (await desk("why", "../jobs")).code == 1


@on_call
async def test_a_state_that_is_none_is_explained(desk: Desk) -> None:
    done = await desk("jobs", "--state", "happy")
    assert done.code == 1
    assert "the states are queued, staging" in done.err


@on_call
async def test_cancel_and_what_has_ended(desk: Desk) -> None:
    done = await desk("cancel", desk.job["id"])
    assert done == Done(1, "", "ovation-agent: the job has ended already: failed\n")


@on_call
async def test_rerun_tells_names_it_cannot_trust_safely(desk: Desk) -> None:
    lab = desk.lab
    image = lab.image(name="one.sif")
    activity_id = lab.activity("true", related=[image, lab.revision(f"{HOSTILE}.txt")])
    job = await lab.agent.job(activity_id)
    lab.sandbox.admin.unlink(f"{activity_id}--actions-->{image}")
    done = await desk("rerun", job["id"])
    assert done.code == 1
    assert "no related file is named one.sif" in done.err
    assert "evil" in done.err
    assert len(done.err.splitlines()) == 1
    assert not {"\x1b", "\x07", "\x9b"} & set(done.err)


@on_call
async def test_rerun_follow_cancel(desk: Desk) -> None:
    lab = desk.lab
    activity_id = lab.activity("trap exit TERM; echo begun; sleep 600 & wait")
    job = await lab.agent.job(activity_id, states={"running"})
    follower = asyncio.create_task(desk("logs", "-f", job["id"]))
    interrupted = await desk("logs", "-f", job["id"], stop=signal.SIGINT)
    assert (interrupted.code, interrupted.err) == (130, "")
    assert not follower.done()
    cancelled = await desk("cancel", job["id"])
    assert cancelled.code == 0
    assert cancelled.out.startswith("asked: the job is ")
    assert await asyncio.wait_for(follower, 30) == Done(0, "begun\n", "")
    assert (await lab.agent.job(activity_id))["state"] == "cancelled"
    again = await desk("rerun", job["id"])
    assert again.code == 0
    second = await lab.agent.job(activity_id, run=2, states={"running"})
    assert second["id"] == again.out.strip()
    assert second["trigger"] == "rerun"
    assert (await desk("cancel", second["id"])).code == 0
    await lab.agent.job(activity_id, run=2)


@on_call
async def test_the_token_is_found_in_the_data_directory_or_missed_clearly(desk: Desk) -> None:
    done = await desk("jobs", AGENT_ADMIN_TOKEN="")
    assert done.code == 2
    assert "no admin token" in done.err
    assert "or set AGENT_ADMIN_TOKEN" in done.err
    wrong = await desk("jobs", AGENT_ADMIN_TOKEN="wrong")
    assert wrong.code == 1
    assert "AGENT_ADMIN_TOKEN must be the agent's" in wrong.err
    assert "wrong" not in wrong.err.replace("AGENT_ADMIN_TOKEN", "")


async def test_an_agent_that_makes_its_own_token(sandbox: Sandbox, tmp_path: Path) -> None:
    async with running_agent(sandbox.environment(), tmp_path, AGENT_ADMIN_TOKEN="") as agent:
        token_file = tmp_path / "data" / "admin-token"
        assert token_file.stat().st_mode & 0o777 == 0o600
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "AGENT_DATA_DIR": str(tmp_path / "data"),
        }
        assert await command("jobs", environment=environment, cwd=tmp_path) == Done(0, "", "")
        await agent.kill()
        done = await command("jobs", environment=environment, cwd=tmp_path)
    assert done.code == 1
    assert "is not running: start it with `ovation-agent serve`" in done.err


async def test_no_agent_at_the_address(tmp_path: Path) -> None:
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "AGENT_PORT": str(port),
        "AGENT_ADMIN_TOKEN": ADMIN_TOKEN,
    }
    done = await command("jobs", environment=environment, cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith(f"ovation-agent: no agent answers at http://127.0.0.1:{port} ")
    assert len(done.err.splitlines()) == 1


async def test_somebody_else_at_the_address(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT_PORT", sandbox.api_url.rpartition(":")[2])
    monkeypatch.setenv("AGENT_ADMIN_TOKEN", ADMIN_TOKEN)
    async with Client.find(Settings.load()) as client:
        with pytest.raises(AgentRefused) as caught:
            await client.get("api", "jobs")
    assert sandbox.api_url in str(caught.value) or "Not found" in str(caught.value)


def test_the_command_line_loads_nothing_that_it_does_not_need() -> None:
    heavy = "aiohttp aiobotocore asyncpg botocore pydantic rich structlog"
    code = f"import sys, agent.cli; print(sorted(set({heavy.split()!r}) & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
