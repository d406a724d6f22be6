"""Each fault does what it says, at the API and at the store, and only as often as it was ordered."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET
from tests.integration.sandbox_fixtures import Api, api, s3_client, until

BODY = os.urandom(1_000_000)


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as running:
        yield running


@pytest.fixture
async def service(sandbox: Sandbox) -> AsyncIterator[Api]:
    async with api(sandbox) as caller:
        yield caller


@dataclass
class File:
    """A Revision with a million bytes, and a presigned URL to them."""

    revision: dict[str, Any]
    url: str


@pytest.fixture
async def file(sandbox: Sandbox, service: Api) -> File:
    project = sandbox.admin.create_project("P")["_id"]
    revision = sandbox.admin.create_revision(project, "data.bin", BODY)
    return File(revision, await presigned(service, revision))


async def presigned(service: Api, revision: dict[str, Any]) -> str:
    headers = {"Authorization": f"Bearer {service.token}"}
    async with service.http.get(revision["attributes"]["url"], headers=headers) as answer:
        return str((await answer.json())["url"])


async def read(service: Api, url: str) -> tuple[int, bytes, dict[str, str]]:
    async with service.http.get(url) as answer:
        return answer.status, await answer.read(), {name.lower(): value for name, value in answer.headers.items()}


async def drain(answer: aiohttp.ClientResponse, into: bytearray) -> None:
    async for chunk in answer.content.iter_any():
        into += chunk


async def test_a_status_is_answered_as_often_as_ordered(sandbox: Sandbox, service: Api) -> None:
    fault = sandbox.faults.add(
        "status", r"^GET /api/v1/o/0/projects", target="api", status=429, headers={"Retry-After": "2"}, skip=1, times=2
    )
    statuses = [(await service.call("GET", "/api/v1/o/0/projects/?x=1"))[0] for _ in range(4)]
    assert statuses == [200, 429, 429, 200]
    assert fault.hits == 2
    sandbox.faults.add("status", status=503, target="api", headers={"Retry-After": "2"}, body='{"a": 1}')
    async with service.http.get(service.base_url + "/api/v1/o/0/projects/") as answer:
        assert (answer.status, answer.headers["Retry-After"], await answer.text()) == (503, "2", '{"a": 1}')
    async with service.http.get(service.base_url + "/healthz") as answer:
        assert answer.status == 200


async def test_the_store_refuses_in_s3s_own_words(sandbox: Sandbox, service: Api, file: File) -> None:
    sandbox.faults.add("status", target="store", status=503, times=1, headers={"Retry-After": "1"})
    sandbox.faults.add("status", target="store", status=500, times=1)
    status, body, headers = await read(service, file.url)
    assert (status, b"<Code>SlowDown</Code>" in body, headers["retry-after"]) == (503, True, "1")
    status, body, _ = await read(service, file.url)
    assert (status, b"<Code>InternalError</Code>" in body) == (500, True)
    assert (await read(service, file.url))[:2] == (200, BODY)


async def test_latency_is_a_wait_before_the_work(sandbox: Sandbox, service: Api) -> None:
    sandbox.faults.add("latency", target="api", seconds=0.3, times=1)
    started = time.monotonic()
    await service.get("/api/v1/o/0/projects/")
    assert time.monotonic() - started >= 0.3


async def test_a_black_hole_never_answers(sandbox: Sandbox, service: Api) -> None:
    fault = sandbox.faults.add("black_hole", target="api", times=1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(service.get("/api/v1/o/0/projects/"), 0.3)
    assert fault.hits == 1
    sandbox.faults.add("black_hole", target="api", times=1, seconds=0.1)
    with pytest.raises(aiohttp.ClientConnectionError):
        await service.call("POST", "/api/v1/o/0/projects/", {})


async def test_the_connection_is_reset_in_the_middle_of_a_body(sandbox: Sandbox, service: Api, file: File) -> None:
    sandbox.faults.add("reset", target="store", after_bytes=400_000, times=1)
    got = bytearray()
    async with service.http.get(file.url) as answer:
        assert (answer.status, answer.content_length) == (200, 1_000_000)
        with pytest.raises((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError)):
            await drain(answer, got)
    assert len(got) <= 400_000
    assert bytes(got) == BODY[: len(got)]
    assert (await read(service, file.url))[1] == BODY


async def test_the_connection_is_closed_too_early(sandbox: Sandbox, service: Api, file: File) -> None:
    sandbox.faults.add("close", target="store", after_bytes=400_000, times=1)
    got = bytearray()
    async with service.http.get(file.url) as answer:
        assert (answer.status, answer.content_length) == (200, 1_000_000)
        with pytest.raises(aiohttp.ClientPayloadError):
            await drain(answer, got)
    assert bytes(got) == BODY[:400_000]


async def test_a_truncated_body_looks_flawless(sandbox: Sandbox, service: Api, file: File) -> None:
    sandbox.faults.add("truncate", target="store", after_bytes=400_000, times=1)
    status, body, headers = await read(service, file.url)
    assert (status, body, headers["content-length"]) == (200, BODY[:400_000], "400000")
    stored = sandbox.store.stat(BUCKET, file.url.partition(f"/{BUCKET}/")[2].partition("?")[0])
    assert stored is not None
    assert headers["etag"] == f'"{stored.etag}"'


@pytest.mark.parametrize("position", [0, 300_000, 999_999])
async def test_a_corrupt_body_has_one_wrong_byte(sandbox: Sandbox, service: Api, file: File, position: int) -> None:
    sandbox.faults.add("corrupt", target="store", after_bytes=position, times=1)
    status, body, _ = await read(service, file.url)
    assert (status, len(body)) == (200, len(BODY))
    assert [index for index in range(len(BODY)) if body[index] != BODY[index]] == [position]


async def test_a_range_goes_wrong_too(sandbox: Sandbox, service: Api, file: File) -> None:
    sandbox.faults.add("truncate", target="store", after_bytes=10, times=1)
    async with service.http.get(file.url, headers={"Range": "bytes=500-599"}) as answer:
        assert (answer.status, await answer.read()) == (206, BODY[500:510])


async def test_a_body_drips(sandbox: Sandbox, service: Api) -> None:
    project = sandbox.admin.create_project("P")["_id"]
    revision = sandbox.admin.create_revision(project, "small.bin", BODY[:2000])
    url = await presigned(service, revision)
    sandbox.faults.add("drip", target="store", bytes_per_second=5000, times=1)
    started = time.monotonic()
    assert (await read(service, url))[1] == BODY[:2000]
    assert time.monotonic() - started >= 0.3


async def test_answers_of_the_api_go_wrong_as_well(sandbox: Sandbox, service: Api, file: File) -> None:
    path = file.revision["links"]["self"]
    whole = (await service.get(path))["revision"]
    headers = {"Authorization": f"Bearer {service.token}"}
    sandbox.faults.add("truncate", path, target="api", after_bytes=20, times=1)
    async with service.http.get(service.base_url + path, headers=headers) as answer:
        assert (answer.status, len(await answer.read())) == (200, 20)
    sandbox.faults.add("close", path, target="api", after_bytes=20, times=1)
    async with service.http.get(service.base_url + path, headers=headers) as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    assert (await service.get(path))["revision"] == whole


async def test_a_presigned_url_has_expired_when_it_is_given_out(sandbox: Sandbox, service: Api, file: File) -> None:
    sandbox.faults.add("expired_url", "/resources/", target="api", times=1)
    stale = await presigned(service, file.revision)
    for url, expected in ((stale, 403), (file.url, 200), (await presigned(service, file.revision), 200)):
        status, body, _ = await read(service, url)
        assert (status, b"Request has expired" in body) == (expected, expected == 403)
    sandbox.faults.add("expired_url", target="store", times=1)
    status, body, _ = await read(service, file.url)
    assert (status, b"Request has expired" in body) == (403, True)


async def test_an_upload_is_cut_off(sandbox: Sandbox, service: Api) -> None:
    # twice, because aiohttp repeats a PUT once by itself when the connection is lost
    sandbox.faults.add("reset_request", "^PUT", target="store", after_bytes=100_000, times=2)
    client = s3_client(sandbox.admin.store_environment(), signature_version="s3v4")
    url = client.generate_presigned_url("put_object", {"Bucket": BUCKET, "Key": "k"})
    with pytest.raises((aiohttp.ClientConnectionError, ConnectionError)):
        async with service.http.put(url, data=BODY):
            pass
    assert sandbox.store.stat(BUCKET, "k") is None
    async with service.http.put(url, data=BODY) as answer:
        assert answer.status == 200


async def test_an_answer_is_lost_after_the_work_was_done(sandbox: Sandbox, service: Api) -> None:
    sandbox.faults.add("lost_answer", "^POST", target="api", times=1)
    new = {"projects": [{"type": "Project", "attributes": {"name": "P"}}]}
    with pytest.raises(aiohttp.ClientConnectionError):
        await service.call("POST", "/api/v1/o/0/projects/", new)
    assert len((await service.get("/api/v1/o/0/projects/"))["projects"]) == 1


async def test_faults_come_by_chance_but_repeatably(sandbox: Sandbox, service: Api) -> None:
    fault = sandbox.faults.add("status", target="api", probability=0.5)
    statuses = [(await service.call("GET", "/api/v1/o/0/projects/"))[0] for _ in range(40)]
    assert 5 < statuses.count(503) < 35
    assert statuses.count(503) == fault.hits


async def test_faults_are_programmed_over_http(sandbox: Sandbox, service: Api) -> None:
    controller = Api(service.http, sandbox.api_url, sandbox.control_token)
    order = {"kind": "status", "path": "projects", "target": "api", "status": 502, "times": 1}
    assert (await service.call("POST", "/_sandbox/faults", order))[0] == 401
    status, answer = await controller.call("POST", "/_sandbox/faults", order)
    assert status == 201
    assert (await service.call("GET", "/api/v1/o/0/projects/"))[0] == 502
    (listed,) = (await controller.get("/_sandbox/faults"))["faults"]
    assert (listed["id"], listed["hits"]) == (answer["fault"]["id"], 1)
    assert (await controller.call("DELETE", f"/_sandbox/faults/{listed['id']}"))[0] == 204
    assert (await controller.get("/_sandbox/faults")) == {"faults": []}
    for wrong in ({"kind": "nonsense"}, {"kind": "status", "path": "("}, {"kind": "status", "colour": 1}, {}):
        status, answer = await controller.call("POST", "/_sandbox/faults", wrong)
        assert (status, bool(answer["errors"]["detail"])) == (400, True)


async def test_helpers_are_called_over_http(sandbox: Sandbox, service: Api) -> None:
    controller = Api(service.http, sandbox.api_url, sandbox.control_token)
    status, answer = await controller.call("POST", "/_sandbox/admin/create_project", {"name": "P"})
    assert status == 200
    await service.get(answer["result"]["links"]["self"])
    assert (await controller.call("POST", "/_sandbox/admin/create_project", {"colour": 1}))[0] == 400
    assert (await controller.call("POST", "/_sandbox/admin/principal", {"email": None}))[0] == 404


async def test_a_sandbox_stops_while_requests_hang(tmp_path: Path) -> None:
    async with Sandbox(tmp_path / "other") as other:
        other.faults.add("black_hole", target="api")
        async with api(other) as caller:
            hanging = asyncio.create_task(caller.get("/api/v1/o/0/projects/"))
            await until(lambda: other.faults.faults[0].hits == 1)
            started = time.monotonic()
            await other.__aexit__(None, None, None)
            assert time.monotonic() - started < 5
            with pytest.raises(aiohttp.ClientError):
                await hanging
