"""Outside parties that are away for a while: told once, not hammered, waited out, and noticed when they are back."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tenacity
from aiohttp import web
from structlog.testing import capture_logs

from agent.adapters import apptainer, lane, local, ovation_answers, ovation_http
from agent.adapters import circuit as circuit_module
from agent.adapters.circuit import Circuit
from agent.adapters.download import Downloader
from agent.adapters.objects import AddressExpired
from agent.adapters.ovation import Ovation
from agent.db.database import Database
from agent.db.reconciliations import Reconciliations
from agent.db.watched import WatchList
from agent.domain.webhook import Hint
from agent.errors import (
    OvationError,
    OvationNotFound,
    OvationUnavailable,
    StorageError,
    StorageMismatch,
    StorageRefused,
    StorageUnavailable,
)
from agent.sandbox.server import Sandbox
from agent.settings import Settings
from agent.trigger.evaluate import Evaluator
from agent.trigger.reconcile import Reconciler
from tests.integration.raw_server import RawServer, answer
from tests.integration.sandbox_fixtures import until
from tests.lab import Lab, laboratory

OVATION, STORE, TOKENS = "Ovation", "the object store", "Ovation's token service"


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as opened:
        yield opened


@pytest.fixture
def lines() -> Any:
    with capture_logs() as captured:
        yield captured


def circuit_of(party: str) -> Circuit:
    """Return a circuit that asks soon and often: after 0.1 s, 0.2 s … 1 s."""
    error: Any = StorageUnavailable if party == STORE else OvationUnavailable
    return Circuit(party, error, jitter=lambda: 0.05)


def settings_of(sandbox: Sandbox, reconcile_seconds: float = 3600, **ovation: Any) -> Settings:
    own = {} if "client_id" in ovation else {"token": sandbox.service_token}
    base = {"api_url": sandbox.api_url, "hosts": (sandbox.services_url,), **own, **ovation}
    return Settings.model_validate(
        {"ovation": base, "agent": {"webhook_anonymous": True, "reconcile_seconds": reconcile_seconds}}
    )


def opened(sandbox: Sandbox, **ovation: Any) -> Ovation:
    return Ovation.open(settings_of(sandbox, **ovation).ovation, circuit_of(OVATION))


def account(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "auth_domain": sandbox.auth_url,
        "client_id": sandbox.tokens.client_id,
        "client_secret": sandbox.tokens.client_secret,
    }


def told(lines: list[Any], party: str = OVATION) -> list[str]:
    return [line["event"] for line in lines if line.get("party") == party]


def parties(lines: list[Any]) -> list[Any]:
    """Return the lines of all parties' coming and going; the sandbox, which is in this process too, has others."""
    return [line for line in lines if "party" in line]


# --- Ovation's adapter


async def test_an_outage_is_two_lines_and_few_calls(sandbox: Sandbox, lines: list[Any]) -> None:
    project = sandbox.admin.create_project("Project")["_id"]
    async with opened(sandbox) as ovation:
        backs: list[float] = []

        async def back() -> None:
            backs.append(time.monotonic())

        ovation.on_back(back)
        fault = sandbox.faults.add("status", target="api", status=503)
        for _ in range(200):
            with pytest.raises(OvationUnavailable) as caught:
                await ovation.entity(0, project)
            assert caught.value.away
        assert ovation.away
        assert "is away since" in str(caught.value)
        assert fault.hits < 20
        sandbox.faults.remove()
        began = time.monotonic()
        await until(lambda: backs)
        assert backs[0] - began < 2
        assert not ovation.away
        assert (await ovation.entity(0, project))["_id"] == project
    assert told(lines) == ["party_away", "party_back"]
    away, back_line = parties(lines)
    assert (away["log_level"], back_line["log_level"]) == ("warning", "info")
    assert away["reason"] == f"Ovation answers GET /api/v1/o/0/entities/{project} with 503"
    assert sandbox.service_token not in str(lines)


