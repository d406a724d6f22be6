"""A person asks for a run: over HTTP, with the released client, and with our own command as a real process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.asking import follow
from agent.client import AgentRefused, Client
from agent.sandbox.server import Sandbox
from agent.sandbox.tokens import Principal
from tests.agents import ADMIN_TOKEN, running_agent
from tests.integration.sandbox_fixtures import released_client
from tests.lab import Lab, laboratory

pytestmark = pytest.mark.asyncio(loop_scope="module")
PERSON = "person@example.org"
STRANGER = "stranger@example.org"
NOBODY = "4b6de6e8-502b-40ed-95eb-4e4f3fc0ab40"
WAITS = "trap exit TERM; while ! [ -e /outputs/go ]; do sleep 0.05; done; echo went"


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Person:
    """Somebody at another machine's command line, with a home of their own and nothing of the agent's."""

    def __init__(self, lab: Lab, home: Path, email: str = PERSON) -> None:
        self.lab = lab
        self.home = home
        home.mkdir(parents=True)
        self.token = lab.sandbox.user_token(email)
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HOME": str(home),
            "OVATION_API_URL": lab.sandbox.api_url,
            "OVATION_TOKEN": self.token,
        }

    def keeps(self, users: dict[str, str], mode: int = 0o600) -> Path:
        """Write ~/.ovation/credentials.json as the released client does, and have no token in the environment."""
        path = self.home / ".ovation" / "credentials.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({self.lab.sandbox.api_url.removeprefix("http://"): users}))
        path.chmod(mode)
        self.environment.pop("OVATION_TOKEN", None)
        return path

    async def start(self, *arguments: str, spelled: str = "hpc_run") -> asyncio.subprocess.Process:
        """Start the command against the laboratory's agent."""
        url = [] if "--url" in arguments else ["--url", self.lab.agent.address]
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent", spelled, *arguments, *url),
            env=self.environment,
            cwd=self.home,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(self, *arguments: str, spelled: str = "hpc_run") -> Done:
        return await ended(await self.start(*arguments, spelled=spelled))


async def ended(process: asyncio.subprocess.Process, seconds: float = 60) -> Done:
    try:
        out, err = await asyncio.wait_for(process.communicate(), seconds)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    done = Done(process.returncode, out.decode(), err.decode())
    assert "Traceback" not in done.err, done.err
    return done


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    directory = tmp_path_factory.mktemp("hpc")
    async with Sandbox(directory / "sandbox") as sandbox:
        opened = Lab(sandbox, directory)
        sandbox.admin.add_member(opened.project_id, PERSON, "reader")
        settings = {"JWT_SECRET": sandbox.jwt_secret, "AGENT_MAX_RUNNING": "4"}
        async with running_agent(sandbox.environment(), directory / "agent", **settings) as agent:
            opened.agent = agent  # no webhook tells it of anything
            yield opened


@pytest.fixture
def person(lab: Lab, tmp_path: Path) -> Person:
    return Person(lab, tmp_path / "home")


@pytest.fixture
def calls(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count Ovation's calls by the token that they carry."""
    counted: Counter[str] = Counter()
    read = lab.sandbox.tokens.read

    def counting(token: str) -> Principal | None:
        counted[token] += 1
        return read(token)

    monkeypatch.setattr(lab.sandbox.tokens, "read", counting)
    return counted


def activity(lab: Lab, script: str, **what: Any) -> str:
    """Make an Activity with two images, so that nothing but a person's word starts a run."""
    return lab.activity(script, related=[lab.image(), lab.revision("other.sif", "x")], **what)


def go(lab: Lab, job_id: str) -> None:
    """Let a run of `WAITS` end."""
    (outputs,) = (lab.data_dir / "jobs" / job_id).rglob("outputs")
    (outputs / "go").touch()


async def call(lab: Lab, method: str, path: str, token: str | None, **options: Any) -> tuple[int, Any]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(lab.agent.address) as http,
        http.request(method, path, headers=headers, **options) as response,
    ):
        return response.status, await response.json()


async def test_a_run_is_asked_for_and_followed(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "echo done")
    done = await person("--activity", activity_id, "--image", "image.sif")
    assert (done.code, done.err) == (0, "")
    job = await lab.agent.job(activity_id)
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert lines[0] == ["job", job["id"]]
    assert lines[-1][1] == "succeeded"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line[0]) for line in lines[1:])
    assert (job["trigger"], job["requested_by"]) == ("hpc_run", PERSON)
    assert person.token not in done.out


