"""The sandbox's web API: who sees what, what is refused and how, and every condition that a Revision can be in."""

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from agent.sandbox.server import Sandbox
from agent.sandbox.settings import SandboxSettings
from tests.integration.sandbox_fixtures import Api, api

NOT_FOUND = (404, {"errors": {"detail": "Not found"}})
OWNER, OTHER = "owner@example.org", "other@example.org"


@dataclass
class Clock:
    """A clock that a test moves on."""

    ahead_seconds: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def sandbox(tmp_path: Path, clock: Clock) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox", settings=SandboxSettings(clock=clock)) as running:
        yield running


@pytest.fixture
async def service(sandbox: Sandbox) -> AsyncIterator[Api]:
    async with api(sandbox) as caller:
        yield caller


@pytest.fixture
def project(sandbox: Sandbox) -> dict[str, Any]:
    return sandbox.admin.create_project("P", owner=OWNER)


async def test_an_activity_looks_as_documented(sandbox: Sandbox, service: Api, project: dict[str, Any]) -> None:
    activity_id = sandbox.admin.create_activity(project["_id"], "New rev", owner=OWNER)["_id"]
    activity = (await service.get(f"/api/v1/o/0/activities/{activity_id}"))["activity"]
    path = f"/api/v1/o/0/activities/{activity_id}"
    assert activity["type"] == "Activity"
    assert activity["organization_id"] == 0
    assert activity["attributes"]["name"] == "New rev"
    assert set(activity["relationships"]) == {"inputs", "outputs", "actions", "operators", "parents"}
    assert activity["relationships"]["inputs"] == {
        "self": f"{path}/links/inputs/relationships",
        "related": f"{path}/links/inputs",
    }
    annotations = f"/api/v1/o/0/entities/{activity_id}/annotations"
    assert activity["links"] == {
        "self": path,
        "zip": f"/api/v1/o/0/zip/activities/{activity_id}",
        "_collaboration_roots": [project["_id"]],
        "notes": f"{annotations}/notes",
        "properties": f"{annotations}/properties",
        "tags": f"{annotations}/tags",
        "timeline-events": f"{annotations}/timeline_events",
    }
    assert (await service.get(f"/api/v1/o/0/entities/{activity_id}?trash=false"))["entity"] == activity
    assert (await service.get("/api/v1/o/0/activities/"))["activities"] == [activity]


async def test_whoever_may_not_read_an_entity_does_not_learn_that_it_exists(
    sandbox: Sandbox, project: dict[str, Any]
) -> None:
    revision = sandbox.admin.create_revision(project["_id"], "a.txt", "content")
    paths = [project["links"]["self"], revision["links"]["self"], f"/api/v1/o/0/entities/{project['_id']}"]
    async with api(sandbox, sandbox.user_token(OTHER)) as other:
        for path in (*paths, revision["relationships"]["file"]["self"], revision["links"]["notes"]):
            assert await other.call("GET", path) == NOT_FOUND
        assert await other.call("GET", f"/api/v1/resources/{revision['_id']}") == NOT_FOUND
        assert await other.call("POST", project["links"]["self"], {"entities": []}) == NOT_FOUND
        assert await other.get("/api/v1/o/0/projects/") == {"projects": []}
        sandbox.admin.add_member(project["_id"], OTHER, "reader")
        for path in paths:
            await other.get(path)
        new = {"entities": [{"type": "Folder", "attributes": {"name": "F"}}]}
        refused = (401, {"errors": {"detail": "Not authorized"}})
        assert await other.call("POST", project["links"]["self"], new) == refused
        assert await other.call("PUT", revision["links"]["upload-complete"]) == refused
        sandbox.admin.add_member(project["_id"], OTHER, "member")
        assert (await other.call("POST", project["links"]["self"], new))[0] == 201


async def test_entities_of_another_organization_are_not_found(sandbox: Sandbox, service: Api) -> None:
    organization = sandbox.admin.create_organization("Lab")["id"]
    project = sandbox.admin.create_project("P", organization)
    assert project["links"]["self"] == f"/api/v1/o/{organization}/projects/{project['_id']}"
    await service.get(project["links"]["self"])
    assert await service.call("GET", f"/api/v1/o/0/projects/{project['_id']}") == NOT_FOUND
    new = {"projects": [{"type": "Project", "attributes": {"name": "P"}}]}
    assert await service.call("POST", "/api/v1/o/99/projects/", new) == NOT_FOUND