async def test_a_path_that_fails_is_no_outage(sandbox: Sandbox, lines: list[Any]) -> None:
    project = sandbox.admin.create_project("Project")
    sandbox.faults.add("status", path=f"GET .*{project['_id']}", target="api", status=503)
    async with opened(sandbox) as ovation:
        for _ in range(2):
            with pytest.raises(OvationUnavailable) as caught:
                await ovation.entity(0, project["_id"])
            assert not caught.value.away
        assert not ovation.away
        assert await ovation.check()
    assert parties(lines) == []


async def test_a_token_that_is_refused_is_no_outage(sandbox: Sandbox, lines: list[Any]) -> None:
    sandbox.faults.add("status", path="GET .*/entities/one", target="api", status=502)
    async with opened(sandbox, token="not-the-token") as ovation:
        with pytest.raises(OvationUnavailable) as caught:
            await ovation.entity(0, "one")
        assert not caught.value.away
    assert parties(lines) == []


@pytest.mark.parametrize("probe", [500, 503, 429])
async def test_whatever_the_fault_an_ovation_that_answers_nothing_is_away(
    sandbox: Sandbox, lines: list[Any], probe: int
) -> None:
    sandbox.faults.add("status", target="api", status=probe)
    async with opened(sandbox) as ovation:
        with pytest.raises(OvationUnavailable) as caught:
            await ovation.entity(0, "one")
        assert caught.value.away
        sandbox.faults.remove()
        await until(lambda: not ovation.away)
    assert told(lines) == ["party_away", "party_back"]


@dataclass
class Requests:
    """What reached a server, and when."""

    at: list[float]
    status: int = 200
    retry_after: str | None = None
    refused_token: str = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.at.append(time.monotonic())
        if self.refused_token and request.headers.get("Authorization") == f"Bearer {self.refused_token}":
            return web.Response(status=429)
        headers = {"Retry-After": self.retry_after} if self.retry_after else {}
        return web.json_response({"entity": {"_id": request.path}}, status=self.status, headers=headers)

    def settings(self, url: str) -> Any:
        return Settings.model_validate({"ovation": {"api_url": url, "token": "token", "hosts": ()}}).ovation


@asynccontextmanager
async def api_of(requests: Requests) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", requests.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("patience", [0.5, 10.0], ids=["the call ends", "the call waits"])
async def test_nobody_calls_before_the_time_that_it_asked_for(
    lines: list[Any], monkeypatch: pytest.MonkeyPatch, status: int, patience: float
) -> None:
    for module in (circuit_module, ovation_http):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", patience)
    requests = Requests([], status=status, retry_after="2")
    async with api_of(requests) as url:
        circuit = circuit_of(OVATION)
        async with Ovation.open(requests.settings(url), circuit) as ovation:
            first = asyncio.create_task(ovation.entity(0, "one"))
            await until(lambda: circuit._left_alone(url) > 0)
            requests.status, requests.retry_after = 200, None
            asked_at = requests.at[0]
            while time.monotonic() < asked_at + 2.5:
                others = asyncio.gather(*(ovation.entity(0, "one") for _ in range(5)), return_exceptions=True)
                await asyncio.sleep(0.05)
                if patience > 1:
                    break
            await asyncio.gather(first, others, return_exceptions=True)
            await until(lambda: not ovation.away)
            assert (await ovation.entity(0, "one"))["_id"]
    assert requests.at[1] - asked_at >= 2
    assert told(lines) == (["party_away", "party_back"] if patience < 1 else [])


@pytest.mark.parametrize(("retry_after", "goes_on"), [("2", True), ("60", False)])
async def test_what_one_call_is_asked_holds_for_the_repetitions_of_others(
    monkeypatch: pytest.MonkeyPatch, retry_after: str, goes_on: bool
) -> None:
    pause = tenacity.wait_fixed(1)  # long enough for the other call to come in between
    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda **_: pause)
    requests = Requests([], status=503)
    async with api_of(requests) as url, Ovation.open(requests.settings(url), circuit_of(OVATION)) as ovation:
        repeating = asyncio.create_task(ovation.entity(0, "one"))
        await until(lambda: requests.at)
        requests.retry_after = retry_after
        other = asyncio.create_task(ovation.entity(0, "two"))
        await until(lambda: len(requests.at) == 2)
        requests.status, requests.retry_after = 200, None
        asked_at = requests.at[1]
        if goes_on:
            await asyncio.gather(repeating, other)
            assert requests.at[2] - asked_at >= 2
            return
        for each in (repeating, other):
            with pytest.raises(OvationUnavailable) as caught:
                await each
            assert caught.value.away
        assert len(requests.at) == 2
        assert time.monotonic() - asked_at < 5