@pytest.mark.parametrize("spelled", ["hpc_run", "hpc-run"])
async def test_no_wait_prints_the_job(lab: Lab, person: Person, spelled: str) -> None:
    activity_id = activity(lab, "true")
    url = f"{lab.agent.address}/hpc_run"
    done = await person(
        *("--activity", activity_id, "--image", "image.sif", "--no-wait", "--url", url), spelled=spelled
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.strip() == (await lab.agent.job(activity_id))["id"]


async def test_a_failure_is_1_with_its_cause(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "printf 'no such \\033[2Jcolumn\\n' >&2; exit 3")
    done = await person("--activity", activity_id, "--image", "image.sif")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("ovation-agent: job ")
    assert " failed: user_code: The program ended with exit code 3." in line
    assert "\x1b" not in done.out + done.err


async def test_a_cancelled_job_is_1(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, WAITS)
    process = await person.start("--activity", activity_id, "--image", "image.sif")
    job = await lab.agent.job(activity_id, states={"running"})
    await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")
    done = await ended(process)
    assert done.code == 1
    assert f"job {job['id']} cancelled" in done.err


async def test_json_is_the_ended_job_and_nothing_else(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "exit 4")
    done = await person("--activity", activity_id, "--image", "image.sif", "--json")
    assert done.code == 1
    job = json.loads(done.out)
    assert (job["state"], job["exit_code"], job["activity_id"]) == ("failed", 4, activity_id)
    started = await person("--activity", activity_id, "--image", "image.sif", "--json", "--no-wait")
    assert json.loads(started.out)["run"] == 2
    await lab.agent.job(activity_id, run=2)


async def test_files_and_bytes_are_told(lab: Lab, person: Person) -> None:
    large = lab.revision("large.bin", os.urandom(400_000))
    activity_id = activity(lab, "true", inputs=[large])
    key = lab.sandbox.model.records.entity(large)
    assert key is not None
    path = f"GET .*{re.escape(str(key.object_key))}"
    fault = lab.sandbox.faults.add("drip", path, target="store", bytes_per_second=50_000)
    try:
        done = await person("--activity", activity_id, "--image", "image.sif")
    finally:
        lab.sandbox.faults.remove(fault.id)
    assert done.code == 0
    how_far = r"\tstaging\t\d of 4 files, [\d.]+ [kM]?B of [\d.]+ MB, [\d.]+ [kM]?B/s, 0:00:0\d left$"
    assert re.search(how_far, done.out, re.MULTILINE), done.out


async def test_interrupted_the_job_goes_on_and_is_found_again(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, WAITS)
    process = await person.start("--activity", activity_id, "--image", "image.sif")
    assert process.stdout is not None
    assert (await asyncio.wait_for(process.stdout.readline(), 30)).startswith(b"job\t")
    job = await lab.agent.job(activity_id, states={"running"})
    process.send_signal(signal.SIGINT)
    done = await ended(process)
    assert done.code == 130
    again = f"ovation-agent hpc_run --job {job['id']}"
    assert done.err == f"ovation-agent: interrupted: the job goes on; follow it with `{again}`\n"
    repeated = await person("--activity", activity_id, "--image", "image.sif", "--no-wait")
    assert repeated.out.strip() == job["id"]
    process = await person.start("--job", job["id"])
    assert process.stdout is not None
    assert (await process.stdout.readline()).decode().strip() == f"job\t{job['id']}"
    go(lab, job["id"])
    done = await ended(process)
    assert done.code == 0
    assert "\tsucceeded\t" in done.out
    assert len(await lab.agent.jobs(activity_id)) == 1


async def test_on_a_terminal(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "true", name="evil\x1b]0;owned\x07")

    def run() -> str:
        shown = bytearray()
        process_id, terminal = pty.fork()
        if process_id == 0:
            os.chdir(person.home)
            arguments = ["hpc_run", "--activity", activity_id, "--image", "image.sif", "--url", lab.agent.address]
            environment = {**person.environment, "TERM": "xterm", "COLUMNS": "200"}
            os.execve(sys.executable, [sys.executable, "-m", "agent", *arguments], environment)  # noqa: S606 none wanted
        with contextlib.suppress(OSError):  # the terminal is gone when the command is
            while piece := os.read(terminal, 4096):
                shown += piece
        os.close(terminal)
        _, status = os.waitpid(process_id, 0)
        assert os.waitstatus_to_exitcode(status) == 0, shown.decode()
        return shown.decode()

    shown = await asyncio.to_thread(run)
    assert "succeeded" in shown
    assert "owned" not in shown


async def test_the_token_is_found_where_the_released_client_keeps_it(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "true")
    wish = ("--activity", activity_id, "--image", "image.sif")
    path = person.keeps({PERSON: person.token, STRANGER: lab.sandbox.user_token(STRANGER)}, 0o644)
    several = await person(*wish)
    assert several.code == 2
    assert f"choose one with --user: {PERSON}, {STRANGER}" in several.err
    unseen = await person(*wish, "--user", STRANGER)
    assert unseen.code == 1
    assert "no such Activity, or it or one of its inputs is not for this token" in unseen.err
    assert await lab.agent.jobs(activity_id) == []
    done = await person(*wish, "--user", PERSON)
    assert done.code == 0
    assert done.err == f"ovation-agent: {path} is open to others: chmod 600 {path}\n"
    path.unlink()
    nothing = await person(*wish)
    assert nothing.code == 2
    assert "no token of yours: neither OVATION_TOKEN nor" in nothing.err


async def test_there_is_no_option_for_a_token(person: Person) -> None:
    for option in ("-t", "--token"):
        done = await person("--activity", NOBODY, "--image", "i", option, "x")
        assert done.code == 2
        assert "No such option" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--activity", NOBODY],
        ["--image", "i"],
        ["--job", NOBODY, "--image", "i"],
        ["--job", NOBODY, "--no-wait"],
        ["--activity", NOBODY, "--image", "i", "--organization", "x"],
        ["--activity", NOBODY, "--image", "i", "--url", "http://user:password@127.0.0.1:1"],
        ["--activity", NOBODY, "--image", "i", "--url", "nonsense"],
    ],
    ids=" ".join,
)
async def test_a_wrong_command_line_is_2(person: Person, arguments: list[str]) -> None:
    done = await person(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "password@" not in done.err


async def test_names_that_exist_are_told(lab: Lab, person: Person) -> None:
    activity_id = lab.activity("true", related=[lab.image(name="b.sif"), lab.image(name="a.sif")])
    done = await person("--activity", activity_id, "--image", "c.sif")
    assert done.code == 1
    assert done.err == ("ovation-agent: no related file is named c.sif; the related files are: a.sif, b.sif\n")


async def test_who_may_not_is_told_no_more_than_by_ovation(lab: Lab, tmp_path: Path) -> None:
    stranger = Person(lab, tmp_path / "stranger", STRANGER)
    activity_id = activity(lab, "true")
    told = [await stranger("--activity", each, "--image", "image.sif") for each in (activity_id, NOBODY)]
    assert told[0] == told[1]
    assert told[0].code == 1


async def test_a_token_that_is_refused(lab: Lab, person: Person) -> None:
    person.environment["OVATION_TOKEN"] = jwt.encode({"sub": "u", "exp": 1}, lab.sandbox.jwt_secret, "HS256")
    done = await person("--activity", NOBODY, "--image", "i")
    assert done.code == 1
    assert "the token is not valid" in done.err
    assert "get a new token from Ovation (this one: OVATION_TOKEN)" in done.err
    assert person.environment["OVATION_TOKEN"] not in done.err


async def test_an_agent_that_is_away(person: Person) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    done = await person("--activity", NOBODY, "--image", "i", "--url", url)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"ovation-agent: no agent answers at {url} ")


