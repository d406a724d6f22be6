"""What programs meet over HTTP, on a real agent: webhooks, hpc_run, the jobs API, health."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import jwt
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from agent.db.database import Database
from agent.sandbox.server import Sandbox
from agent.web import application, state
from tests.agents import ADMIN_TOKEN, WEBHOOK_KEY, running_agent, until
from tests.integration.sandbox_fixtures import released_client
from tests.lab import Lab
from tests.postgres import debian_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
ACTIVITY = "4b6de6e8-502b-40ed-95eb-4e4f3fc0ab40"
REVISION = "5b6de6e8-502b-40ed-95eb-4e4f3fc0ab41"
PERSON = "person@example.org"
FIELDS = {
    *("id", "activity_id", "organization", "image_name", "image_revision_id", "run", "state", "verdict", "fault"),
    *("exit_code", "trigger", "requested_by", "attempt", "created_at", "started_at", "finished_at", "progress"),
    "native_id",
}
MORE_FIELDS = {
    "due_at",
    "held_until",
    "activity_name",
    "waiting_for",
    "cancel_requested",
    "live",
    "launch",
    "agent",
    "resources",
    "exact_of",
}


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: Any
    headers: dict[str, str]

    @property
    def detail(self) -> str:
        """The error's text."""
        return str(self.body["errors"]["detail"])


class Site(NamedTuple):
    """An agent that checks people's tokens, its laboratory and its database."""

    lab: Lab
    database: asyncpg.Connection

    @property
    def address(self) -> str:
        """Where the agent listens."""
        return self.lab.agent.address

    async def deliveries(self, entity_id: str) -> list[tuple[str, int | None]]:
        """Return what the agent stored about an entity."""
        rows = await self.database.fetch(
            "SELECT entity_type, organization FROM deliveries WHERE entity_id = $1 ORDER BY id", entity_id
        )
        return [(row["entity_type"], row["organization"]) for row in rows]

    def log(self) -> str:
        """Return the agent's log."""
        return self.lab.agent.log.read_text()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory, server_url: str) -> AsyncIterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    admin = await asyncpg.connect(server_url)
    name = f"web_{os.getpid()}"
    await admin.execute(f"CREATE DATABASE {name}")
    url = server_url.replace("/postgres?", f"/{name}?")
    migrated = await Database.open(url, "the database")
    await migrated.migrate()
    await migrated.close()
    connection = await asyncpg.connect(url)
    async with Sandbox(directory / "sandbox") as sandbox:
        lab = Lab(sandbox, directory)
        settings = {"AGENT_DATABASE_URL": url, "JWT_SECRET": sandbox.jwt_secret}
        async with running_agent(sandbox.environment(), directory / "agent", **settings) as agent:
            lab.agent = agent  # nobody tells it of anything but the tests
            yield Site(lab, connection)
    await connection.close()
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


async def call(address: str, method: str, path: str, **options: Any) -> Answer:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http,
        http.request(method, address + path, **options) as response,
    ):
        is_json = response.content_type == "application/json"
        body = await response.json() if is_json else await response.text()
        return Answer(response.status, body, dict(response.headers))


def basic(name: str, password: str, encoding: str = "utf-8") -> dict[str, str]:
    encoded = base64.b64encode(f"{name}:{password}".encode(encoding)).decode()
    return {"Authorization": f"Basic {encoded}"}


RIGHT = basic(WEBHOOK_KEY, WEBHOOK_KEY)
NOTICE = {"id": ACTIVITY, "type": "Activity", "organization": 3}