async def test_what_one_person_is_always_refused_does_not_stop_the_agent(lines: list[Any]) -> None:
    requests = Requests([], refused_token="persons")
    async with api_of(requests) as url, Ovation.open(requests.settings(url), circuit_of(OVATION)) as ovation:
        with pytest.raises(OvationUnavailable) as caught:
            await ovation.as_user("persons").entity(0, "one")
        assert not caught.value.away
        assert await ovation.entity(0, "one")
    assert parties(lines) == []


async def test_what_one_person_is_refused_does_not_stop_the_agent(sandbox: Sandbox, lines: list[Any]) -> None:
    person = sandbox.user_token("ada@example.org")
    sandbox.faults.add("status", path="GET .*/one", target="api", status=429, headers={"Retry-After": "3600"})
    async with opened(sandbox) as ovation:
        with pytest.raises(OvationUnavailable) as caught:
            await ovation.as_user(person).entity(0, "one")
        assert (caught.value.away, caught.value.retry_after_seconds) == (False, 300)
        assert await ovation.check()
    assert parties(lines) == []


async def test_a_persons_call_notices_an_outage_and_is_refused_in_one(sandbox: Sandbox, lines: list[Any]) -> None:
    person = sandbox.user_token("ada@example.org")
    async with opened(sandbox) as ovation:
        fault = sandbox.faults.add("status", target="api", status=503)
        with pytest.raises(OvationUnavailable):
            await ovation.as_user(person).entity(0, "one")
        assert ovation.away
        calls = fault.hits
        with pytest.raises(OvationUnavailable, match="is away since"):
            await ovation.as_user(person).entity(0, "one")
        assert fault.hits == calls
        sandbox.faults.remove()
        await until(lambda: not ovation.away)
        with pytest.raises(OvationNotFound):
            await ovation.as_user(person).entity(0, "one")
    assert told(lines) == ["party_away", "party_back"]


def free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    while True:
        sockets = []
        try:
            sockets.append(socket.create_server(("127.0.0.1", 0)))
            first = int(sockets[0].getsockname()[1])
            sockets += [socket.create_server(("127.0.0.1", first + offset)) for offset in range(1, count)]
        except (OSError, OverflowError):
            continue
        else:
            return first
        finally:
            for each in sockets:
                each.close()


async def test_nobody_listens_and_then_somebody_does(tmp_path: Path, lines: list[Any]) -> None:
    port = free_ports(3)
    async with Sandbox(tmp_path / "sandbox", port=port) as sandbox:
        project = sandbox.admin.create_project("Project")["_id"]
        settings = settings_of(sandbox).ovation
    async with Ovation.open(settings, circuit_of(OVATION)) as ovation:
        with pytest.raises(OvationUnavailable, match="cannot be reached") as caught:
            await ovation.entity(0, project)
        assert caught.value.away
        async with Sandbox(tmp_path / "sandbox", port=port):
            await until(lambda: not ovation.away)
            assert (await ovation.entity(0, project))["_id"] == project
    assert told(lines) == ["party_away", "party_back"]
    assert "Connect call failed" in parties(lines)[0]["reason"]