async def test_somebody_else_at_the_address(lab: Lab, person: Person) -> None:
    done = await person("--activity", NOBODY, "--image", "i", "--url", f"{lab.sandbox.s3_url}")
    assert done.code == 1
    assert "is it an agent?" in done.err


async def test_no_token_goes_to_whoever_listens_at_the_usual_port(person: Person) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent", "hpc_run", "--activity", NOBODY, "--image", "i"),
        env=person.environment,
        cwd=person.home,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    done = await ended(process)
    assert done.code == 1
    assert "name yours with --url http://HOST:PORT" in done.err


async def test_an_agent_on_this_machine_is_found(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "true")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent", "hpc_run", "--activity", activity_id, "--image", "image.sif"),
        env={**person.environment, "AGENT_DATA_DIR": str(lab.data_dir)},
        cwd=person.home,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert (await ended(process)).code == 0


async def test_the_agent_is_restarted_meanwhile(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    async with laboratory(tmp_path / "lab", AGENT_PORT=port) as lab:
        person = Person(lab, tmp_path / "home")
        lab.sandbox.admin.add_member(lab.project_id, PERSON, "reader")
        activity_id = activity(lab, WAITS)
        process = await person.start("--activity", activity_id, "--image", "image.sif")
        job = await lab.agent.job(activity_id, states={"running"})
        await lab.agent.stop()
        assert process.stderr is not None
        told = (await asyncio.wait_for(process.stderr.readline(), 30)).decode()
        assert "Waiting for it; the job goes on." in told
        environment = lab.sandbox.environment()
        async with running_agent(environment, lab.directory / "agent", AGENT_PORT=port) as lab.agent:
            go(lab, job["id"])
            done = await ended(process)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1].split("\t")[1] == "succeeded"