async def test_tokens_are_checked(sandbox: Sandbox, project: dict[str, Any], clock: Clock) -> None:
    refused = (401, {"errors": {"detail": "Missing or invalid token"}})
    claims = {"sub": "x", "exp": time.time() + 60}
    valid = sandbox.user_token(OWNER)
    for token in ("", "nonsense", jwt.encode(claims, "k" * 40), jwt.encode(claims, "", algorithm="none"), valid[:-3]):
        async with api(sandbox, token) as caller:
            assert await caller.call("GET", project["links"]["self"]) == refused
    async with aiohttp.ClientSession() as http, http.get(sandbox.api_url + project["links"]["self"]) as answer:
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="ovation"')
    async with api(sandbox, valid) as caller:
        await caller.get(project["links"]["self"])
        clock.ahead_seconds = 86_401
        assert await caller.call("GET", project["links"]["self"]) == refused


async def test_a_service_account_does_what_its_scopes_allow(sandbox: Sandbox, project: dict[str, Any]) -> None:
    new = {"entities": [{"type": "Folder", "attributes": {"name": "F"}}]}
    async with api(sandbox, sandbox.tokens.for_service(60, "read:global")) as reader:
        await reader.get(project["links"]["self"])
        assert (await reader.call("POST", project["links"]["self"], new))[0] == 401
        assert (await reader.call("POST", project["links"]["notes"], {"notes": []}))[0] == 401
    async with api(sandbox, sandbox.tokens.for_service(60, "")) as nobody:
        assert await nobody.call("GET", project["links"]["self"]) == NOT_FOUND


async def test_a_service_token_needs_the_secret(sandbox: Sandbox, service: Api) -> None:
    body = {"client_id": sandbox.tokens.client_id, "client_secret": "wrong", "grant_type": "client_credentials"}
    assert (await service.call("POST", "/oauth/token", body))[0] == 401
    assert (await service.call("POST", "/oauth/token", {}))[0] == 400


async def test_links_made_from_either_end_are_read_from_both(
    sandbox: Sandbox, service: Api, project: dict[str, Any]
) -> None:
    activity = sandbox.admin.create_activity(project["_id"], "A")
    first = sandbox.admin.create_revision(project["_id"], "first.txt", "1")
    second = sandbox.admin.create_revision(project["_id"], "second.txt", "2")
    sandbox.admin.link(activity["_id"], "inputs", first["_id"], "activities")
    back = [{"target_id": activity["_id"], "inverse_rel": "inputs"}]
    status, answer = await service.call("POST", second["relationships"]["activities"]["self"], back)
    assert status == 201
    (link,) = answer["links"]
    assert link["_id"] == f"{second['_id']}--activities-->{activity['_id']}"
    inputs = (await service.get(activity["relationships"]["inputs"]["related"]))["inputs"]
    assert [one["_id"] for one in inputs] == [first["_id"], second["_id"]]
    for revision in (first, second):
        found = (await service.get(revision["relationships"]["activities"]["related"]))["activities"]
        assert [one["_id"] for one in found] == [activity["_id"]]
    links = (await service.get(activity["relationships"]["inputs"]["self"]))["links"]
    assert [(one["source_id"], one["rel"], one["target_id"]) for one in links] == [
        (activity["_id"], "inputs", first["_id"]),
        (second["_id"], "activities", activity["_id"]),
    ]
    path = link["links"]["self"]
    assert (await service.get(path))["relationship"] == link
    assert (await service.call("DELETE", path)) == (202, {"relationships": [link]})
    assert await service.call("DELETE", path) == NOT_FOUND
    inputs = (await service.get(activity["relationships"]["inputs"]["related"]))["inputs"]
    assert [one["_id"] for one in inputs] == [first["_id"]]