async def test_a_black_hole_is_noticed_and_its_end_too(
    sandbox: Sandbox, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth of the real times: those are checked to fit into a minute by the test after this one."""
    monkeypatch.setattr(ovation_answers, "_ANSWER_SECONDS", ovation_answers._ANSWER_SECONDS / 100)
    monkeypatch.setattr(ovation_http, "_LAST_ATTEMPT_SECONDS", ovation_http._LAST_ATTEMPT_SECONDS / 100)
    monkeypatch.setattr(circuit_module, "_PROBE_SECONDS", circuit_module._PROBE_SECONDS / 100)
    fault = sandbox.faults.add("black_hole", target="api")
    async with opened(sandbox) as ovation:
        began = time.monotonic()
        with pytest.raises(OvationUnavailable) as caught:
            await ovation.entity(0, "one")
        assert caught.value.away
        assert 0.3 <= time.monotonic() - began < 10
        assert fault.hits == 2  # one call, which was not repeated, and the probe
        await asyncio.sleep(0.5)
        sandbox.faults.remove()
        await until(lambda: not ovation.away)
        with pytest.raises(OvationNotFound):
            await ovation.entity(0, "one")
    assert told(lines) == ["party_away", "party_back"]


def test_what_hangs_is_done_again_within_a_minute() -> None:
    """The longest that each part may still take when a black hole ends just after something went into it."""
    probe, wait = circuit_module._PROBE_SECONDS, circuit_module._MOST_SECONDS
    assert probe + wait <= 30
    assert ovation_http._LAST_ATTEMPT_SECONDS + ovation_answers._ANSWER_SECONDS <= 45
    assert ovation_answers._ANSWER_SECONDS + probe <= 45
    assert lane.STALL_SECONDS + probe <= 45
    assert apptainer._ANSWER_SECONDS <= 45
    assert local._HANDSHAKE_SECONDS <= 45


async def test_an_answer_that_keeps_arriving_is_not_cut_and_one_that_hardly_does_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ovation_answers, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(ovation_http, "_LAST_ATTEMPT_SECONDS", 0.1)
    body = b'{"entity": {"_id": "one", "x": "' + b"x" * 160_000 + b'"}}'

    def slow(step: int) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
        async def drip(writer: asyncio.StreamWriter) -> None:
            writer.write(answer(b"", content_length=str(len(body))))
            for start in range(0, len(body), step):
                writer.write(body[start : start + step])
                await writer.drain()
                await asyncio.sleep(0.05)

        return drip

    for step, comes in ((4000, True), (100, False)):
        async with RawServer(slow(step)) as server:
            given = {"api_url": server.url, "token": "token", "hosts": ()}
            async with Ovation.open(Settings.model_validate({"ovation": given}).ovation) as ovation:
                began = time.monotonic()
                if comes:
                    assert (await ovation.entity(0, "one"))["_id"] == "one"
                    assert time.monotonic() - began > 1.5
                else:
                    with pytest.raises(OvationUnavailable, match="does not answer"):
                        await ovation.entity(0, "one")
                    assert time.monotonic() - began < 10  # all of it takes 80 s


# --- who hands out its tokens, and who has its files


async def test_no_tokens_are_to_be_had_and_ovation_is_not_said_to_be_away(sandbox: Sandbox, lines: list[Any]) -> None:
    fault = sandbox.faults.add("status", path="POST /oauth/token", target="api", status=503)
    async with opened(sandbox, **account(sandbox)) as ovation:
        for _ in range(50):
            with pytest.raises(OvationUnavailable) as caught:
                await ovation.check()
            assert caught.value.away
        assert ovation.away
        assert fault.hits < 20
        sandbox.faults.remove()
        backs = asyncio.Event()

        async def back() -> None:
            backs.set()

        ovation.on_back(back)
        await asyncio.wait_for(backs.wait(), 5)
        assert await ovation.check()
    assert told(lines) == []
    assert told(lines, TOKENS) == ["party_away", "party_back"]
    assert sandbox.tokens.client_secret not in str(lines)


async def test_while_no_tokens_are_to_be_had_a_good_one_is_used_at_once(sandbox: Sandbox, lines: list[Any]) -> None:
    async with opened(sandbox, **account(sandbox)) as ovation:
        await ovation.check()
        fault = sandbox.faults.add("status", path="POST /oauth/token", target="api", status=503)
        ovation._connection._refresh_at = 0
        await ovation.check()
        assert not ovation.away
        calls = fault.hits
        began = time.monotonic()
        for _ in range(20):
            await ovation.check()
        assert time.monotonic() - began < 10
        assert fault.hits - calls < 20
    assert told(lines, TOKENS) == ["party_away"]


async def test_a_revoked_token_without_another_to_be_had_is_away_too(sandbox: Sandbox) -> None:
    async with opened(sandbox, **account(sandbox)) as ovation:
        await ovation.check()
        sandbox.faults.add("status", path="POST /oauth/token", target="api", status=503)
        ovation._connection._token = "revoked"
        with pytest.raises(OvationUnavailable):
            await ovation.check()
        assert ovation.away
        sandbox.faults.remove()
        await until(lambda: not ovation.away)
        assert await ovation.check()


async def test_its_files_are_away_and_the_rest_goes_on(sandbox: Sandbox, lines: list[Any]) -> None:
    project = sandbox.admin.create_project("Project")
    revision = sandbox.admin.create_revision(project["_id"], "data.csv", b"data")
    async with Sandbox(sandbox.directory.with_name("other")) as other, opened(sandbox) as ovation:
        other.faults.add("status", target="api", status=503)
        own = ovation._connection.origins
        own._add(other.services_url)
        moved = {**revision, "attributes": {**revision["attributes"], "url": f"{other.services_url}/resources/1"}}
        with pytest.raises(OvationUnavailable) as caught:
            await ovation.download(moved)
        assert caught.value.away
        assert not ovation.away
        assert await ovation.check()
        assert (await ovation.download(revision)).url
        other.faults.remove()

        async def answers() -> bool:
            try:
                await ovation.download(moved)
            except OvationError as error:
                return not isinstance(error, OvationUnavailable)
            return True

        deadline = time.monotonic() + 5
        while not await answers():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    assert told(lines) == ["party_away", "party_back"]


# --- the object store


async def fetch(downloader: Downloader, url: str, folder: Path) -> StorageError | None:
    try:
        await downloader.fetch(url, folder / "file", remote=False, name="data.csv")
    except StorageError as error:
        return error
    return None


def revision_of(sandbox: Sandbox, content: bytes = b"content") -> dict[str, Any]:
    return sandbox.admin.create_revision(sandbox.admin.create_project("Project")["_id"], "data.csv", content)


async def test_the_store_is_away_and_back(sandbox: Sandbox, tmp_path: Path, lines: list[Any]) -> None:
    circuit = circuit_of(STORE)
    async with opened(sandbox) as ovation, Downloader(circuit=circuit) as downloader:
        url = (await ovation.download(revision_of(sandbox))).url
        fault = sandbox.faults.add("status", target="store", status=503)
        for _ in range(50):
            error = await fetch(downloader, url, tmp_path)
            assert isinstance(error, StorageUnavailable)
            assert error.away
        assert str(error).startswith("the object store is away since")
        assert fault.hits < 20
        assert not ovation.away
        sandbox.faults.remove()
        await until(lambda: not circuit.refuses(sandbox.s3_url))
        assert await fetch(downloader, url, tmp_path) is None
    assert told(lines, STORE) == ["party_away", "party_back"]
    assert told(lines) == []
    assert "X-Amz" not in str(parties(lines))
    assert parties(lines)[0]["address"] == sandbox.s3_url


async def test_the_store_asks_to_be_left_alone(sandbox: Sandbox, tmp_path: Path) -> None:
    circuit = circuit_of(STORE)
    async with opened(sandbox) as ovation, Downloader(circuit=circuit) as downloader:
        url = (await ovation.download(revision_of(sandbox))).url
        fault = sandbox.faults.add("status", target="store", status=503, headers={"Retry-After": "60"})
        error = await fetch(downloader, url, tmp_path)
        assert isinstance(error, StorageUnavailable)
        assert (error.away, error.retry_after_seconds) == (True, 60)
        for _ in range(20):
            error = await fetch(downloader, url, tmp_path)
            assert isinstance(error, StorageUnavailable)
            assert 0 < (error.retry_after_seconds or 0) <= 60.1
        assert fault.hits == 1


@pytest.mark.parametrize("kind", ["close", "reset"])
async def test_a_transfer_that_breaks_off_is_no_outage(
    sandbox: Sandbox, tmp_path: Path, lines: list[Any], kind: str
) -> None:
    async with opened(sandbox) as ovation, Downloader(circuit=circuit_of(STORE)) as downloader:
        url = (await ovation.download(revision_of(sandbox, b"x" * 10_000))).url
        sandbox.faults.add(kind, path="GET .*data", target="store", after_bytes=500, times=3)
        for _ in range(3):
            error = await fetch(downloader, url, tmp_path)
            assert isinstance(error, StorageUnavailable)
            assert not error.away
            assert str(error).startswith("data.csv: the transfer broke off")
        assert await fetch(downloader, url, tmp_path) is None
    assert parties(lines) == []


async def test_the_probe_of_a_store_carries_nothing(tmp_path: Path) -> None:
    async with RawServer(answer(status=503), answer(status=403)) as server:
        async with Downloader(circuit=circuit_of(STORE)) as downloader:
            error = await fetch(downloader, f"{server.url}/bucket/key?X-Amz-Signature=secret", tmp_path)
        assert isinstance(error, StorageUnavailable)
        assert not error.away
        assert server.heard[1].startswith("GET / HTTP/1.1\r\n")
        assert "secret" not in server.heard[1]
        assert "authorization" not in server.heard[1].lower()


async def test_a_strangers_server_has_no_circuit(tmp_path: Path, lines: list[Any]) -> None:
    circuit = circuit_of(STORE)
    async with RawServer(answer(status=503)) as server, Downloader(("127.0.0.1",), circuit=circuit) as downloader:
        for _ in range(3):
            with pytest.raises(StorageError):
                await downloader.fetch(f"{server.url}/x", tmp_path / "file", remote=True, name="x")
        assert len(server.heard) == 3
        assert parties(lines) == []
        assert await fetch(downloader, f"{server.url}/x", tmp_path) is not None  # were it the store, it is away
        with pytest.raises(StorageMismatch):
            await downloader.fetch(f"{server.url}/x", tmp_path / "file", remote=True, name="x")


@pytest.mark.parametrize(
    ("status", "code", "message", "kind", "words"),
    [
        (403, "AccessDenied", "Request has expired", AddressExpired, "had expired"),
        (400, "ExpiredToken", "The provided token has expired.", AddressExpired, "had expired"),
        (403, "AccessDenied", "Access Denied", StorageRefused, "answers 403 AccessDenied"),
        (404, "NoSuchKey", "", StorageRefused, "answers 404 NoSuchKey"),
        (400, "", "", StorageRefused, "answers 400"),
    ],
)
async def test_an_address_that_has_expired_is_asked_for_again_and_a_refusal_is_final(
    tmp_path: Path, status: int, code: str, message: str, kind: type[StorageError], words: str
) -> None:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    async with RawServer(answer(body.encode(), status)) as server, Downloader() as downloader:
        error = await fetch(downloader, f"{server.url}/x", tmp_path)
    assert type(error) is kind
    assert words in str(error)


async def test_an_address_that_is_none_is_refused_with_a_circuit_too(tmp_path: Path) -> None:
    async with Downloader(circuit=circuit_of(STORE)) as downloader:
        for url in ("", "no address", "mailto:somebody", "http://", "http://[", "/path"):
            assert isinstance(await fetch(downloader, url, tmp_path), StorageError), url


# --- looks and walks


@dataclass
class Watcher:
    """Evaluator and walks against a sandbox, with a circuit."""

    sandbox: Sandbox
    ovation: Ovation
    watch_list: WatchList
    database: Database
    project: str
    image: str

    def activity(self, number: int) -> str:
        admin = self.sandbox.admin
        data = admin.create_revision(self.project, f"{number}.csv", b"data")["_id"]
        return str(admin.create_activity(self.project, f"Activity {number}", [data], [self.image])["_id"])

    async def jobs(self) -> int:
        async with self.database.connection() as connection:
            return int(await connection.fetchval("SELECT count(*) FROM jobs"))

    async def until_jobs(self, count: int, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while await self.jobs() < count:
            assert time.monotonic() < deadline, f"{await self.jobs()} of {count} jobs"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def watching(sandbox: Sandbox, database: Database, reconcile_seconds: float = 3600) -> AsyncIterator[Watcher]:
    settings = settings_of(sandbox, reconcile_seconds)
    watch_list = WatchList(database)
    project = sandbox.admin.create_project("Project")["_id"]
    image = sandbox.admin.create_revision(project, "image.sif", b"SIF")["_id"]
    async with Ovation.open(settings.ovation, circuit_of(OVATION)) as ovation:
        evaluator = Evaluator(settings, watch_list, ovation, "tests")
        reconciler = Reconciler(settings, Reconciliations(database), watch_list, ovation, on_due=evaluator.wake)
        tasks = [asyncio.create_task(evaluator.run()), asyncio.create_task(reconciler.run())]
        try:
            yield Watcher(sandbox, ovation, watch_list, database, project, image)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def events(lines: list[Any]) -> list[str]:
    return [line["event"] for line in lines if line["log_level"] == "warning" or line["event"] == "party_back"]


async def test_looks_wait_for_ovation_in_silence_and_go_on_at_once(
    sandbox: Sandbox, database: Database, lines: list[Any]
) -> None:
    async with watching(sandbox, database) as watcher:
        await until(lambda: any(line["event"] == "reconciled" for line in lines))
        fault = sandbox.faults.add("status", target="api", status=503)
        hints = [Hint(watcher.activity(number), "Activity", 0) for number in range(30)]
        await watcher.watch_list.hint(hints, 0)
        await until(lambda: watcher.ovation.away)
        await asyncio.sleep(1)  # for what was under way
        calls = fault.hits
        assert calls <= 8 * 4 + 10
        await asyncio.sleep(3)
        assert fault.hits - calls <= 4  # nothing but probes
        look = await watcher.watch_list.last_look(hints[0].entity_id)
        assert look is not None
        assert look.due_at is not None
        assert await watcher.jobs() == 0
        async with database.connection() as connection:
            looked_at = await connection.fetchval("SELECT count(*) FROM watched WHERE attempt > 0")
        assert looked_at <= 8  # nobody claims what cannot be looked at
        sandbox.faults.remove()
        await watcher.until_jobs(30)
    assert events(lines) == ["party_away", "party_back"]


async def test_a_look_that_fails_alone_is_told_once_and_tried_again(
    sandbox: Sandbox, database: Database, lines: list[Any]
) -> None:
    async with watching(sandbox, database) as watcher:
        activity = watcher.activity(1)
        fault = sandbox.faults.add("status", path=f"GET .*{activity}", target="api", status=500)
        await watcher.watch_list.hint([Hint(activity, "Activity", 0)], 0)
        await until(lambda: fault.hits >= 12, 30)
        assert not watcher.ovation.away
        sandbox.faults.remove()
        await watcher.until_jobs(1, 21)
    assert events(lines) == ["not_judged"]


async def test_a_walk_that_fell_due_in_an_outage_happens_at_its_end(
    sandbox: Sandbox, database: Database, lines: list[Any]
) -> None:
    sandbox.faults.add("status", target="api", status=503)
    async with watching(sandbox, database) as watcher:
        await until(lambda: watcher.ovation.away)
        watcher.activity(1)
        sandbox.faults.remove()
        await watcher.until_jobs(1)
    assert events(lines) == ["party_away", "party_back"]
    assert sum(line["event"] == "reconciled" for line in lines) == 1


async def test_nobody_walks_while_ovation_is_away(sandbox: Sandbox, database: Database) -> None:
    async with watching(sandbox, database, reconcile_seconds=1) as watcher:
        sandbox.faults.add("status", target="api", status=503)
        await until(lambda: watcher.ovation.away)

        async def walks() -> int:
            async with database.connection() as connection:
                return int(await connection.fetchval("SELECT lease_token FROM reconciliations"))

        await asyncio.sleep(1)  # for one that was under way
        before = await walks()
        await asyncio.sleep(3)
        assert await walks() == before


async def test_looks_that_waited_when_the_agent_was_stopped_go_on_at_its_start(
    sandbox: Sandbox, database: Database
) -> None:
    async with watching(sandbox, database) as watcher:
        sandbox.faults.add("status", target="api", status=503)
        activity = watcher.activity(1)
        await watcher.watch_list.hint([Hint(activity, "Activity", 0)], 0)
        await until(lambda: watcher.ovation.away)
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE watched SET attempt = 3, due_at = now() + interval '1 minute', lease_until = NULL"
        )
    sandbox.faults.remove()
    async with watching(sandbox, database) as watcher:
        await watcher.until_jobs(1)


# --- jobs


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with laboratory(tmp_path) as opened:
        yield opened


async def waits_for(lab: Lab, activity_id: str, words: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        for job in await lab.agent.jobs(activity_id):
            if words in str(job.get("waiting_for")):
                return job
        assert time.monotonic() < deadline, lab.agent.log.read_text()[-4000:]
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(("target", "party"), [("api", OVATION), ("store", STORE)])
@pytest.mark.parametrize("when", ["staging", "collecting"])
async def test_a_run_waits_an_outage_out(lab: Lab, target: str, party: str, when: str) -> None:
    script = "echo 1 > /outputs/one" if when == "staging" else "sleep 3; echo 1 > /outputs/one"
    activity_id = lab.activity(script)
    states = {"staging", "queued", "launching"} if when == "staging" else {"running"}
    if when == "staging":
        lab.sandbox.faults.add("latency", path="GET .*entities", target="api", seconds=0.3)
    await lab.agent.job(activity_id, states=states)
    lab.sandbox.faults.remove()
    lab.sandbox.faults.add("status", target=target, status=503)
    job = await waits_for(lab, activity_id, f"waiting for {party}")
    assert (job["state"], job["attempt"]) == (when, 0)
    await asyncio.sleep(3)
    lab.sandbox.faults.remove()
    began = time.monotonic()
    job = await lab.agent.job(activity_id)
    assert time.monotonic() - began < 60
    assert (job["state"], job["attempt"]) == ("succeeded", 0)
    assert (await lab.outputs(activity_id))["one"] == b"1\n"
    mine = [line["event"] for line in lab.agent.events() if line.get("party") == party]
    assert mine == ["party_away", "party_back"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "Ovation refuses GET"),
        (403, "Ovation refuses GET"),
        (404, "has no such Revision any more"),
        (422, "with 422: the very cause"),
    ],
)
async def test_what_waiting_cannot_cure_fails_at_once_with_its_cause(lab: Lab, status: int, words: str) -> None:
    data = lab.revision("data.csv")
    lab.sandbox.faults.add(
        "status",
        path=f"GET .*entities/{data}",
        target="api",
        status=status,
        body='{"errors": {"detail": "the very cause"}}',
    )
    began = time.monotonic()
    activity_id = lab.activity("true", inputs=[data])
    job = await lab.agent.job(activity_id)
    assert time.monotonic() - began < 30
    assert job["state"] == "failed"
    assert job["fault"]["class"] == ("input" if status == 404 else "platform")
    assert words in job["fault"]["message"]
    assert lab.agent.events("party_away") == []


async def test_an_address_that_expired_is_renewed_and_not_failed(lab: Lab) -> None:
    data = lab.revision("data.csv")
    fault = lab.sandbox.faults.add("expired_url", path=f"GET .*{data}", target="api", times=8)
    job, outputs = await lab.run("cp /inputs/data.csv /outputs/", inputs=[data])
    assert fault.hits == 8
    assert (job["state"], job["attempt"]) == ("succeeded", 0)
    assert outputs["data.csv"] == b"some data"
    assert lab.agent.events("party_away") == []