async def test_an_agent_that_stays_away_is_given_up() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    told: list[str] = []
    async with Client(url, "token") as client:
        with pytest.raises(AgentRefused, match="no agent answers"):
            async for _ in follow(client, NOBODY, told.append, look_seconds=0.01, patience_seconds=0.1):
                pass
    assert len(told) == 1


async def test_the_token_is_used_once_and_following_costs_nothing(
    lab: Lab, person: Person, calls: Counter[str]
) -> None:
    data = lab.revision("data.csv")
    activity_id = activity(lab, WAITS, inputs=[data])
    body = {"activity_id": activity_id, "image_name": "image.sif"}
    status, made = await call(lab, "POST", "/hpc_run", person.token, json=body)
    assert status == 201
    assert calls[person.token] == 3  # the Activity and each of its two inputs, once
    for _ in range(5):
        status, job = await call(lab, "GET", f"/hpc_run/{made['job_id']}", person.token)
        assert (status, job["id"], job["requested_by"]) == (200, made["job_id"], PERSON)
    assert calls[person.token] == 3
    await lab.agent.job(activity_id, states={"running"})
    go(lab, made["job_id"])
    await lab.agent.job(activity_id)
    assert calls[person.token] == 3


async def test_who_may_see_a_job(lab: Lab, person: Person, calls: Counter[str]) -> None:
    admin = lab.sandbox.admin
    secret_project = admin.create_project("Secret")["_id"]
    secret = admin.create_revision(secret_project, "secret.csv", "1\n")["_id"]
    admin.add_member(secret_project, PERSON, "reader")
    activity_id = activity(lab, "true", inputs=[secret])
    body = {"activity_id": activity_id, "image_name": "image.sif"}
    _, made = await call(lab, "POST", "/hpc_run", person.token, json=body)
    path = f"/hpc_run/{made['job_id']}"
    hidden = "no such job, or its Activity or one of its inputs is not for this token"
    assert await call(lab, "GET", path, None) == (401, {"errors": {"detail": "a bearer token is needed"}})
    assert (await call(lab, "GET", path, "opaque"))[0] == 401
    assert (await call(lab, "GET", path, ADMIN_TOKEN))[0] == 401
    colleague = lab.sandbox.user_token("colleague@example.org")
    for _ in range(2):  # a refusal is not remembered
        assert await call(lab, "GET", path, colleague) == (404, {"errors": {"detail": hidden}})
        admin.add_member(lab.project_id, "colleague@example.org", "reader")
    admin.add_member(secret_project, "colleague@example.org", "reader")
    assert (await call(lab, "GET", path, colleague))[0] == 200
    asked = calls[colleague]
    assert (await call(lab, "GET", path, colleague))[0] == 200
    assert calls[colleague] == asked
    for unknown in (NOBODY, "nonsense", "..%2fjobs", "%ff"):
        answer = await call(lab, "GET", f"/hpc_run/{unknown}", person.token)
        assert answer == (404, {"errors": {"detail": hidden}})
    await lab.agent.job(activity_id)


async def test_a_status_while_ovation_is_away(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "true")
    body = {"activity_id": activity_id, "image_name": "image.sif"}
    _, made = await call(lab, "POST", "/hpc_run", person.token, json=body)
    lab.sandbox.admin.add_member(lab.project_id, "second@example.org", "reader")
    fault = lab.sandbox.faults.add("status", f"GET .*{activity_id}", target="api", status=503)
    try:
        answer = await call(lab, "GET", f"/hpc_run/{made['job_id']}", lab.sandbox.user_token("second@example.org"))
        assert answer == (503, {"errors": {"detail": "Ovation cannot be asked now; try again"}})
        assert (await call(lab, "GET", f"/hpc_run/{made['job_id']}", person.token))[0] == 200
    finally:
        lab.sandbox.faults.remove(fault.id)
    assert (await lab.agent.job(activity_id))["state"] == "succeeded"