async def test_a_link_posted_twice_is_one_link(sandbox: Sandbox, service: Api, project: dict[str, Any]) -> None:
    activity = sandbox.admin.create_activity(project["_id"], "A")
    revision = sandbox.admin.create_revision(project["_id"], "out.txt", "1")
    path, wanted = (
        activity["relationships"]["outputs"]["self"],
        {"target_id": revision["_id"], "inverse_rel": "origins"},
    )
    first = await service.call("POST", path, [wanted])
    second = await service.call("POST", path, [wanted, wanted])
    assert first[0] == second[0] == 201
    assert first[1]["links"][0] == second[1]["links"][0]
    assert len((await service.get(path))["links"]) == 1


async def test_links_that_make_no_sense_are_refused(sandbox: Sandbox, service: Api, project: dict[str, Any]) -> None:
    activity = sandbox.admin.create_activity(project["_id"], "A")
    path = activity["relationships"]["inputs"]["self"]
    bodies: list[Any] = [
        [{"target_id": "nobody"}],
        [{"target_id": project["_id"]}],
        [{"target_id": 7}],
        [{}],
        ["x"],
        {},
    ]
    for body in bodies:
        assert (await service.call("POST", path, body))[0] == 400
    assert await service.call("POST", path.replace("inputs", "friends"), []) == NOT_FOUND
    assert (await service.get(path))["links"] == []


async def test_an_upload_is_complete_when_its_object_is_there(
    sandbox: Sandbox, service: Api, project: dict[str, Any]
) -> None:
    new = {"entities": [{"type": "File", "attributes": {"name": "a.txt"}}]}
    _, answer = await service.call("POST", project["links"]["self"], new)
    (file,) = answer["entities"]
    assert (await service.get(file["links"]["heads"])) == {"revisions": []}
    new = {"entities": [{"type": "Revision", "attributes": {"name": "a.txt", "content_type": "text/plain"}}]}
    status, answer = await service.call("POST", file["links"]["self"], new)
    assert status == 201
    (revision,), (aws,) = answer["entities"], answer["aws"]
    assert (aws["id"], set(aws["aws"])) == (
        revision["_id"],
        {"access_key_id", "secret_access_key", "session_token", "bucket", "key"},
    )
    assert aws["aws"]["key"].endswith("/a.txt")
    assert revision["attributes"]["upload-status"] == "in-progress"
    assert "content_length" not in revision["attributes"]
    status, answer = await service.call("PUT", revision["links"]["upload-complete"])
    assert (status, answer) == (422, {"errors": {"detail": "The object has not been uploaded"}})
    sandbox.admin._write(sandbox.admin._entity(revision["_id"]), b"12345")
    status, answer = await service.call("PUT", revision["links"]["upload-complete"])
    assert status == 200
    assert answer["revision"]["attributes"]["content_length"] == 5
    assert answer["revision"]["attributes"]["upload-status"] == "complete"
    file = (await service.get(file["links"]["self"]))["file"]
    assert file["revisions"][revision["_id"]]["status"] == "complete"
    status, again = await service.call("PUT", revision["links"]["upload-complete"])
    assert (status, again["revision"]["attributes"]["content_length"]) == (200, 5)


async def test_a_file_with_several_heads_takes_no_more_revisions(
    sandbox: Sandbox, service: Api, project: dict[str, Any]
) -> None:
    revision = sandbox.admin.create_revision(project["_id"], "a.txt", "1")
    file_id = revision["attributes"]["file_id"]
    second = sandbox.admin.second_head(file_id)
    heads = (await service.get(f"/api/v1/o/0/files/{file_id}/heads"))["revisions"]
    assert {one["_id"] for one in heads} == {revision["_id"], second["_id"]}
    new = {"entities": [{"type": "Revision", "attributes": {"name": "a.txt", "content_type": "text/plain"}}]}
    status, answer = await service.call("POST", f"/api/v1/o/0/files/{file_id}", new)
    assert (status, answer) == (409, {"errors": {"detail": "File has multiple head revisions"}})
    status, answer = await service.call("POST", second["links"]["self"], new)
    assert (status, answer["entities"][0]["attributes"]["previous"]) == (201, [second["_id"]])