WRONG = {
    "none": {},
    "wrong": basic("nobody", "nothing"),
    "right user, wrong password": basic(WEBHOOK_KEY, "nothing"),
    "wrong user, right password": basic("nobody", WEBHOOK_KEY),
    "empty": basic("", ""),
    "longer": basic(WEBHOOK_KEY, f"{WEBHOOK_KEY}x"),
    "non-ASCII": basic("gr\u00fcn", "\u96ea"),
    "Latin-1": basic("gr\u00fcn", "\u00e9", "latin-1"),
    "not base64": {"Authorization": "Basic ???"},
    "no colon": {"Authorization": "Basic " + base64.b64encode(b"abc").decode()},
    "another scheme": {"Authorization": f"Bearer {WEBHOOK_KEY}"},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_webhooks_without_the_credentials(site: Site, headers: dict[str, str], method: str) -> None:
    before = len(await site.deliveries(ACTIVITY))
    answer = await call(site.address, method, "/webhooks/ovation", headers=headers, json=NOTICE)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert "not the agent's" in answer.detail
    assert len(await site.deliveries(ACTIVITY)) == before


async def test_credentials_that_are_no_text(site: Site) -> None:
    for scheme in (b"Basic", b"Bearer"):
        for path in ("/webhooks/ovation", "/api/jobs", "/hpc_run"):
            method = "GET" if path == "/api/jobs" else "POST"
            answer = await raw(
                site.address, f"{method} {path} HTTP/1.1\r\n", b"Authorization: " + scheme + b" \xff\xfe\r\n"
            )
            assert answer.startswith(b"HTTP/1.1 401 "), (scheme, path)


async def raw(address: str, line: str, headers: bytes = b"", body: bytes = b"") -> bytes:
    """Send bytes as they are and return the beginning of the answer."""
    url = urlsplit(address)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        writer.write(line.encode() + b"Host: agent\r\n" + headers + b"\r\n" + body)
        await writer.drain()
        return await asyncio.wait_for(reader.read(65536), 10)
    finally:
        writer.close()


async def test_credentials_beyond_ascii(tmp_path: Path, site: Site) -> None:
    environment = site.lab.sandbox.environment()
    secrets = {"AGENT_WEBHOOK_USERNAME": "m\u00fcller", "AGENT_WEBHOOK_PASSWORD": "p\u00e4ss:w\u00f6rd"}
    async with running_agent(environment, tmp_path, **secrets) as agent:
        for encoding in ("utf-8", "latin-1"):
            headers = basic("m\u00fcller", "p\u00e4ss:w\u00f6rd", encoding)
            assert (await call(agent.address, "POST", "/webhooks/ovation", headers=headers, json=NOTICE)).status == 202
        headers = basic("m\u00fcller", "p\u00e4ss")
        assert (await call(agent.address, "POST", "/webhooks/ovation", headers=headers, json=NOTICE)).status == 401
        log = agent.log.read_text()
    assert "p\u00e4ss" not in log
    assert "p\\u00e4ss" not in log


def ids() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"{number:08}-502b-40ed-95eb-4e4f3fc0ab40"


NEW = ids()


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize(
    ("path", "named", "stored"),
    [("", None, None), ("", 3, 3), ("/0", None, 0), ("/7", None, 7), ("/7", 3, 7), ("/2147483647", None, 2**31 - 1)],
)
async def test_202_means_committed(site: Site, method: str, path: str, named: int | None, stored: int | None) -> None:
    entity_id = next(NEW)
    notice = {"id": entity_id, "type": "Activity"} | ({} if named is None else {"organization": named})
    answer = await call(site.address, method, f"/webhooks/ovation{path}", headers=RIGHT, json=notice)
    assert (answer.status, answer.body) == (202, {"accepted": 1})
    assert await site.deliveries(entity_id) == [("Activity", stored)]


def document(kind: str, entity_id: str) -> dict[str, Any]:
    return {
        "_id": entity_id,
        "type": kind,
        "api_version": 4,
        "organization_id": 5,
        "attributes": {"name": "New rev"},
        "links": {"self": f"/api/v1/o/5/x/{entity_id}"},
    }


def relation(source: str, rel: str, target: str, inverse: str) -> dict[str, Any]:
    return {
        "_id": f"{source}--{rel}-->{target}",
        "type": "Relation",
        "user_id": "u",
        "rel": rel,
        "inverse_rel": inverse,
        "source_id": source,
        "target_id": target,
        "organization_id": 5,
    }


def mapped(source: str, rel: str, target: str) -> dict[str, str]:
    inverse = {"inputs": "activities", "actions": "procedures", "activities": "inputs", "procedures": "actions"}[rel]
    return {"rel": rel, "inverse_rel": inverse, "owner_id": "o", "entity_id": source, "target_id": target}


FORMS = {
    "mapped relation, inputs": lambda a: (mapped(a, "inputs", REVISION), "Activity", None),
    "mapped relation, related": lambda a: (mapped(a, "actions", REVISION), "Activity", None),
    "mapped relation, other end": lambda a: (mapped(REVISION, "activities", a), "Activity", None),
    "relation": lambda a: (relation(a, "inputs", REVISION, "activities"), "Activity", 5),
    "relation, other end": lambda a: (relation(REVISION, "procedures", a, "actions"), "Activity", 5),
    "deleted relation": lambda a: ({"_id": f"{a}--inputs-->{REVISION}", "type": "Relation"}, "Activity", None),
    "Activity": lambda a: (document("Activity", a), "Activity", 5),
    "Revision": lambda a: (document("Revision", a), "Revision", 5),
    "notice": lambda a: ({"id": a, "type": "Activity", "organization": 5}, "Activity", 5),
    "notice of a Revision": lambda a: ({"id": a, "type": "Revision", "organization": 0}, "Revision", 0),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
async def test_every_form_is_taken(site: Site, form: Any) -> None:
    entity_id = next(NEW)
    body, kind, organization = form(entity_id)
    answer = await call(site.address, "POST", "/webhooks/ovation", headers=RIGHT, json=body)
    assert (answer.status, answer.body) == (202, {"accepted": 1})
    assert await site.deliveries(entity_id) == [(kind, organization)]


IRRELEVANT = {
    "an output": relation(ACTIVITY, "outputs", REVISION, "origins"),
    "a Project": document("Project", ACTIVITY),
    "a File": {"id": ACTIVITY, "type": "File", "organization": 0},
}


@pytest.mark.parametrize("body", IRRELEVANT.values(), ids=IRRELEVANT)
async def test_what_cannot_matter_is_accepted_and_forgotten(site: Site, body: Any) -> None:
    before = await site.database.fetchval("SELECT count(*) FROM deliveries")
    answer = await call(site.address, "POST", "/webhooks/ovation", headers=RIGHT, json=body)
    assert (answer.status, answer.body) == (202, {"accepted": 0})
    assert await site.database.fetchval("SELECT count(*) FROM deliveries") == before


def notice(organization: bytes) -> bytes:
    return b'{"id": "a", "type": "Activity", "organization": ' + organization + b"}"


UNREADABLE = {
    "nothing": (b"", "the body is not JSON: line 1, column 1"),
    "not JSON": (b'{"id": "a",\n"type": }', "the body is not JSON: line 2, column 9"),
    "not UTF-8": (b'{"id": "\xff"}', "the body is not text in UTF-8"),
    "nested": (b"[" * 60_000, "the body is not JSON"),
    "a list": (b"[]", "the body is not a JSON object"),
    "an empty object": (b"{}", "neither rel, nor an id with a type"),
    "no text": (b'{"id": 1, "type": "Activity"}', "neither rel, nor an id with a type"),
    "a foreign id": (b'{"id": "../x", "type": "Activity"}', "the id is not an Ovation id"),
    "a NUL": (b'{"id": "a\\u0000", "type": "Activity"}', "the id is not an Ovation id"),
    "a lone surrogate": (b'{"id": "\\ud800", "type": "Activity"}', "the id is not an Ovation id"),
    "no rel": (b'{"rel": 1}', "rel is not a word"),
    "no source": (b'{"rel": "inputs"}', "the source of the inputs relation is not an Ovation id"),
    "an organization in words": (notice(b'"x"'), "organization is not a number"),
    "a large organization": (notice(b"2147483648"), "organization is not"),
    "a huge organization": (notice(b"9" * 5000), "JSON that can be read"),
    "a negative organization": (notice(b"-1"), "organization is not"),
}


@pytest.mark.parametrize(("body", "where"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_400_says_where(site: Site, body: bytes, where: str, method: str) -> None:
    answer = await call(site.address, method, "/webhooks/ovation", headers=RIGHT, data=body)
    assert answer.status == 400
    assert where in answer.detail


@pytest.mark.parametrize("path", ["/webhooks/ovation/2147483648", "/webhooks/ovation/99999999999"])
async def test_an_organization_that_is_none(site: Site, path: str) -> None:
    assert (await call(site.address, "POST", path, headers=RIGHT, json=NOTICE)).status in {400, 404}


AUTHORIZATION = f"Authorization: {RIGHT['Authorization']}\r\n".encode()


@pytest.mark.parametrize("path", ["/webhooks/ovation", "/hpc_run"])
async def test_64_kib_are_the_most(site: Site, path: str) -> None:
    headers = RIGHT if path != "/hpc_run" else {"Authorization": f"Bearer {site.lab.sandbox.user_token(PERSON)}"}
    for size, status in ((64 * 1024, 400), (64 * 1024 + 1, 413)):
        answer = await call(site.address, "POST", path, headers=headers, data=b" " * size)
        assert answer.status == status
        assert answer.status != 413 or "65536" in answer.detail

    async def chunks(size: int) -> AsyncIterator[bytes]:
        for start in range(0, size, 8192):
            yield b" " * min(8192, size - start)

    assert (await call(site.address, "POST", path, headers=headers, data=chunks(64 * 1024))).status == 400
    assert (await call(site.address, "POST", path, headers=headers, data=chunks(64 * 1024 + 1))).status == 413


async def test_413_comes_before_the_body_is_read(site: Site) -> None:
    answer = await raw(
        site.address, "POST /webhooks/ovation HTTP/1.1\r\n", AUTHORIZATION + b"Content-Length: 1000000000\r\n", b"{"
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in answer
    head = AUTHORIZATION + b"Transfer-Encoding: chunked\r\n"
    answer = await raw(site.address, "POST /webhooks/ovation HTTP/1.1\r\n", head, b"11000\r\n" + b" " * 0x11000)
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_compressed_body_is_refused(site: Site) -> None:
    headers = {**RIGHT, "Content-Encoding": "gzip"}
    packed = gzip.compress(json.dumps(NOTICE).encode())
    answer = await call(site.address, "POST", "/webhooks/ovation", headers=headers, data=packed)
    assert (answer.status, answer.detail) == (415, "the body is compressed: send it as it is")


async def test_health(site: Site) -> None:
    for path in ("/", "/healthz"):
        answer = await call(site.address, "GET", path)
        assert (answer.status, answer.body) == (200, {"status": "alive"})
    assert (await call(site.address, "GET", "/readyz"))[:2] == (200, {"status": "ready"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/api/jobs/", 404),
        ("GET", "/webhooks/ovation/abc", 404),
        ("GET", "/webhooks/ovation", 405),
        ("PUT", "/hpc_run", 405),
        ("PATCH", "/healthz", 405),
        ("POST", "/", 405),
    ],
)
async def test_unknown_addresses_answer_in_json(site: Site, method: str, path: str, status: int) -> None:
    answer = await call(site.address, method, path)
    assert answer.status == status
    assert answer.detail
    assert status == 404 or answer.headers["Allow"]


API = [
    ("GET", "/api/jobs"),
    ("GET", "/api/jobs/x"),
    ("GET", "/api/jobs/x/events"),
    ("GET", "/api/jobs/x/logs/stdout"),
    ("GET", "/api/activities/x"),
    ("POST", "/api/jobs/x/cancel"),
    ("POST", "/api/jobs/x/rerun"),
]
NOT_ADMIN = {
    "none": {},
    "wrong": {"Authorization": "Bearer wrong"},
    "longer": {"Authorization": f"Bearer {ADMIN_TOKEN}x"},
    "basic": basic(ADMIN_TOKEN, ADMIN_TOKEN),
    "empty": {"Authorization": "Bearer "},
    "webhooks'": {"Authorization": f"Bearer {WEBHOOK_KEY}"},
}


@pytest.mark.parametrize(("method", "path"), API)
@pytest.mark.parametrize("headers", NOT_ADMIN.values(), ids=NOT_ADMIN)
async def test_the_api_wants_its_token(site: Site, method: str, path: str, headers: dict[str, str]) -> None:
    answer = await call(site.address, method, path, headers=headers)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/jobs?limit=0", 400),
        ("/api/jobs?limit=1001", 400),
        ("/api/jobs?limit=\u0663", 400),
        ("/api/jobs?limit=-1", 400),
        ("/api/jobs?state=happy", 400),
        ("/api/jobs?activity_id=%00", 400),
        ("/api/jobs?activity_id=%ff", 400),
        ("/api/jobs/%00", 404),
        ("/api/jobs/%2e%2e%2fx", 404),
        ("/api/activities/%00", 404),
        ("/api/activities/%ff", 404),
        ("/api/activities/unknown", 404),
        ("/api/jobs/00000000-0000-4000-8000-000000000000/logs/secrets", 404),
    ],
)
async def test_hostile_questions_get_plain_answers(site: Site, path: str, status: int) -> None:
    answer = await site.lab.agent.call("GET", path)
    assert answer[0] == status
    assert answer[1]["errors"]["detail"]


async def wish(site: Site, token: str | None, **body: Any) -> Answer:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return await call(site.address, "POST", "/hpc_run", headers=headers, json=body)


def readable_activity(site: Site, script: str = "true", **what: Any) -> str:
    site.lab.sandbox.admin.add_member(site.lab.project_id, PERSON, "reader")
    return site.lab.activity(script, **what)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_the_released_client_starts_a_run(site: Site) -> None:
    activity_id = readable_activity(site, "echo from the released client")
    client = released_client()
    token = site.lab.sandbox.user_token(PERSON)
    session = client.session.Session(token, api=site.lab.sandbox.api_url)

    def ask() -> int:
        activity = client.core.get_entity(session, activity_id)
        return int(client.activities.start_compute(session, activity, "image.sif", f"{site.address}/hpc_run"))

    assert await asyncio.to_thread(ask) == 201
    job = await site.lab.agent.job(activity_id)
    assert (job["state"], job["trigger"], job["requested_by"]) == ("succeeded", "hpc_run", PERSON)
    assert set(job) == FIELDS | MORE_FIELDS
    assert (await site.lab.outputs(activity_id))["stdout.log"] == b"from the released client\n"
    assert token not in site.log()
    assert token.rpartition(".")[2] not in site.log()
    for table in await site.database.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        found = await site.database.fetchval(
            f"SELECT count(*) FROM {table['tablename']} AS t WHERE t::text LIKE '%' || $1 || '%'",  # noqa: S608
            token.rpartition(".")[2],
        )
        assert found == 0, table


async def test_201_says_which_job(site: Site) -> None:
    activity_id = readable_activity(site, "trap exit TERM; sleep 600 & wait")
    token = site.lab.sandbox.user_token(PERSON)
    answer = await wish(site, token, activity_id=activity_id, image_name="image.sif", organization=0)
    assert answer.status == 201
    assert answer.headers["Location"] == f"/hpc_run/{answer.body['job_id']}"
    assert answer.body["activity_id"] == activity_id
    again = await wish(site, token, activity_id=activity_id, image_name="image.sif", organization="0")
    assert (again.status, again.body["job_id"]) == (201, answer.body["job_id"])
    job = await site.lab.agent.job(activity_id, states={"running"})
    other = site.lab.image(name="other.sif")
    site.lab.sandbox.admin.link(activity_id, "actions", other, "procedures")
    busy = await wish(site, token, activity_id=activity_id, image_name="other.sif")
    assert busy.status == 409
    assert "run 1 with the image image.sif is under way" in busy.detail
    await site.lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")
    assert (await site.lab.agent.job(activity_id))["state"] == "cancelled"


WISHES = {
    "no activity": ({"image_name": "i"}, "missing parameter: activity_id"),
    "no image": ({"activity_id": ACTIVITY}, "missing parameter: image_name"),
    "an empty image": ({"activity_id": ACTIVITY, "image_name": ""}, "missing parameter: image_name"),
    "a number": ({"activity_id": 5, "image_name": "i"}, "missing parameter: activity_id"),
    "a path": ({"activity_id": "..", "image_name": "i"}, "activity_id is not an Ovation id"),
    "a surrogate": ({"activity_id": "\ud800", "image_name": "i"}, "activity_id is not an Ovation id"),
    "a word": ({"activity_id": "a", "image_name": "i", "organization": "x"}, "organization is not a number"),
    "too large": ({"activity_id": "a", "image_name": "i", "organization": 2**31}, "organization is not a number"),
    "a part": ({"activity_id": "a", "image_name": "i", "organization": 1.5}, "organization is not a number"),
    "a truth": ({"activity_id": "a", "image_name": "i", "organization": True}, "organization is not a number"),
}


@pytest.mark.parametrize(("body", "detail"), WISHES.values(), ids=WISHES)
async def test_a_wish_that_is_not_whole(site: Site, body: Any, detail: str) -> None:
    answer = await wish(site, site.lab.sandbox.user_token(PERSON), **body)
    assert answer.status == 400
    assert detail in answer.detail


async def test_a_wish_that_is_no_object(site: Site) -> None:
    headers = {"Authorization": f"Bearer {site.lab.sandbox.user_token(PERSON)}"}
    answer = await call(site.address, "POST", "/hpc_run", headers=headers, json=[])
    assert (answer.status, answer.detail) == (400, "the body is not a JSON object")


def forged(site: Site, kind: str) -> str:
    claims = {"sub": "u", "email": PERSON, "exp": int(time.time()) + 600}
    secret = site.lab.sandbox.jwt_secret
    return {
        "expired": jwt.encode({**claims, "exp": int(time.time()) - 600}, secret, "HS256"),
        "another secret": jwt.encode(claims, "another-secret-that-is-long-enough-to-be-one", "HS256"),
        "alg none": jwt.encode(claims, "", "none"),
        "another algorithm": jwt.encode(claims, secret.ljust(64, "x"), "HS512"),
        "no JWT": "opaque",
        "strange parts": "a.b.c",
        "bent": f"{jwt.encode(claims, secret, 'HS256')[:-4]}AAAA",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["expired", "another secret", "alg none", "another algorithm", "no JWT", "strange parts", "bent"]
)
async def test_tokens_that_are_refused(site: Site, kind: str) -> None:
    token = forged(site, kind)
    answer = await wish(site, token, activity_id=ACTIVITY, image_name="i")
    assert (answer.status, answer.detail) == (401, "the token is not valid")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert token not in site.log()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer"}, RIGHT, {"Authorization": "Bearer a b"}])
async def test_hpc_run_without_a_token(site: Site, headers: dict[str, str]) -> None:
    answer = await call(site.address, "POST", "/hpc_run", headers=headers, json={})
    assert (answer.status, answer.detail) == (401, "a bearer token is needed")
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="ovation-agent"'


async def test_who_may_not_read_the_activity(site: Site) -> None:
    activity_id = readable_activity(site)
    token = site.lab.sandbox.user_token("stranger@example.org")
    answer = await wish(site, token, activity_id=activity_id, image_name="image.sif")
    assert answer.status == 404
    assert "no such Activity" in answer.detail
    unknown = await wish(site, token, activity_id=ACTIVITY, image_name="image.sif")
    assert unknown[:2] == answer[:2]
    assert await site.lab.agent.jobs(activity_id) == []


async def test_who_may_not_read_one_input(site: Site) -> None:
    admin = site.lab.sandbox.admin
    secret_project = admin.create_project("Secret")["_id"]
    secret = admin.create_revision(secret_project, "secret.csv", "1\n")["_id"]
    activity_id = readable_activity(site, inputs=[secret])
    token = site.lab.sandbox.user_token(PERSON)
    answer = await wish(site, token, activity_id=activity_id, image_name="image.sif")
    assert answer.status == 404
    assert "one of its inputs" in answer.detail
    assert await site.lab.agent.jobs(activity_id) == []
    admin.add_member(secret_project, PERSON, "reader")
    assert (await wish(site, token, activity_id=activity_id, image_name="image.sif")).status == 201
    assert (await site.lab.agent.job(activity_id))["state"] == "succeeded"


async def test_something_that_is_no_activity(site: Site) -> None:
    token = site.lab.sandbox.user_token(PERSON)
    readable_activity(site)
    answer = await wish(site, token, activity_id=site.lab.project_id, image_name="image.sif")
    assert answer.status == 404


async def test_no_such_image(site: Site) -> None:
    related = [site.lab.image(name="b.sif"), site.lab.image(name="a.sif")]
    activity_id = readable_activity(site, related=related)
    answer = await wish(
        site, site.lab.sandbox.user_token(PERSON), activity_id=activity_id, image_name="c.sif\x1b\ud800"
    )
    assert answer.status == 409
    assert "the related files are: a.sif, b.sif" in answer.detail


async def test_hpc_run_while_ovation_is_away(site: Site) -> None:
    activity_id = readable_activity(site)
    fault = site.lab.sandbox.faults.add("status", activity_id, target="api", status=503)
    try:
        answer = await wish(site, site.lab.sandbox.user_token(PERSON), activity_id=activity_id, image_name="image.sif")
    finally:
        site.lab.sandbox.faults.remove(fault.id)
    assert answer.status == 503
    assert answer.headers["Retry-After"]


async def test_a_token_that_ovation_alone_judges(site: Site, tmp_path: Path) -> None:
    activity_id = readable_activity(site)
    async with running_agent(site.lab.sandbox.environment(), tmp_path) as agent:
        url = f"{agent.address}/hpc_run"
        body = {"activity_id": activity_id, "image_name": "image.sif"}
        for kind in ("another secret", "alg none", "expired", "no JWT"):
            headers = {"Authorization": f"Bearer {forged(site, kind)}"}
            answer = await call(url, "POST", "", headers=headers, json=body)
            assert (answer.status, answer.detail) == (401, "Ovation does not accept the token"), kind
        headers = {"Authorization": f"Bearer {site.lab.sandbox.user_token(PERSON)}"}
        answer = await call(url, "POST", "", headers=headers, json=body)
        assert answer.status == 201
        job = await agent.job(activity_id)
    assert (job["state"], job["requested_by"]) == ("succeeded", PERSON)


async def test_a_public_key_is_no_shared_secret(site: Site, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import hashes, hmac
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    private = rsa.generate_private_key(65537, 2048)
    pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    claims = {"sub": "u", "exp": int(time.time()) + 600}

    def encoded(part: dict[str, Any]) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")

    unsigned = encoded({"alg": "HS256", "typ": "JWT"}) + b"." + encoded(claims)
    signing = hmac.HMAC(pem, hashes.SHA256())
    signing.update(unsigned)
    confused = (unsigned + b"." + base64.urlsafe_b64encode(signing.finalize()).rstrip(b"=")).decode()
    good = jwt.encode(claims, private, "RS256")
    answers = {"confused": (401, "the token is not valid"), "good": (401, "Ovation does not accept the token")}
    async with running_agent(site.lab.sandbox.environment(), tmp_path, JWT_PUBLIC_KEY=pem.decode()) as agent:
        for name, token in (("confused", confused), ("good", good)):
            headers = {"Authorization": f"Bearer {token}"}
            body = {"activity_id": ACTIVITY, "image_name": "i"}
            answer = await call(agent.address, "POST", "/hpc_run", headers=headers, json=body)
            assert (answer.status, answer.detail) == answers[name], name


async def test_a_log_is_followed_to_its_end(site: Site) -> None:
    activity_id = readable_activity(site, "echo first; while ! [ -e /outputs/go ]; do sleep 0.05; done; echo last")
    token = site.lab.sandbox.user_token(PERSON)
    made = await wish(site, token, activity_id=activity_id, image_name="image.sif")
    job_id = made.body["job_id"]
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    url = f"{site.address}/api/jobs/{job_id}/logs/stdout"
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.get(url, params={"follow": "1"}) as follow:
            assert follow.status == 200
            assert follow.content_type == "text/plain"
            assert await asyncio.wait_for(follow.content.readline(), 30) == b"first\n"
            async with http.get(url) as now:
                assert await now.read() == b"first\n"
            (outputs,) = (site.lab.data_dir / "jobs" / job_id).rglob("outputs")
            (outputs / "go").touch()
            assert await asyncio.wait_for(follow.content.read(), 30) == b"last\n"
        job = await site.lab.agent.job(activity_id)
        assert job["state"] == "succeeded"
        async with http.get(url, params={"follow": "1"}) as ended:
            assert await ended.read() == b"first\nlast\n"
        async with http.get(url.replace("stdout", "stderr")) as other:
            assert await other.read() == b""


async def test_who_stops_following_leaves_no_trace(site: Site) -> None:
    activity_id = readable_activity(site, "trap exit TERM; echo first; sleep 600 & wait")
    token = site.lab.sandbox.user_token(PERSON)
    job_id = (await wish(site, token, activity_id=activity_id, image_name="image.sif")).body["job_id"]
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        follow = await http.get(f"{site.address}/api/jobs/{job_id}/logs/stdout", params={"follow": "1"})
        assert await asyncio.wait_for(follow.content.readline(), 30) == b"first\n"
        follow.close()
    await site.lab.agent.call("POST", f"/api/jobs/{job_id}/cancel")
    await site.lab.agent.job(activity_id)
    assert not [line for line in site.lab.agent.events() if "exception" in line]


async def test_a_bug_is_500_in_json_and_one_line_in_the_log(site: Site) -> None:
    await site.database.execute("ALTER TABLE deliveries RENAME TO gone")
    try:
        answer = await call(site.address, "POST", "/webhooks/ovation", headers=RIGHT, json=NOTICE)
    finally:
        await site.database.execute("ALTER TABLE gone RENAME TO deliveries")
    assert (answer.status, answer.detail) == (500, "the agent failed at this; its log says more")
    (line,) = site.lab.agent.events("request_failed")
    assert (line["method"], line["path"]) == ("POST", "/webhooks/ovation")
    assert line["exception"][0]["exc_type"] == "UndefinedTableError"
    assert not [each for each in site.lab.agent.events() if each.get("logger") == "aiohttp.server"]


async def test_the_log_has_no_secret(site: Site) -> None:
    log = site.log()
    for secret in (WEBHOOK_KEY, ADMIN_TOKEN, site.lab.sandbox.jwt_secret, "eyJ"):
        assert secret not in log


def postmaster(url: str) -> int:
    directory = Path(url.partition("host=")[2])
    return int((directory / "data" / "postmaster.pid").read_text().splitlines()[0])


def backends(leader: int) -> list[int]:
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    return [int(child) for child in children]


@contextlib.asynccontextmanager
async def agent_on(url: str, directory: Path) -> AsyncIterator[Any]:
    """Run an agent on a given server; Ovation is not there, which is no obstacle."""
    async with Sandbox(directory / "sandbox") as sandbox:
        database = await Database.open(url, "the database")
        await database.migrate()
        await database.close()
        async with running_agent(sandbox.environment(), directory / "agent", AGENT_DATABASE_URL=url) as agent:
            yield agent


async def test_503_while_the_database_hangs(tmp_path: Path) -> None:
    with debian_server() as url:
        async with agent_on(url, tmp_path) as agent:
            leader = postmaster(url)
            stopped = [leader, *backends(leader)]
            for each in stopped:
                os.kill(each, signal.SIGSTOP)
            try:
                began = time.monotonic()
                answer = await call(agent.address, "POST", "/webhooks/ovation", headers=RIGHT, json=NOTICE)
                assert time.monotonic() - began < 9  # Ovation's senders wait ten seconds
                assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
                assert (await call(agent.address, "GET", "/healthz")).status == 200
            finally:
                for each in stopped:
                    os.kill(each, signal.SIGCONT)
            await accepted_again(agent)


async def test_503_while_the_database_is_away(tmp_path: Path) -> None:
    with debian_server() as url:
        async with agent_on(url, tmp_path) as agent:
            sent = await call(agent.address, "POST", "/webhooks/ovation", headers=RIGHT, json=NOTICE)
            assert sent.status == 202
            with stopped_server(url):
                began = time.monotonic()
                answer = await call(agent.address, "POST", "/webhooks/ovation", headers=RIGHT, json=NOTICE)
                assert time.monotonic() - began < 3
                assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
                assert "database is away" in answer.detail
                assert (await call(agent.address, "GET", "/readyz")).status == 503
                assert (await call(agent.address, "GET", "/healthz")).status == 200
                status, body = await agent.call("GET", "/api/jobs")
                assert (status, "errors" in body) == (503, True)
                await until(lambda: seen(agent, "database_away"), "a warning", agent.log)
                assert agent.process.returncode is None
            await accepted_again(agent)
            await until(lambda: seen(agent, "database_back"), "the end of the outage", agent.log)
            assert len(agent.events("database_away")) == 1
            assert not [line for line in agent.events() if "exception" in line]


async def seen(agent: Any, event: str) -> bool | None:
    return True if agent.events(event) else None


@contextlib.contextmanager
def stopped_server(url: str) -> Iterator[None]:
    """Stop a server as a crash would, and start it again."""
    directory = Path(url.partition("host=")[2])
    leader = postmaster(url)
    command = Path(f"/proc/{leader}/cmdline").read_bytes().split(b"\0")[:-1]
    account = directory.stat()
    os.kill(leader, signal.SIGQUIT)
    deadline = time.monotonic() + 20
    while (directory / "data" / "postmaster.pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield
    with (directory / "log").open("ab") as log:
        subprocess.run(
            ["setsid", "--fork", *command],
            cwd=directory,
            user=account.st_uid,
            group=account.st_gid,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )


async def accepted_again(agent: Any) -> None:
    async def look() -> bool | None:
        answer = await call(agent.address, "POST", "/webhooks/ovation", headers=RIGHT, json=NOTICE)
        ready = await call(agent.address, "GET", "/readyz")
        return True if (answer.status, ready.status) == (202, 200) else None

    await until(look, "the database back in use", agent.log, seconds=30)


@contextlib.asynccontextmanager
async def small_application() -> AsyncIterator[TestClient[Any, Any]]:
    """Serve two handlers under the agent's middleware: one that reads a body, one that is a bug."""

    async def read(request: web.Request) -> web.Response:
        return web.json_response(await state.read_json(request))

    async def fail(_: web.Request) -> web.Response:
        raise KeyError("a secret: hunter2")

    small = web.Application(middlewares=[state.errors])
    small.add_routes([web.post("/read", read), web.get("/fail", fail)])
    async with TestClient(TestServer(small)) as client:
        yield client


async def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_BODY_SECONDS", 0.2)

    async def slowly() -> AsyncIterator[bytes]:
        yield b"["
        await asyncio.sleep(5)
        yield b"]"

    async with small_application() as client, client.post("/read", data=slowly()) as response:
        assert response.status == 408
        assert (await response.json())["errors"]["detail"] == "the body did not come within 0 seconds"


async def test_a_bug_says_nothing_of_itself() -> None:
    async with small_application() as client, client.get("/fail") as response:
        assert response.status == 500
        assert "hunter2" not in await response.text()


async def test_the_server_leaves_compressed_bodies_alone() -> None:
    runner = application.runner(object())  # type: ignore[arg-type] # the request is answered before any of it is used
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        answer = await call(
            f"http://{host}:{port}", "POST", "/nothing", headers={"Content-Encoding": "gzip"}, data=b"no gzip"
        )
        assert answer.status == 404
    finally:
        await runner.cleanup()
