"""The webhook sender: what is sent, to whom, when again, and when never."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.sandbox.errors import ApiError
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import SandboxSettings, WebhookSettings
from tests.integration.sandbox_fixtures import Api, Receiver, api, until

QUICK = SandboxSettings(
    webhooks=WebhookSettings(
        research_backoff_seconds=lambda attempt: 0.02 * attempt,
        lab_retry_seconds=(0.05, 0.1),
        lab_timeout_seconds=0.3,
        research_timeout_seconds=0.3,
        concurrency=4,
    )
)


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox", settings=QUICK) as running:
        yield running


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as running:
        yield running


@dataclass
class Scene:
    """An Activity and a Revision that are not linked yet."""

    project: str
    activity: str
    revision: str


@pytest.fixture
def scene(sandbox: Sandbox) -> Scene:
    project = sandbox.admin.create_project("P")["_id"]
    activity = sandbox.admin.create_activity(project, "A")["_id"]
    return Scene(project, activity, sandbox.admin.create_revision(project, "r", "x")["_id"])


def basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


async def settled(sandbox: Sandbox) -> None:
    await until(lambda: sandbox.webhooks.pending() == 0)


async def test_a_relation_is_sent_in_its_mapped_form(sandbox: Sandbox, receiver: Receiver, scene: Scene) -> None:
    url = f"{receiver.url}/webhooks/ovation/:organization_id"
    sandbox.admin.create_webhook(url, "Relation", api_key="the key")
    relation = sandbox.admin.link(scene.activity, "inputs", scene.revision, "activities")
    await settled(sandbox)
    (got,) = receiver.received
    assert (got.method, got.path) == ("POST", "/webhooks/ovation/0")
    assert got.headers["Authorization"] == basic("the key", "the key")
    assert got.headers["Content-Type"] == "application/json"
    expected = {
        "rel": "inputs",
        "inverse_rel": "activities",
        "owner_id": sandbox.tokens.service_user_id,
        "entity_id": scene.activity,
        "target_id": scene.revision,
    }
    assert got.body == expected
    sandbox.admin.link(scene.activity, "inputs", scene.revision, "activities")
    sandbox.admin.unlink(relation)
    await settled(sandbox)
    assert [one.method for one in receiver.received] == ["POST", "DELETE"]
    assert receiver.received[1].body == expected


async def test_an_entity_is_sent_whole(sandbox: Sandbox, receiver: Receiver, scene: Scene) -> None:
    sandbox.admin.create_webhook(f"{receiver.url}/:type/:_id/:nothing", "Activity")
    sandbox.admin.trash(scene.activity)
    await settled(sandbox)
    shown = sandbox.admin.entity(scene.activity)
    sandbox.admin.purge(scene.activity)
    await settled(sandbox)
    trashed, purged = receiver.received
    assert (trashed.method, trashed.path) == ("POST", f"/Activity/{scene.activity}/:nothing")
    assert trashed.body == purged.body == shown
    assert trashed.body["trash_info"]["trash_root"] == scene.activity
    assert "Authorization" not in trashed.headers
    assert purged.method == "DELETE"


async def test_filters_mappings_and_organizations_choose(sandbox: Sandbox, receiver: Receiver, scene: Scene) -> None:
    organization = sandbox.admin.create_organization("Lab")["id"]
    options: dict[str, Any] = {
        "filter_": [("status", "complete"), ("name", r".*\.sif")],
        "mapping": {
            "_id": "id",
            "type": "type",
            "organization_id": "organization",
            "attributes.name": "name",
            "attributes.upload-status": "status",
        },
        "organization": 0,
    }
    sandbox.admin.create_webhook(receiver.url, "Revision", **options)
    other = sandbox.admin.create_project("Q", organization)["_id"]
    sandbox.admin.create_revision(other, "other.sif", "x")
    sandbox.admin.create_revision(scene.project, "data.csv", "x")
    sandbox.admin.in_progress_revision(scene.project, "late.sif")
    sandbox.admin.create_revision(scene.project, "image.sif.txt", "x")  # the whole value must match
    wanted = sandbox.admin.create_revision(scene.project, "image.sif", "x")
    await settled(sandbox)
    (got,) = receiver.received
    assert got.body == {
        "id": wanted["_id"],
        "type": "Revision",
        "organization": 0,
        "name": "image.sif",
        "status": "complete",
    }


async def test_research_webhooks_are_sent_until_they_succeed(
    sandbox: Sandbox, receiver: Receiver, scene: Scene
) -> None:
    receiver.statuses = [500, 503, 302, 206, 404, 202]
    sandbox.admin.create_webhook(receiver.url, "Relation")
    sandbox.admin.link(scene.activity, "inputs", scene.revision, "activities")
    await settled(sandbox)
    log = sandbox.admin.deliveries()
    assert [one["status"] for one in log] == [500, 503, 302, 206, 404, 202]
    assert [one["attempt"] for one in log] == [1, 2, 3, 4, 5, 6]
    assert {one["state"] for one in log} == {"done"}
    assert len({str(one.body) for one in receiver.received}) == 1


async def test_research_webhooks_survive_a_receiver_that_is_away_and_a_restart(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        url = receiver.url
    async with Sandbox(tmp_path / "sandbox", settings=QUICK) as sandbox:
        sandbox.admin.create_webhook(url, "Project")
        sandbox.admin.create_project("P")
        await until(lambda: len(sandbox.admin.deliveries()) >= 2)
        assert {one["error"] for one in sandbox.admin.deliveries()} == {"ClientConnectorError"}
    async with Receiver() as receiver, Sandbox(tmp_path / "sandbox", settings=QUICK) as sandbox:
        sandbox.records.write("UPDATE deliveries SET url = ?", receiver.url)
        await settled(sandbox)
        assert [one.body["attributes"]["name"] for one in receiver.received] == ["P"]


async def test_nothing_is_sent_of_a_change_that_was_not_committed(
    sandbox: Sandbox, receiver: Receiver, scene: Scene
) -> None:
    sandbox.admin.create_webhook(receiver.url, "File")
    project = sandbox.admin._entity(scene.project)
    good = {"type": "File", "attributes": {"name": "good"}}

    def half() -> None:
        with sandbox.records.transaction():
            sandbox.model.add_child(sandbox.admin.service, project, good)
            sandbox.model.add_child(sandbox.admin.service, project, {"type": "Robot"})

    with pytest.raises(ApiError):
        half()
    assert sandbox.webhooks.pending() == 0
    sandbox.model.add_child(sandbox.admin.service, project, good)
    await settled(sandbox)
    assert len(receiver.received) == 1


async def test_deliveries_are_bounded(sandbox: Sandbox, receiver: Receiver) -> None:
    receiver.delay_seconds = 0.05
    sandbox.admin.create_webhook(receiver.url, "Project")
    for number in range(20):
        sandbox.admin.create_project(str(number))
    await settled(sandbox)
    assert len(receiver.received) == 20
    assert receiver.most_at_once == 4


@dataclass
class Lab:
    """The subscriptions of one project template."""

    api: Api
    path: str = "/api/v3/project_templates/7/webhook_endpoints"

    async def subscribe(self, **fields: Any) -> dict[str, Any]:
        status, answer = await self.api.call("POST", self.path, {"webhook_endpoint": fields})
        assert status == 201, answer
        return dict(answer["webhook_endpoint"])


@pytest.fixture
async def lab(sandbox: Sandbox) -> AsyncIterator[Lab]:
    async with api(sandbox) as caller:
        yield Lab(caller)


async def test_lab_subscriptions_are_managed(lab: Lab) -> None:
    made = await lab.subscribe(
        target_url="http://127.0.0.1:9/x",
        event="activity.updated",
        username="u",
        password="p",
        requestHeaders={"X-A": "b"},
        project_requisition_template_association_id=3,
    )
    assert "password" not in made
    assert made["requestHeaders"] == {"X-A": "b"}
    one = f"{lab.path}/{made['id']}"
    assert (await lab.api.get(lab.path))["webhook_endpoints"] == [made]
    status, changed = await lab.api.call("PUT", one, {"webhook_endpoint": {"event": "revision.updated"}})
    assert (status, changed["webhook_endpoint"]) == (200, {**made, "event": "revision.updated"})
    assert (await lab.api.get(one)) == changed
    assert (await lab.api.call("GET", one.replace("/7/", "/8/")))[0] == 404
    assert (await lab.api.call("DELETE", one))[0] == 204
    assert (await lab.api.get(lab.path))["webhook_endpoints"] == []
    for wrong in ({}, {"target_url": "ftp://x", "event": "e"}, {"target_url": "http://x"}):
        assert (await lab.api.call("POST", lab.path, {"webhook_endpoint": wrong}))[0] == 422


async def test_a_lab_event_is_sent_with_credentials_and_headers(
    sandbox: Sandbox, receiver: Receiver, lab: Lab, scene: Scene
) -> None:
    credentials = {"username": "user", "password": "secret", "requestHeaders": {"X-Extra": "1"}}
    await lab.subscribe(target_url=f"{receiver.url}/lab", event="activity.updated", **credentials)
    await lab.subscribe(target_url=f"{receiver.url}/own", event="requisition.done")
    sandbox.admin.link(scene.activity, "inputs", scene.revision, "activities")
    sandbox.admin.emit_lab_event("7", "requisition.done", {"id": "r1"})
    sandbox.admin.emit_lab_event("8", "requisition.done", {"id": "r2"})
    await settled(sandbox)
    first, second = sorted(receiver.received, key=lambda one: one.path)
    assert first.body == {"event": "activity.updated", "id": scene.activity, "type": "Activity", "organization": 0}
    assert first.headers["Authorization"] == basic("user", "secret")
    assert first.headers["X-Extra"] == "1"
    assert second.body == {"event": "requisition.done", "id": "r1"}


async def test_lab_events_are_sent_three_times_and_then_never(
    sandbox: Sandbox, receiver: Receiver, lab: Lab, scene: Scene
) -> None:
    receiver.statuses = [500, 400, 503, 200]
    await lab.subscribe(target_url=receiver.url, event="activity.updated")
    sandbox.admin.trash(scene.activity)
    await settled(sandbox)
    log = sandbox.admin.deliveries()
    assert [(one["attempt"], one["status"], one["state"]) for one in log] == [
        *((1, 500, "lost"), (2, 400, "lost"), (3, 503, "lost")),
    ]
    first, second, third = receiver.received
    assert second.at - first.at >= 0.05
    assert third.at - second.at >= 0.1


async def test_a_lab_answer_that_comes_too_late_is_none(
    sandbox: Sandbox, receiver: Receiver, lab: Lab, scene: Scene
) -> None:
    receiver.delay_seconds = 0.5
    await lab.subscribe(target_url=receiver.url, event="activity.updated")
    sandbox.admin.trash(scene.activity)
    await settled(sandbox)
    assert [one["error"] for one in sandbox.admin.deliveries()] == ["TimeoutError"] * 3


def test_the_documented_waits_are_the_default() -> None:
    settings = WebhookSettings()
    assert (settings.lab_timeout_seconds, settings.lab_retry_seconds) == (10.0, (64.0, 729.0))
    assert [settings.research_backoff_seconds(attempt) for attempt in (1, 2, 7, 100)] == [1, 2, 60, 60]


async def test_events_are_dropped_doubled_and_delayed_on_order(sandbox: Sandbox, receiver: Receiver) -> None:
    sandbox.admin.create_webhook(receiver.url, "Project")
    sandbox.faults.add("drop", target="webhooks", times=1)
    sandbox.faults.add("duplicate", target="webhooks", times=1)
    sandbox.faults.add("latency", target="webhooks", times=1, seconds=0.3)
    for name in ("dropped", "doubled", "delayed", "plain"):
        sandbox.admin.create_project(name)
    await settled(sandbox)
    names = [one.body["attributes"]["name"] for one in receiver.received]
    assert sorted(names) == ["delayed", "doubled", "doubled", "plain"]
    assert names[-1] == "delayed"