async def test_revisions_in_every_condition(sandbox: Sandbox, service: Api, project: dict[str, Any]) -> None:
    admin, project_id = sandbox.admin, project["_id"]

    async def attributes(revision: dict[str, Any]) -> dict[str, Any]:
        return dict((await service.get(revision["links"]["self"]))["revision"]["attributes"])

    async def fetch(revision: dict[str, Any]) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {service.token}", "Accept": "application/json"}
        async with service.http.get((await attributes(revision))["url"], headers=headers) as answer:
            url = (await answer.json())["url"]
        async with service.http.get(url) as answer:
            return answer.status, await answer.read()

    stuck, failed = admin.in_progress_revision(project_id, "stuck"), admin.failed_revision(project_id, "failed")
    empty, old = admin.create_revision(project_id, "empty"), admin.old_revision(project_id, "old", "content")
    gone = admin.missing_revision(project_id, "gone")
    remote = admin.remote_revision(project_id, "remote", "http://127.0.0.1:9/x")
    assert (await attributes(stuck))["upload-status"] == "in-progress"
    assert (await attributes(failed))["upload-status"] == "error"
    assert (await attributes(empty))["content_length"] == 0
    assert not {"upload-status", "content_length", "version"} & (await attributes(old)).keys()
    assert (await attributes(gone))["upload-status"] == "complete"
    shown = await attributes(remote)
    assert (shown["url"], shown["remote"], shown["upload-status"]) == ("http://127.0.0.1:9/x", True, "complete")
    assert (await fetch(empty))[0:2] == (200, b"")
    assert await fetch(old) == (200, b"content")
    for missing in (stuck, failed, gone):
        assert (await fetch(missing))[0] == 404


async def test_the_bytes_are_asked_for_at_an_origin_of_their_own_that_is_ovations(
    sandbox: Sandbox, project: dict[str, Any]
) -> None:
    revision = sandbox.admin.create_revision(project["_id"], "a.txt", "content")
    url = revision["attributes"]["url"]
    assert url.startswith(sandbox.environment()["OVATION_HOSTS"] + "/")
    assert len({sandbox.api_url, sandbox.services_url, sandbox.s3_url}) == 3
    async with aiohttp.ClientSession() as http:
        async with http.get(url) as answer:
            assert answer.status == 401
        async with http.get(url, params={"token": sandbox.service_token}) as answer:
            document = await answer.json()
    assert document["url"].startswith(sandbox.s3_url + "/")
    assert document["path"].endswith("/a.txt")
    assert document["etag"] == "9a0364b9e99bb480dd25e1f0284c8555"


async def test_a_remote_revision_is_made_through_the_api(service: Api, project: dict[str, Any]) -> None:
    new = {"entities": [{"type": "File", "attributes": {"name": "r"}}]}
    (file,) = (await service.call("POST", project["links"]["self"], new))[1]["entities"]
    attributes = {"name": "r", "content_type": "text/plain", "url": "https://example.org/data.csv"}
    new = {"entities": [{"type": "Revision", "attributes": attributes}]}
    _, answer = await service.call("POST", file["links"]["self"], new)
    assert answer["aws"][0]["aws"] == {}
    assert answer["entities"][0]["attributes"]["url"] == "https://example.org/data.csv"
    status, answer = await service.call("PUT", answer["entities"][0]["links"]["upload-complete"])
    assert (status, answer["revision"]["attributes"]["upload-status"]) == (200, "complete")


async def test_a_source_can_be_an_input(sandbox: Sandbox, service: Api, project: dict[str, Any]) -> None:
    source = sandbox.admin.create_source("mouse 7", {"species": "Mus musculus"})
    activity = sandbox.admin.create_activity(project["_id"], "A", inputs=[source["_id"]])
    (found,) = (await service.get(activity["relationships"]["inputs"]["related"]))["inputs"]
    assert (found["type"], found["attributes"]["species"], "url" in found["attributes"]) == (
        *("Source", "Mus musculus", False),
    )
    async with api(sandbox, sandbox.user_token(OWNER)) as owner:
        # the link has let the Project's members see it
        await owner.get(source["links"]["self"])