async def test_the_agents_own_trouble_is_not_the_persons(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "true")
    fault = lab.sandbox.faults.add("status", f"{activity_id}/links/inputs", target="api", status=401)
    try:
        body = {"activity_id": activity_id, "image_name": "image.sif"}
        assert (await call(lab, "POST", "/hpc_run", person.token, json=body))[0] == 503
    finally:
        lab.sandbox.faults.remove(fault.id)


def everything_written(directory: Path) -> Iterator[tuple[Path, bytes]]:
    for path in directory.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):  # the database removes files of its own
                yield path, path.read_bytes()


async def nowhere(lab: Lab, token: str) -> None:
    """Assert that neither a token nor its signature stands in the agent's log, database or data directory."""
    signature = token.rpartition(".")[2]
    for path, content in everything_written(lab.directory / "agent"):
        assert token.encode() not in content, path
        assert signature.encode() not in content, path
    connection = await asyncpg.connect(user="postgres", database="postgres", host=str(lab.data_dir / "postgres"))
    try:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert tables
        for table in tables:
            query = f"SELECT count(*) FROM {table['tablename']} AS t WHERE strpos(t::text, $1) > 0"  # noqa: S608 its own tables
            assert await connection.fetchval(query, signature) == 0, table
    finally:
        await connection.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_the_released_client_with_an_hs256_token(lab: Lab, person: Person, calls: Counter[str]) -> None:
    activity_id = activity(lab, "echo from the released client")
    client = released_client()
    session = client.session.Session(person.token, api=lab.sandbox.api_url)
    entity = await asyncio.to_thread(client.core.get_entity, session, activity_id)
    calls.clear()
    url = f"{lab.agent.address}/hpc_run"
    assert await asyncio.to_thread(client.activities.start_compute, session, entity, "image.sif", url) == 201
    assert calls[person.token] == 2  # the Activity and its input, once
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["trigger"], job["requested_by"]) == ("succeeded", "hpc_run", PERSON)
    assert (await lab.outputs(activity_id))["stdout.log"] == b"from the released client\n"
    await nowhere(lab, person.token)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_the_released_client_with_an_rs256_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = rsa.generate_private_key(65537, 2048)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    async with laboratory(tmp_path / "lab", JWT_PUBLIC_KEY=public) as lab:
        user_id = lab.sandbox.admin.create_user(PERSON)["id"]
        lab.sandbox.admin.add_member(lab.project_id, PERSON, "reader")
        claims = {"sub": user_id, "email": PERSON, "exp": int(time.time()) + 600}
        token = jwt.encode(claims, private, "RS256")
        expired = jwt.encode({**claims, "exp": int(time.time()) - 600}, private, "RS256")
        read, asked = lab.sandbox.tokens.read, Counter[str]()

        def ovation(given: str) -> Principal | None:
            """Know this one too, as Ovation knows those of its sign-in service."""
            asked[given] += 1
            return Principal(user_id, service=False) if given == token else read(given)

        monkeypatch.setattr(lab.sandbox.tokens, "read", ovation)
        client = released_client()
        activity_id = activity(lab, "true")

        def ask(with_token: str) -> int:
            session = client.session.Session(with_token, api=lab.sandbox.api_url)
            entity = client.session.DataDict(_id=activity_id)
            url = f"{lab.agent.address}/hpc_run"
            return int(client.activities.start_compute(session, entity, "image.sif", url))

        for bad in (expired, lab.sandbox.user_token(PERSON)):
            with pytest.raises(Exception, match="401 Client Error"):
                await asyncio.to_thread(ask, bad)
            assert asked[bad] == 0  # Ovation is not even asked
        assert await asyncio.to_thread(ask, token) == 201
        assert asked[token] == 2
        job = await lab.agent.job(activity_id)
        assert (job["state"], job["requested_by"]) == ("succeeded", PERSON)
        await nowhere(lab, token)


async def test_nothing_of_the_persons_token_stays_after_following(lab: Lab, person: Person) -> None:
    activity_id = activity(lab, "true")
    assert (await person("--activity", activity_id, "--image", "image.sif")).code == 0
    await nowhere(lab, person.token)
