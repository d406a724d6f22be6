"""Ovation's adapter against the sandbox, and against answers that no sandbox would give."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from agent.adapters.circuit import retry_after_seconds
from agent.adapters.ovation import Download, Ovation
from agent.domain.activity import Upload
from agent.errors import (
    OvationError,
    OvationNotFound,
    OvationRefused,
    OvationUnavailable,
    StorageRefused,
)
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import SandboxSettings
from agent.settings import OvationSettings
from tests.integration.raw_server import Answer, RawServer, answer, json_answer
from tests.integration.sandbox_fixtures import until

TOKEN = "the-agents-own-token"
SECRET = "the-accounts-secret"


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as opened:
        yield opened


def opened(sandbox: Sandbox, **given: Any) -> Ovation:
    base = {"api_url": sandbox.api_url, "hosts": (sandbox.services_url,)}
    own = {} if "client_id" in given else {"token": sandbox.service_token}
    return Ovation.open(OvationSettings.model_validate({**base, **own, **given}))


def account(sandbox: Sandbox, **given: Any) -> Ovation:
    secret = {"client_id": sandbox.tokens.client_id, "client_secret": sandbox.tokens.client_secret}
    return opened(sandbox, **{"auth_domain": sandbox.auth_url, **secret, **given})


@asynccontextmanager
async def talking_to(*answers: Answer, **given: Any) -> AsyncIterator[tuple[RawServer, Ovation]]:
    async with RawServer(*answers) as server:
        settings = {"api_url": server.url, "token": TOKEN, "hosts": (), **given}
        async with Ovation.open(OvationSettings.model_validate(settings)) as ovation:
            yield server, ovation


def entity(kind: str = "Activity", **given: Any) -> dict[str, Any]:
    links = {"self": "/self", "_collaboration_roots": ["project"]}
    return {"_id": "id", "type": kind, "attributes": {"name": "Name"}, "links": links, **given}


async def test_every_call_that_a_run_makes(sandbox: Sandbox) -> None:
    project = sandbox.admin.create_project("Project")
    data = sandbox.admin.create_revision(project["_id"], "data.csv", b"1,2")
    image = sandbox.admin.create_revision(project["_id"], "image.sif", b"SIF")
    old = sandbox.admin.old_revision(project["_id"], "old.csv")
    source = sandbox.admin.create_source("Mouse", project_id=project["_id"])
    coming = sandbox.admin.in_progress_revision(project["_id"], "coming.csv")
    failed = sandbox.admin.failed_revision(project["_id"], "failed.csv")
    inputs = [data["_id"], old["_id"], source["_id"], coming["_id"], failed["_id"]]
    made = sandbox.admin.create_activity(project["_id"], "Analysis", inputs, [image["_id"]])
    async with opened(sandbox) as ovation:
        assert await ovation.check() == "1 projects in organization 0"
        activity = await ovation.activity(0, made["_id"])
        assert (activity.id, activity.name, activity.project_id) == (made["_id"], "Analysis", project["_id"])
        assert {(each.name, each.type, each.upload) for each in activity.inputs} == {
            ("data.csv", "Revision", Upload.COMPLETE),
            ("old.csv", "Revision", Upload.COMPLETE),
            ("Mouse", "Source", Upload.COMPLETE),
            ("coming.csv", "Revision", Upload.IN_PROGRESS),
            ("failed.csv", "Revision", Upload.ERROR),
        }
        assert [each.name for each in activity.related] == ["image.sif"]
        assert await ovation.activities_of(0, data["_id"]) == [made["_id"]]
        assert await ovation.activities_of(0, image["_id"]) == [made["_id"]]

        folder = await ovation.create(await ovation.entity(0, project["_id"]), "Folder", "run 1")
        file = await ovation.create(folder, "File", "out.csv")
        assert (await ovation.contents(folder)).keys() == {("File", "out.csv")}
        revision, credentials = await ovation.create_revision(file, "out.csv", "text/csv")
        assert credentials.bucket == "ovation-sandbox"
        for secret in (credentials.access_key_id, credentials.secret_access_key, credentials.session_token):
            assert secret not in repr(credentials)
        await ovation.upload_failed(revision)
        document = await ovation.entity(0, made["_id"])
        for _ in range(2):
            await ovation.add_output(document, revision["_id"])
        assert len(await ovation._related(document, "outputs")) == 1
        with pytest.raises(OvationNotFound, match="is a Folder, not an Activity"):
            await ovation.activity(0, folder["_id"])


async def test_of_one_name_twice_the_first_that_was_made_stands(sandbox: Sandbox) -> None:
    project = sandbox.admin.create_project("Project")
    async with opened(sandbox) as ovation:
        document = await ovation.entity(0, project["_id"])
        first = await ovation.create(document, "Folder", "same")
        await asyncio.sleep(0.01)  # creation times have milliseconds
        await ovation.create(document, "Folder", "same")
        assert (await ovation.contents(document))["Folder", "same"]["_id"] == first["_id"]


async def test_a_persons_token_sees_what_the_person_may_see(sandbox: Sandbox) -> None:
    project = sandbox.admin.create_project("Project", owner="owner@example.org")
    async with opened(sandbox) as ovation:
        owner = ovation.as_user(sandbox.user_token("owner@example.org"))
        assert (await owner.entity(0, project["_id"]))["_id"] == project["_id"]
        with pytest.raises(OvationNotFound):
            await ovation.as_user(sandbox.user_token("other@example.org")).entity(0, project["_id"])
        for token in ("nonsense", "with space", "line\r\nInjected: yes", "\udcff", "ü"):
            with pytest.raises(OvationRefused) as caught:
                await ovation.as_user(token).entity(0, project["_id"])
            assert token not in str(caught.value)


@pytest.mark.parametrize("entity_id", ["", ".", "..", "../projects", "a/b", "%2e%2e", "?", "#", "\n", "ü", "a" * 3000])
async def test_an_id_is_never_a_path(sandbox: Sandbox, entity_id: str) -> None:
    async with opened(sandbox) as ovation:
        with pytest.raises((OvationNotFound, OvationError)):
            await ovation.entity(0, entity_id)


async def test_where_the_bytes_are(sandbox: Sandbox) -> None:
    project = sandbox.admin.create_project("Project")
    own = sandbox.admin.create_revision(project["_id"], "own", b"x")
    remote = sandbox.admin.remote_revision(project["_id"], "remote", "https://example.org/data?key=value")
    async with opened(sandbox) as ovation:
        found = await ovation.download(own)
        assert found.url.startswith(sandbox.s3_url)
        assert not found.remote
        assert "X-Amz" not in repr(found)
        assert await ovation.download(remote) == Download("https://example.org/data?key=value", remote=True)
        for attributes in ({}, {"url": None}, {"url": ""}, {"url": 5}, None):
            with pytest.raises(StorageRefused, match="names no address"):
                await ovation.download({"_id": "id", "attributes": attributes})


@pytest.mark.parametrize(
    "address",
    [
        "https://evil.example/x",
        "//evil.example/x",
        "http://127.0.0.1:1/x",
        "https://api.ovation.io@evil.example/",
        "javascript:alert(1)",
        "http://[",
        "https://a\\b/",
    ],
)
async def test_links_that_lead_to_a_stranger_are_refused(address: str) -> None:
    async with talking_to(json_answer({})) as (server, ovation):
        with pytest.raises(OvationError, match="Ovation points to"):
            await ovation.create({"links": {"self": address}}, "File", "x")
        with pytest.raises(OvationError, match="Ovation points to"):
            await ovation.contents(entity("Folder", relationships={"folders": {"related": address}}))
        assert server.heard == []


async def test_a_redirect_is_not_followed_with_the_token() -> None:
    async with RawServer(json_answer({"entity": entity()})) as elsewhere:
        for status in (301, 302, 307, 308):
            async with talking_to(answer(status=status, location=f"{elsewhere.url}/x")) as (server, ovation):
                with pytest.raises(OvationError, match=r"redirects GET .*set OVATION_API_URL"):
                    await ovation.entity(0, "id")
                assert len(server.heard) == 1
        assert elsewhere.heard == []


async def test_the_token_goes_in_the_header_and_for_files_in_the_query_too() -> None:
    async with talking_to(json_answer({"url": "https://store.example/x"})) as (server, ovation):
        revision = {"_id": "id", "attributes": {"url": f"{server.url}/resources/1?a=b"}}
        assert (await ovation.download(revision)).url == "https://store.example/x"
        assert f"Authorization: Bearer {TOKEN}" in server.heard[0]
        assert server.heard[0].startswith(f"GET /resources/1?a=b&token={TOKEN} ")
        await ovation._call("GET", "/plain")
        assert server.heard[1].startswith("GET /plain HTTP")


async def test_a_service_token_is_fetched_once_however_many_wait_for_it(sandbox: Sandbox) -> None:
    fetched = sandbox.faults.add("latency", path="POST /oauth/token", seconds=0.2)
    project = sandbox.admin.create_project("Project")
    async with account(sandbox) as ovation:
        first = asyncio.create_task(ovation.entity(0, project["_id"]))
        others = [asyncio.create_task(ovation.entity(0, project["_id"])) for _ in range(20)]
        await until(lambda: fetched.hits)
        first.cancel()  # whoever asked first goes away, and the others still get it
        assert len(await asyncio.gather(*others)) == 20
        assert fetched.hits == 1


async def test_a_service_token_is_renewed_before_it_expires(tmp_path: Path) -> None:
    settings = SandboxSettings(token_seconds=2)
    async with Sandbox(tmp_path / "sandbox", settings=settings) as sandbox, account(sandbox) as ovation:
        calls = sandbox.faults.add("latency", path="POST /oauth/token", seconds=0)
        refused = sandbox.faults.add("latency", path="no such path")
        began = time.monotonic()
        while time.monotonic() - began < 3.2:
            await ovation.check()
            await asyncio.sleep(0.05)
        assert 2 <= calls.hits <= 3
        assert refused.hits == 0


async def test_a_token_that_cannot_be_renewed_yet_is_used_as_long_as_it_is_good(tmp_path: Path) -> None:
    settings = SandboxSettings(token_seconds=3)
    async with Sandbox(tmp_path / "sandbox", settings=settings) as sandbox, account(sandbox) as ovation:
        await ovation.check()
        away = sandbox.faults.add("status", path="POST /oauth/token", status=503, headers={"Retry-After": "60"})
        ovation._connection._refresh_at = 0
        await ovation.check()
        assert away.hits == 1
        ovation._connection._expires_at = 0
        with pytest.raises(OvationUnavailable):
            await ovation.check()


async def test_a_revoked_token_is_fetched_again_once(sandbox: Sandbox) -> None:
    project = sandbox.admin.create_project("Project")
    own = sandbox.admin.create_revision(project["_id"], "own", b"x")
    async with account(sandbox) as ovation:
        fetched = sandbox.faults.add("latency", path="POST /oauth/token", seconds=0)
        await ovation.check()
        ovation._connection._token = "revoked"
        await asyncio.gather(*(ovation.entity(0, project["_id"]) for _ in range(10)))
        assert fetched.hits == 2
        ovation._connection._token = "revoked"
        assert (await ovation.download(own)).url
        assert fetched.hits == 3
        ovation._connection._token = "revoked"
        assert await ovation.create(await ovation.entity(0, project["_id"]), "Folder", "x")
        refused = sandbox.faults.add("status", path="GET .*entities", status=401)
        with pytest.raises(OvationRefused):
            await ovation.entity(0, project["_id"])
        assert refused.hits == 2


async def test_the_query_carries_the_fresh_token_too() -> None:
    tokens = [json_answer({"access_token": f"token-{number}", "expires_in": 3600}) for number in (1, 2)]
    answers = [tokens[0], json_answer({}, 401), tokens[1], json_answer({"url": "https://store.example/"})]
    given = {"client_id": "id", "client_secret": SECRET, "token": None}
    async with RawServer(*answers) as server:
        settings = {"api_url": server.url, "auth_domain": server.url, "hosts": (), **given}
        async with Ovation.open(OvationSettings.model_validate(settings)) as ovation:
            await ovation.download({"_id": "id", "attributes": {"url": f"{server.url}/1"}})
        assert server.heard[1].startswith("GET /1?token=token-1 ")
        assert server.heard[3].startswith("GET /1?token=token-2 ")


async def test_a_wrong_secret_is_told_clearly_and_not_repeated(sandbox: Sandbox) -> None:
    async with account(sandbox, client_secret=SECRET) as ovation:
        with pytest.raises(OvationRefused, match="check OVATION_CLIENT_ID, OVATION_CLIENT_SECRET") as caught:
            await ovation.check()
        assert caught.value.status == 401
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        json_answer({}),
        json_answer({"access_token": ""}),
        json_answer({"access_token": 5}),
        json_answer({"access_token": "with space"}),
        json_answer([]),
        json_answer({"error": SECRET}, 400),
        json_answer({}, 404),
        answer(status=302, location="https://elsewhere.example/"),
    ],
)
async def test_an_answer_without_a_token_is_a_refusal(given: bytes) -> None:
    async with RawServer(given) as server:
        account = {"client_id": "id", "client_secret": SECRET, "auth_domain": server.url, "api_url": server.url}
        async with Ovation.open(OvationSettings.model_validate({**account, "hosts": ()})) as ovation:
            with pytest.raises(OvationRefused) as caught:
                await ovation.check()
        assert SECRET not in str(caught.value)
        assert all("oauth/token" in heard for heard in server.heard)


@pytest.mark.parametrize("expires_in", [None, "soon", -5, 0, 1e400, "3600", [], True])
async def test_a_lifetime_that_is_none_does_no_harm(expires_in: Any) -> None:
    token = json_answer({"access_token": "token", "expires_in": expires_in})
    async with RawServer(token, json_answer({"entity": entity()})) as server:
        account = {"client_id": "id", "client_secret": SECRET, "auth_domain": server.url, "api_url": server.url}
        async with Ovation.open(OvationSettings.model_validate({**account, "hosts": ()})) as ovation:
            for _ in range(3):
                await ovation.entity(0, "id")
        assert sum("oauth/token" in heard for heard in server.heard) == 1


async def test_without_any_credentials_it_says_what_to_set() -> None:
    async with talking_to(json_answer({}), token=None) as (server, ovation):
        with pytest.raises(OvationRefused, match="set OVATION_TOKEN"):
            await ovation.check()
        assert server.heard == []


async def test_the_token_is_in_no_error_and_no_repr(sandbox: Sandbox) -> None:
    echo = f"you sent Bearer {TOKEN} and token={TOKEN}\r\n"
    for status in (400, 401, 403, 404, 409, 422, 500, 301):
        async with talking_to(answer(echo.encode(), status)) as (_, ovation):
            with pytest.raises(OvationError) as caught:
                await ovation._call("POST", "/x", token_in_query=True)
            assert TOKEN not in f"{caught.value}{caught.value!r}{caught.value.__cause__}"
            assert caught.value.status == status
            assert "\n" not in str(caught.value)
            assert TOKEN not in f"{ovation!r}{ovation._connection!r}{ovation._settings!r}"
    project = sandbox.admin.create_project("Project")
    async with opened(sandbox, token=TOKEN) as ovation:
        with pytest.raises(OvationRefused) as refusal:
            await ovation.entity(0, project["_id"])
        assert TOKEN not in str(refusal.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 422, 501])
async def test_what_no_repetition_cures_is_told_at_once(status: int) -> None:
    async with talking_to(json_answer({"errors": {"detail": "why"}}, status)) as (server, ovation):
        with pytest.raises(OvationError) as caught:
            await ovation.entity(0, "id")
        assert not caught.value.transient
        assert len(server.heard) == 1


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def half(writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b'{"entity": ', content_length="500"))
    await writer.drain()


PASSING: list[Answer] = [
    *(json_answer({}, status) for status in (408, 425, 429, 500, 502, 503, 504)),
    reset,
    half,
    b"",
    b"HTTP/1.1 nonsense\r\n\r\n",
    answer(b"<html>Please sign in</html>"),
    answer(b""),
    answer(b"\xff\xfe"),
    answer(b"[" * 100_000),
]


@pytest.mark.parametrize("passing", PASSING, ids=range(len(PASSING)))
async def test_a_get_is_repeated_after_what_may_pass(passing: Answer) -> None:
    async with talking_to(passing, json_answer({"entity": entity()})) as (server, ovation):
        assert (await ovation.entity(0, "id"))["_id"] == "id"
        assert len(server.heard) == 2


async def test_it_gives_up_after_a_few_times() -> None:
    async with talking_to(json_answer({}, 500)) as (server, ovation):
        with pytest.raises(OvationUnavailable, match="answers GET /api/v1/o/0/entities/id with 500"):
            await ovation.entity(0, "id")
        assert len(server.heard) == 4


@pytest.mark.parametrize("kind", ["lost_answer", "reset_request", "status"])
async def test_a_post_that_may_have_worked_is_not_repeated(sandbox: Sandbox, kind: str) -> None:
    project = sandbox.admin.create_project("Project")
    async with opened(sandbox) as ovation:
        document = await ovation.entity(0, project["_id"])
        fault = sandbox.faults.add(kind, path="POST ", status=503)
        with pytest.raises(OvationUnavailable):
            await ovation.create(document, "Folder", "once")
        assert fault.hits == 1
        sandbox.faults.remove()
        assert len(await ovation._related(document, "folders")) == (1 if kind == "lost_answer" else 0)


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 503, "headers": {"Retry-After": "0"}}])
async def test_a_post_that_certainly_did_not_work_is_repeated(sandbox: Sandbox, fault: dict[str, Any]) -> None:
    project = sandbox.admin.create_project("Project")
    async with opened(sandbox) as ovation:
        document = await ovation.entity(0, project["_id"])
        programmed = sandbox.faults.add("status", path="POST ", times=2, **fault)
        await ovation.create(document, "Folder", "once")
        assert programmed.hits == 2
        assert len(await ovation._related(document, "folders")) == 1


async def test_a_post_that_may_be_doubled_is_repeated(sandbox: Sandbox) -> None:
    project = sandbox.admin.create_project("Project")
    revision = sandbox.admin.create_revision(project["_id"], "x", b"x")
    activity = sandbox.admin.create_activity(project["_id"], "Activity")
    async with opened(sandbox) as ovation:
        fault = sandbox.faults.add("lost_answer", path="POST .*links/outputs", times=2)
        await ovation.add_output(activity, revision["_id"])
        assert fault.hits == 2
        assert len(await ovation._related(activity, "outputs")) == 1


async def test_nobody_listens() -> None:
    async with talking_to(b"") as (server, ovation):
        server._server.close()
        await server._server.wait_closed()
        with pytest.raises(OvationUnavailable, match=r"cannot be reached for POST /self: Connect") as caught:
            await ovation.create({"links": {"self": "/self"}}, "File", "x")
        assert caught.value.not_done


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("1", 1.0, 10.0), (lambda: in_seconds(2), 1.0, 10.0), ("0", 0.0, 10.0), ("-5", 0.0, 10.0), ("soon", 0.0, 10.0)],
)
async def test_retry_after_is_honoured(header: str | Callable[[], str], least: float, most: float) -> None:
    value = header if isinstance(header, str) else header()
    async with talking_to(json_answer({}, 503, retry_after=value), json_answer({"entity": entity()})) as (_, ovation):
        began = time.monotonic()
        await ovation.entity(0, "id")
        assert least <= time.monotonic() - began < most


@pytest.mark.parametrize("header", ["3600", "9" * 400, in_seconds(86_400), "Wed, 21 Oct 9999 07:28:00 GMT"])
async def test_asked_to_wait_for_long_the_call_ends_and_the_step_waits(header: str) -> None:
    async with talking_to(json_answer({}, 503, retry_after=header)) as (server, ovation):
        with pytest.raises(OvationUnavailable) as caught:
            await ovation.entity(0, "id")
        assert caught.value.retry_after_seconds is not None
        assert len(server.heard) == 1


def test_what_retry_after_means() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after_seconds(None, now) is None
    assert retry_after_seconds(" 12 ", now) == 12
    assert retry_after_seconds("Thu, 01 Jan 2026 00:00:30 GMT", now) == 30
    assert retry_after_seconds("Thu, 01 Jan 2026 00:00:30 -0000", now) == 30
    assert retry_after_seconds("Thu, 01 Jan 2025 00:00:30 GMT", now) == 0
    for odd in ("", "-1", "1.5", "٣", "Thu, 99 Jan 2026", "x" * 1000):
        assert retry_after_seconds(odd, now) is None


async def test_a_black_hole_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hole(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr("agent.adapters.ovation_http._ATTEMPTS", 2)
    async with talking_to(hole) as (server, ovation):
        ovation._http._timeout = type(ovation._http._timeout)(total=0.2)
        with pytest.raises(OvationUnavailable, match=r"does not answer GET .* in time"):
            await ovation.entity(0, "id")
        assert len(server.heard) == 2


@pytest.mark.parametrize("given", [answer(b"[]"), answer(b'"x"'), answer(b"5"), answer(b"null")])
async def test_an_answer_that_is_no_object(given: bytes) -> None:
    async with talking_to(given) as (server, ovation):
        with pytest.raises(OvationError, match="not an object"):
            await ovation.entity(0, "id")
        assert len(server.heard) == 1


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"", content_length=""))
    for _ in range(100_000):
        writer.write(b" " * 65_536)
        await writer.drain()


@pytest.mark.parametrize(
    "given",
    [
        answer(b"", content_length=str(1 << 40)) + b" " * (70 << 20),
        endless,
        answer(gzip.compress(b" " * (70 << 20)), content_encoding="gzip"),
    ],
    ids=["announced", "endless", "compressed"],
)
async def test_a_huge_answer_is_not_read_to_its_end(given: Answer) -> None:
    async with talking_to(given) as (server, ovation):
        with pytest.raises(OvationError) as caught:
            await asyncio.wait_for(ovation.entity(0, "id"), 60)
        assert "too large" in str(caught.value) or caught.value.transient
        assert len(server.heard) <= 4


async def test_a_huge_error_is_not_read_to_its_end() -> None:
    async def refusal(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", 422, content_length=""))
        await endless(writer)

    async with talking_to(refusal) as (_, ovation):
        with pytest.raises(OvationError, match="with 422") as caught:
            await asyncio.wait_for(ovation.entity(0, "id"), 20)
        assert len(str(caught.value)) < 1000


def reading(document: Any, **lists: Any) -> tuple[bytes, ...]:
    """Return the answers that reading an Activity takes."""
    return (json_answer({"entity": document}), *(json_answer({key: value}) for key, value in lists.items()))


RELATED = {"inputs": {"related": "/inputs"}, "actions": {"related": "/actions"}}


async def test_old_entities_lack_what_new_ones_have() -> None:
    bare = {"_id": "bare"}
    odd = {"_id": "odd", "type": 5, "attributes": {"name": 12.5, "upload-status": ["x"], "created-at": 7}}
    names: list[Any] = [None, "", {}, True]
    nameless = [{"_id": f"n{number}", "attributes": {"name": name}} for number, name in enumerate(names)]
    nul = {"_id": "nul", "attributes": {"name": "a\0b\ud800c\U0001f600"}}
    document = entity(relationships=RELATED, attributes=None, organization_id="odd")
    async with talking_to(*reading(document, inputs=[bare, odd, bare, *nameless, "x", nul], actions=[])) as (
        _,
        ovation,
    ):
        activity = await ovation.activity(3, "id")
    assert (activity.name, activity.organization) == ("id", 3)
    found = {each.id: each for each in activity.inputs}
    assert len(activity.inputs) == len(found) == 7
    assert (found["bare"].name, found["bare"].type, found["bare"].upload) == ("bare", "Revision", Upload.COMPLETE)
    assert (found["odd"].name, found["odd"].type, found["odd"].created_at) == ("12.5", "5", "7")
    assert [found[f"n{number}"].name for number in range(3)] == ["n0", "n1", "n2"]
    assert found["nul"].name == "a\N{REPLACEMENT CHARACTER}b?c\U0001f600"


async def test_an_activity_of_old_without_relationships_has_no_inputs() -> None:
    odd: list[Any] = [None, {}, [], {"inputs": None}]
    for relationships in odd:
        async with talking_to(*reading(entity(relationships=relationships))) as (_, ovation):
            activity = await ovation.activity(0, "id")
            assert (activity.inputs, activity.related) == ((), ())


@pytest.mark.parametrize(
    "links",
    [None, {}, [], {"_collaboration_roots": []}, {"_collaboration_roots": None}, {"_collaboration_roots": [None]}],
)
async def test_an_activity_in_no_project_is_told_clearly(links: Any) -> None:
    async with talking_to(*reading(entity(links=links))) as (_, ovation):
        with pytest.raises(OvationError, match="belongs to no Project"):
            await ovation.activity(0, "id")


async def test_a_related_list_may_stand_under_another_single_key() -> None:
    answers = reading(entity(relationships=RELATED), entities=[{"_id": "a"}, {"_id": "a"}], revisions=[{"_id": "b"}])
    async with talking_to(*answers) as (_, ovation):
        activity = await ovation.activity(0, "id")
        assert [each.id for each in activity.inputs] == ["a"]
        assert [each.id for each in activity.related] == ["b"]


async def test_its_own_key_goes_before_any_other() -> None:
    answers = [json_answer({"entity": entity(relationships=RELATED)})]
    answers.append(json_answer({"links": [{"_id": "link"}], "inputs": [{"_id": "input"}]}))
    async with talking_to(*answers, json_answer({"actions": []})) as (_, ovation):
        assert [each.id for each in (await ovation.activity(0, "id")).inputs] == ["input"]


@pytest.mark.parametrize("given", [{}, {"inputs": None}, {"a": [], "b": []}, {"inputs": [{"name": "no id"}]}])
async def test_a_related_list_that_is_not_there_is_not_taken_for_an_empty_one(given: Any) -> None:
    async with talking_to(json_answer({"entity": entity(relationships=RELATED)}), json_answer(given)) as (_, ovation):
        with pytest.raises(OvationError, match="Ovation's answer has"):
            await ovation.activity(0, "id")


async def test_documents_without_their_links_are_errors_of_ovation_and_not_bugs() -> None:
    async with talking_to(json_answer({"entities": [{}], "aws": [{"aws": {"bucket": "b"}}]})) as (_, ovation):
        for call in (
            ovation.create({}, "File", "x"),
            ovation.create({"links": {"self": None}}, "File", "x"),
            ovation.create_revision({"links": {"self": "/x"}}, "x", "x/y"),
            ovation.upload_complete({}),
            ovation.upload_failed({"links": []}),
            ovation.add_output({"relationships": {"outputs": {}}}, "id"),
            ovation.contents(entity(relationships={"folders": "text"})),
            ovation.entity(0, "id"),
        ):
            with pytest.raises(OvationError, match=r"Ovation's answer (lacks|has no)"):
                await call


async def test_a_page_of_base64_or_deep_json_in_a_document_is_only_data() -> None:
    deep: Any = "end"
    for _ in range(200):
        deep = [deep]
    document = entity("Source", attributes={"name": "x", "deep": deep, "data": base64.b64encode(bytes(99)).decode()})
    async with talking_to(json_answer({"entity": document})) as (_, ovation):
        assert json.dumps(await ovation.entity(0, "id")) == json.dumps(document)
