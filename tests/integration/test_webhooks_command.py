"""`webhooks`: subscriptions and documents that Ovation really acts on, and a delivery whose fate is shown."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from agent.sandbox.server import Sandbox
from tests.agents import ADMIN_TOKEN, WEBHOOK_KEY, running_agent, until
from tests.integration.sandbox_fixtures import api
from tests.lab import Lab

pytestmark = pytest.mark.asyncio(loop_scope="module")
TEMPLATE = "12"
ENDPOINTS = f"/api/v3/project_templates/{TEMPLATE}/webhook_endpoints"
USER, PASSWORD = "a-user-name-of-webhooks", "a-password-of-webhooks"


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed, as JSON."""
        return json.loads(self.out)


class Desk:
    """An operator next to the agent, with its settings."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            **lab.sandbox.environment(),
            "AGENT_DATA_DIR": str(lab.data_dir),
            "AGENT_ADMIN_TOKEN": ADMIN_TOKEN,
            "AGENT_WEBHOOK_USERNAME": USER,
            "AGENT_WEBHOOK_PASSWORD": PASSWORD,
            "AGENT_SETTLE_SECONDS": "0.2",
        }

    async def __call__(self, *arguments: str, **environment: str) -> Done:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent", "webhooks", *arguments),
            env={**self.environment, **environment},
            cwd=self.lab.directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        done = Done(process.returncode, out.decode(), err.decode())
        assert "Traceback" not in done.err, done.err
        for secret in (USER, PASSWORD, WEBHOOK_KEY, self.environment["OVATION_TOKEN"]):
            assert secret not in done.out + done.err
        return done

    async def endpoints(self) -> list[dict[str, Any]]:
        """Return what Ovation has."""
        async with api(self.lab.sandbox) as ovation:
            found: list[dict[str, Any]] = (await ovation.get(ENDPOINTS))["webhook_endpoints"]
            return found

    async def settled(self) -> None:
        """Wait until every webhook is delivered."""

        async def look() -> bool | None:
            return True if self.lab.sandbox.webhooks.pending() == 0 else None

        await until(look, "the deliveries", self.lab.agent.log)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    directory = tmp_path_factory.mktemp("webhooks")
    async with Sandbox(directory / "sandbox") as sandbox:
        lab = Lab(sandbox, directory)
        settings = {
            "AGENT_WEBHOOK_USERNAME": USER,
            "AGENT_WEBHOOK_PASSWORD": PASSWORD,
            "AGENT_RECONCILE_SECONDS": "86400",
        }
        async with running_agent(sandbox.environment(), directory / "agent", **settings) as lab.agent:
            yield Desk(lab)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _no_subscription_is_left(desk: Desk) -> AsyncIterator[None]:
    yield
    desk.lab.sandbox.model.records.write("DELETE FROM webhooks")


async def test_added_twice_is_there_once_and_works(desk: Desk) -> None:
    lab = desk.lab
    wanted = ("add", "--template", TEMPLATE, "--target-url", lab.agent.address, "--event", "activity.updated")
    first = await desk(*wanted)
    assert (first.code, first.err) == (0, "")
    (endpoint,) = await desk.endpoints()
    target = f"{lab.agent.address}/webhooks/ovation"
    assert first.out == f"added {endpoint['id']}: activity.updated to {target}\n"
    assert (endpoint["target_url"], endpoint["event"], endpoint["username"]) == (target, "activity.updated", USER)
    second = await desk(*wanted, "--json")
    assert second.code == 0
    assert [(each["id"], each["made"]) for each in second.json] == [(endpoint["id"], False)]
    assert await desk.endpoints() == [endpoint]
    activity_id = lab.activity("true")
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["trigger"]) == ("succeeded", "webhook")
    await desk.settled()
    assert {each["status"] for each in lab.sandbox.webhooks.log()} == {202}


async def test_added_again_after_the_password_changed(desk: Desk) -> None:
    lab = desk.lab
    wanted = ("add", "--template", TEMPLATE, "--target-url", lab.agent.address, "--event", "activity.updated")
    old = await desk(*wanted, AGENT_WEBHOOK_USERNAME="an-old-user-name", AGENT_WEBHOOK_PASSWORD="an-old-password")
    assert old.code == 0
    listed = (await desk("list", "--template", TEMPLATE, "--json")).json
    assert [each["user_name"] for each in listed] == ["another's"]
    done = await desk(*wanted)
    assert "was there already; it has the agent's user name and password now" in done.out
    (endpoint,) = await desk.endpoints()
    assert endpoint["username"] == USER
    activity_id = lab.activity(None)
    await lab.agent.why(activity_id, "the Activity has no inputs")


async def test_several_events_and_an_organization(desk: Desk) -> None:
    url = "https://agent.example.org/"
    events = ("--event", "activity.updated", "--event", "revision.updated", "--event", "activity.updated")
    done = await desk("add", "--template", TEMPLATE, "--target-url", url, *events, "--organization", "17")
    assert (done.code, len(done.out.splitlines())) == (0, 2)
    found = await desk.endpoints()
    assert [each["event"] for each in found] == ["activity.updated", "revision.updated"]
    assert {each["target_url"] for each in found} == {"https://agent.example.org/webhooks/ovation/17"}


async def test_a_plain_address_is_warned_of(desk: Desk) -> None:
    done = await desk("add", "--template", TEMPLATE, "--target-url", "http://agent.example.org", "--event", "e")
    assert done.code == 0
    assert "WARNING: over http the user name and password can be read on the way" in done.err


async def test_what_was_doubled_by_hand_is_told(desk: Desk) -> None:
    body = {"webhook_endpoint": {"target_url": "https://a.example.org/webhooks/ovation", "event": "e"}}
    async with api(desk.lab.sandbox) as ovation:
        for _ in range(2):
            assert (await ovation.call("POST", ENDPOINTS, body))[0] == 201
    first, second = await desk.endpoints()
    done = await desk("add", "--template", TEMPLATE, "--target-url", "https://a.example.org", "--event", "e")
    assert done.code == 0
    assert first["id"] in done.out
    assert f"webhooks remove --template {TEMPLATE} {second['id']}" in done.err


async def test_list_shows_no_name_and_no_password(desk: Desk) -> None:
    assert await desk("list", "--template", TEMPLATE) == Done(0, "", "")
    bodies: list[dict[str, Any]] = [
        {"username": USER, "password": PASSWORD, "event": "ours"},
        {"username": WEBHOOK_KEY, "password": WEBHOOK_KEY, "event": "evil\x1b[2J"},
        {"event": "bare", "requestHeaders": {"X-Key": WEBHOOK_KEY}},
    ]
    async with api(desk.lab.sandbox) as ovation:
        for body in bodies:
            endpoint = {"target_url": f"https://h/x?token={WEBHOOK_KEY}", **body}
            assert (await ovation.call("POST", ENDPOINTS, {"webhook_endpoint": endpoint}))[0] == 201
    done = await desk("list", "--template", TEMPLATE)
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert [(row[1], row[3]) for row in rows] == [
        ("ours", "the agent's"),
        ("evil\N{REPLACEMENT CHARACTER}[2J", "another's"),
        ("bare", "none"),
    ]
    as_json = await desk("list", "--template", TEMPLATE, "--json")
    assert [each["id"] for each in as_json.json] == [row[0] for row in rows]
    assert "\x1b" not in as_json.out


async def test_remove_says_what_it_removed(desk: Desk) -> None:
    url = "https://agent.example.org/webhooks/ovation"
    added = await desk("add", "--template", TEMPLATE, "--target-url", url, "--event", "e", "--json")
    subscription = added.json[0]["id"]
    done = await desk("remove", "--template", TEMPLATE, subscription)
    assert done == Done(0, f"removed {subscription}: e to {url}\n", "")
    assert await desk.endpoints() == []
    for unknown in (subscription, "..", "a/b"):
        again = await desk("remove", "--template", TEMPLATE, unknown)
        assert (again.code, again.out) == (1, "")


async def test_an_answer_that_is_lost_does_no_harm(desk: Desk) -> None:
    faults = desk.lab.sandbox.faults
    wanted = ("add", "--template", TEMPLATE, "--target-url", "https://agent.example.org", "--event", "e", "--json")
    lost = faults.add("lost_answer", f"POST {ENDPOINTS}", target="api", times=1)
    first = await desk(*wanted)
    assert first.code == 1
    assert "Ovation broke off" in first.err
    second = await desk(*wanted)
    assert [each["made"] for each in second.json] == [False]
    faults.remove(lost.id)
    lost = faults.add("lost_answer", f"DELETE {ENDPOINTS}", target="api", times=1)
    assert (await desk("remove", "--template", TEMPLATE, second.json[0]["id"])).code == 0
    faults.remove(lost.id)
    assert await desk.endpoints() == []


async def test_what_ovation_refuses_is_clear(desk: Desk) -> None:
    token = desk.lab.sandbox.user_token("x@example.org")
    bad = await desk("list", "--template", TEMPLATE, OVATION_TOKEN=f"{token[:-4]}AAAA")
    assert bad.code == 1
    assert "with 401: is the token valid for it?" in bad.err
    none = await desk("list", "--template", TEMPLATE, OVATION_TOKEN="")
    assert none.code == 1
    assert "set OVATION_TOKEN, or OVATION_CLIENT_ID and OVATION_CLIENT_SECRET" in none.err
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    away = await desk("list", "--template", TEMPLATE, OVATION_API_URL=url)
    assert away.code == 1
    assert "Ovation cannot be reached" in away.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list"], "Missing option '--template'"),
        (["add", "--template", "1", "--event", "e"], "Missing option '--target-url'"),
        (["add", "--template", "1", "--target-url", "https://h"], "Missing option '--event'"),
        (["add", "--template", "1", "--target-url", "h", "--event", "e"], "is no address"),
        (["add", "--template", "1", "--target-url", "https://u:p@h", "--event", "e"], "must carry no user name"),
        (["documents", "--target-url", "https://h/webhooks/ovation/1", "--organization", "1"], "leave --organization"),
        (["remove", "--template", "1"], "Missing argument 'SUBSCRIPTION'"),
        (["test", "--url", "nonsense"], "is no address"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
async def test_a_wrong_command_line_is_2(desk: Desk, arguments: list[str], words: str) -> None:
    done = await desk(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


async def test_there_must_be_credentials_to_give(desk: Desk) -> None:
    wanted = ("add", "--template", TEMPLATE, "--target-url", "https://h", "--event", "e")
    none = {"AGENT_WEBHOOK_USERNAME": "", "AGENT_WEBHOOK_PASSWORD": ""}
    done = await desk(*wanted, **none)
    assert done.code == 2
    assert "set AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD" in done.err
    assert (await desk(*wanted, **none, AGENT_WEBHOOK_ANONYMOUS="true")).code == 0


async def test_the_documents_work_when_installed(desk: Desk, tmp_path: Path) -> None:
    lab = desk.lab
    both = {"AGENT_WEBHOOK_USERNAME": WEBHOOK_KEY, "AGENT_WEBHOOK_PASSWORD": WEBHOOK_KEY}
    settings = {**both, "AGENT_RECONCILE_SECONDS": "86400"}
    async with running_agent(lab.sandbox.environment(), tmp_path / "agent", **settings) as agent:
        done = await desk("documents", "--target-url", agent.address, "--organization", "0", **both)
        assert done.code == 0
        assert "Put your key in place of YOUR-API-KEY" in done.err
        assert "WARNING" not in done.err
        relation, revision, activity = done.json
        assert [each["trigger_type"] for each in done.json] == ["Relation", "Revision", "Activity"]
        assert {each["url"] for each in done.json} == {f"{agent.address}/webhooks/ovation/0"}
        assert {each["api_key"] for each in done.json} == {"YOUR-API-KEY"}
        assert not [each for each in done.json if "mapping" in each]  # the service's own is what the agent reads
        for document in (relation, revision, activity):
            filters = [tuple(pair) for pair in document.get("filter", [])]
            lab.sandbox.admin.create_webhook(
                document["url"], document["trigger_type"], api_key=WEBHOOK_KEY, filter_=filters
            )
        seen = len(lab.sandbox.webhooks.log())
        activity_id = lab.activity("true")
        job = await agent.job(activity_id)
        assert (job["state"], job["trigger"]) == ("succeeded", "webhook")
        lab.sandbox.admin.link(lab.revision("late.csv"), "activities", activity_id, "inputs")  # from the other end
        assert (await agent.job(activity_id, run=2))["state"] == "succeeded"
        await desk.settled()
        sent = lab.sandbox.webhooks.log()[seen:]
        assert {each["status"] for each in sent} == {202}
        relations = [each["body"] for each in sent if "rel" in each["body"]]
        assert {each["rel"] for each in relations} <= {"inputs", "actions", "activities", "procedures"}


async def test_documents_warn_of_credentials_that_no_key_can_be(desk: Desk) -> None:
    done = await desk("documents", "--target-url", "https://agent.example.org")
    assert done.code == 0
    assert "AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD differ here" in done.err
    unset = await desk("documents", "--target-url", "https://h", AGENT_WEBHOOK_USERNAME="", AGENT_WEBHOOK_PASSWORD="")
    assert "have no AGENT_WEBHOOK_USERNAME" in unset.err


async def test_a_delivery_about_nothing(desk: Desk) -> None:
    done = await desk("test")
    assert (done.code, done.err) == (0, "")
    rows = dict(line.split("\t", 1) for line in done.out.splitlines())
    assert rows["sent to"] == f"{desk.lab.agent.address}/webhooks/ovation"
    assert rows["answer"] == '202 {"accepted": 1}'
    assert rows["judged"] == "not found in organization 0, or not for the agent's account"
    assert rows["so"].startswith("it came in")


async def test_a_delivery_about_an_activity_twice(desk: Desk) -> None:
    activity_id = desk.lab.activity(None)
    arguments = ("test", "--activity", activity_id, "--organization", "0", "--json", "--url", desk.lab.agent.address)
    seen: set[str] = set()
    for _ in range(2):
        done = await desk(*arguments)
        assert done.code == 0, done.err
        assert done.json["answer"] == {"accepted": 1}
        assert done.json["reasons"] == ["the Activity has no inputs"]
        assert done.json["made_up"] is False
        seen.add(done.json["judged_at"])
    assert len(seen) == 2


async def test_a_delivery_about_a_ready_activity_runs_it(desk: Desk) -> None:
    activity_id = desk.lab.activity("true")
    done = await desk("test", "--activity", activity_id)
    assert done.code == 0
    assert "judged\tready\n" in done.out
    assert "run\t1: " in done.out
    assert (await desk.lab.agent.job(activity_id))["state"] == "succeeded"


async def test_a_delivery_with_other_credentials(desk: Desk) -> None:
    done = await desk("test", AGENT_WEBHOOK_PASSWORD="another-password-altogether")
    assert (done.code, done.out) == (1, "")
    assert " answers 401: " in done.err
    assert "the agent there runs with other credentials" in done.err
    assert "another-password-altogether" not in done.err


async def test_a_delivery_to_nobody(desk: Desk) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    done = await desk("test", "--url", url)
    assert (done.code, done.out) == (1, "")
    assert f"{url}/webhooks/ovation cannot be reached (Connect call failed" in done.err
    assert "is the agent running" in done.err


async def test_a_delivery_to_somebody_else(desk: Desk) -> None:
    done = await desk("test", "--url", desk.lab.sandbox.api_url)
    assert done.code == 1
    assert " answers 404: Not found" in done.err
    assert "is it the agent that answers there?" in done.err


async def test_a_delivery_whose_fate_cannot_be_seen(desk: Desk) -> None:
    done = await desk("test", "--url", desk.lab.agent.address, AGENT_ADMIN_TOKEN="", AGENT_DATA_DIR="elsewhere")
    assert done.code == 0
    assert "answer\t202" in done.out
    assert "note\twhat became of it cannot be seen from here: no admin token" in done.out
    wrong = await desk("test", "--url", desk.lab.agent.address, AGENT_ADMIN_TOKEN="wrong-admin-token")
    assert wrong.code == 1
    assert "AGENT_ADMIN_TOKEN must be the agent's" in wrong.err


async def test_a_delivery_that_is_not_judged(desk: Desk) -> None:
    activity_id = desk.lab.activity(None)
    fault = desk.lab.sandbox.faults.add("latency", activity_id, target="api", seconds=20)
    try:
        done = await desk("test", "--activity", activity_id)
    finally:
        desk.lab.sandbox.faults.remove(fault.id)
    assert done.code == 1
    assert f"not judged within 5 s: `ovation-agent why {activity_id}`" in done.err


async def test_a_delivery_that_is_signed(desk: Desk, tmp_path: Path) -> None:
    secret = "whsec_" + base64.b64encode(b"thirty-two bytes of a good secret").decode()
    signing = {"AGENT_WEBHOOK_USERNAME": "", "AGENT_WEBHOOK_PASSWORD": "", "AGENT_WEBHOOK_SECRET": secret}
    async with running_agent(desk.lab.sandbox.environment(), tmp_path / "agent", **signing) as agent:
        data_dir = str(tmp_path / "agent" / "data")
        done = await desk("test", "--url", agent.address, AGENT_DATA_DIR=data_dir, **signing)
        assert (done.code, done.err) == (0, "")
        other = "whsec_" + base64.b64encode(b"another thirty-two bytes of secret").decode()
        bad = await desk(
            "test", "--url", agent.address, AGENT_DATA_DIR=data_dir, **{**signing, "AGENT_WEBHOOK_SECRET": other}
        )
        assert bad.code == 1
        assert " answers 401: " in bad.err