async def test_annotations_are_listed_for_all_and_deleted_by_their_maker(
    sandbox: Sandbox, service: Api, project: dict[str, Any]
) -> None:
    bodies = {
        "properties": {"key": "compute.image", "value": {"any": ["json"]}},
        "tags": {"tag": "done"},
        "notes": {"text": "hello", "timestamp": "2026-01-01T00:00:00Z"},
        "timeline-events": {"name": "run", "notes": "", "start": "2026-01-01T00:00:00Z"},
    }
    async with api(sandbox, sandbox.user_token(OWNER)) as owner:
        for link, body in bodies.items():
            path, key = project["links"][link], link.replace("-", "_")
            status, answer = await service.call("POST", path, {key: [body]})
            assert status == 201
            (made,) = answer[key]
            assert (made["type"], made["annotation_type"], made["annotation"], made["entity"], made["user"]) == (
                *("Annotation", key, body, project["_id"], sandbox.tokens.service_user_id),
            )
            assert (await owner.get(path))[key] == [made]
            assert (await owner.call("DELETE", f"{path}/{made['_id']}"))[0] == 401
            assert (await service.call("DELETE", f"{path}/{made['_id']}"))[0] == 202
            assert (await owner.get(path))[key] == []
            assert (await service.call("POST", path, {key: [{"nonsense": 1}]}))[0] == 400
    included = await service.get(f"/api/v1/o/0/entities/{project['_id']}?includes=annotations")
    assert included["includes"] == []


async def test_provenance_is_what_came_before_and_after(
    sandbox: Sandbox, service: Api, project: dict[str, Any]
) -> None:
    admin, project_id = sandbox.admin, project["_id"]
    raw, middle, final, other = (admin.create_revision(project_id, name)["_id"] for name in ("raw", "mid", "end", "o"))
    first = admin.create_activity(project_id, "first", inputs=[raw])["_id"]
    second = admin.create_activity(project_id, "second", inputs=[middle, other])["_id"]
    admin.link(first, "outputs", middle, "origins")
    admin.link(second, "outputs", final, "origins")
    graph = (await service.get(f"/api/v1/o/0/prov/{middle}"))["provenance"]
    assert {one["_id"] for one in graph} == {raw, first, middle, second, final}
    (found,) = [one for one in graph if one["_id"] == second]
    assert [one["name"] for one in found["inputs"]] == ["mid", "o"]
    assert [one["name"] for one in found["outputs"]] == ["end"]


async def test_requests_that_are_not_understood_get_a_clear_answer(service: Api, project: dict[str, Any]) -> None:
    path = project["links"]["self"]
    headers = {"Authorization": f"Bearer {service.token}"}
    async with service.http.post(service.base_url + path, data=b"{", headers=headers) as answer:
        assert (answer.status, await answer.json()) == (400, {"errors": {"detail": "The body is not JSON"}})
    async with service.http.post(service.base_url + path, data=io.BytesIO(b" " * 5_000_000), headers=headers) as answer:
        assert answer.status == 413
    bodies: list[Any] = [{}, {"entities": {}}, {"entities": [{"type": "File"}]}, {"entities": [{"type": "Robot"}]}]
    for body in bodies:
        assert (await service.call("POST", path, body))[0] == 400
    assert (await service.call("PATCH", path))[0] == 405
    assert await service.call("GET", "/api/v1/o/0/robots/") == NOT_FOUND
    assert (await service.call("GET", project["links"]["self"].replace("projects", "zip/activities")))[0] == 501
    assert (await service.call("POST", "/api/v1/o/0/files/", {"files": []}))[0] == 405


async def test_a_request_that_fails_half_way_leaves_nothing(service: Api, project: dict[str, Any]) -> None:
    good = {"type": "File", "attributes": {"name": "good"}}
    body = {"entities": [good, {"type": "Revision", "attributes": {"name": "bad"}}]}
    assert (await service.call("POST", project["links"]["self"], body))[0] == 400
    assert (await service.get(project["relationships"]["files"]["related"])) == {"files": []}


async def test_names_come_back_as_they_were_given(sandbox: Sandbox, service: Api, project: dict[str, Any]) -> None:
    names = ["../../etc/passwd", "/etc/passwd", "a\nb", " ", ".", "..", "-rf", "é" * 127, "\ud800", "a\u202eb", ""]
    for name in names:
        revision = sandbox.admin.create_revision(project["_id"], name, "content")
        found = (await service.get(revision["links"]["self"]))["revision"]
        assert found["attributes"]["name"] == name
        headers = {"Authorization": f"Bearer {service.token}"}
        async with service.http.get(found["attributes"]["url"], headers=headers) as answer:
            url = (await answer.json())["url"]
        async with service.http.get(url) as answer:
            assert (answer.status, await answer.read()) == (200, b"content")
