"""What a run leaves for whoever asks in two years: its crate, what it says on the Activity, the chain, a repetition."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.agents import ADMIN_TOKEN, AgentProcess, agent_environment, until
from tests.crates import issues, read_back
from tests.integration.test_cli import command
from tests.lab import CRATE, Lab, laboratory

API = "/api/v1/o/0/entities"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with laboratory(tmp_path_factory.mktemp("lab")) as opened:
        yield opened


@pytest_asyncio.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    """A laboratory of the test's own."""
    async with laboratory(tmp_path) as opened:
        yield opened


pytestmark = pytest.mark.asyncio(loop_scope="module")


def by_type(crate: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [each for each in crate["@graph"] if kind == each["@type"] or kind in list(each["@type"])]


async def said_on(lab: Lab, activity_id: str, kind: str) -> list[dict[str, Any]]:
    answer = await lab.get(f"{API}/{activity_id}/annotations/{kind}")
    return [each["annotation"] for each in answer[kind]]


async def test_the_crate_of_a_run(shared: Lab) -> None:
    lab = shared
    reads, parameters = lab.revision("reads.csv", "1,2\n"), lab.revision("parameters.json", "{}")
    script = "echo hello; mkdir '/outputs/a b'; cp /inputs/reads.csv '/outputs/a b/copy.csv'"
    activity_id = lab.activity(script, inputs=[reads, parameters])
    job = await lab.agent.job(activity_id)
    everything = await lab.everything(activity_id)
    crate = json.loads(everything.pop(CRATE))
    assert issues(crate, everything) == []
    read_back(crate, everything)
    [action] = by_type(crate, "CreateAction")
    assert action["actionStatus"] == {"@id": "http://schema.org/CompletedActionStatus"}
    entities = {each["@id"]: each for each in crate["@graph"]}
    source = entities[f"{lab.sandbox.api_url}{API}/{reads}"]
    assert (source["name"], source["sha256"]) == ("reads.csv", hashlib.sha256(b"1,2\n").hexdigest())
    assert entities[f"{lab.sandbox.api_url}{API}/{parameters}"]["additionalType"] == "parameters"
    results = {entities[each["@id"]]["@id"]: entities[each["@id"]] for each in action["result"]}
    assert results.keys() == {"stdout.log", "stderr.log", "a%20b/copy.csv"}
    assert results["a%20b/copy.csv"]["sha256"] == hashlib.sha256(b"1,2\n").hexdigest()
    [image] = by_type(crate, "ContainerImage")
    assert action["instrument"] == {"@id": image["@id"]}
    assert image["text"].strip()
    assert entities["#runtime"]["name"] == "apptainer"
    values = {entities[each["@id"]]["name"]: entities[each["@id"]]["value"] for each in action["environment"]}
    assert values["exit code"] == "0"
    assert values["command line"].startswith("apptainer ")
    assert job["id"] == action["identifier"]


async def test_nothing_of_the_machine_and_no_secret_is_in_it(shared: Lab) -> None:
    lab = shared
    activity_id = lab.activity("echo hello")
    await lab.agent.job(activity_id)
    text = json.dumps(await lab.crate(activity_id))
    for secret in (lab.sandbox.service_token, ADMIN_TOKEN, str(lab.directory), "X-Amz-", "AWSAccessKeyId"):
        assert secret not in text


@pytest.mark.parametrize("how", ["failed", "cancelled", "image"])
async def test_a_run_that_did_not_succeed_has_one_too(shared: Lab, how: str) -> None:
    lab = shared
    related = [lab.revision("bad.sif", "nothing")] if how == "image" else None
    script = "echo oh >&2; exit 3" if how == "failed" else "echo begun; sleep 600"
    activity_id = lab.activity(script, related=related)
    if how == "cancelled":
        job = await lab.agent.job(activity_id, states={"running"})
        await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")
    job = await lab.agent.job(activity_id)
    everything = await lab.everything(activity_id)
    crate = json.loads(everything.pop(CRATE))
    assert issues(crate, everything) == []
    [action] = by_type(crate, "CreateAction")
    assert action["actionStatus"] == {"@id": "http://schema.org/FailedActionStatus"}
    if how != "cancelled":
        assert action["error"] == f"{job['fault']['class']}: {job['fault']['message']}"


async def test_what_is_said_on_the_activity(shared: Lab) -> None:
    lab = shared
    activity_id = lab.activity("echo starting; echo 'no such gene: XYZ' >&2; exit 3")
    job = await lab.agent.job(activity_id)
    [event] = await said_on(lab, activity_id, "timeline_events")
    assert event["name"] == "Run 1 of image.sif failed"
    assert event["start"] < event["end"]
    [note] = await said_on(lab, activity_id, "notes")
    assert "no such gene: XYZ" in note["text"]
    assert "the code in the image" in note["text"]
    said = {each["key"]: each["value"] for each in await said_on(lab, activity_id, "properties")}
    assert said["compute.status"] == "failed"
    assert (said["compute.run"], said["compute.exit_code"]) == ("1", "3")
    assert len(said["compute.image.sha256"]) == 64
    _, again = await lab.agent.call("POST", f"/api/jobs/{job['id']}/rerun")
    await lab.agent.job(activity_id, run=2)
    assert again["run"] == 2
    assert len(await said_on(lab, activity_id, "timeline_events")) == 2
    later = [(each["key"], each["value"]) for each in await said_on(lab, activity_id, "properties")]
    assert ("compute.run", "2") in later
    assert len(later) == len(said)  # the earlier run's are gone
    assert len(await lab.agent.jobs(activity_id)) == 2  # what is said starts nothing


async def test_lost_answers_double_nothing(shared: Lab) -> None:
    lab = shared
    fault = lab.sandbox.faults.add("lost_answer", "POST .*/annotations/.*", target="api", times=3)
    activity_id = lab.activity("exit 3")
    await lab.agent.job(activity_id)
    assert fault.hits == 3
    assert len(await said_on(lab, activity_id, "timeline_events")) == 1
    assert len(await said_on(lab, activity_id, "notes")) == 1
    keys = [each["key"] for each in await said_on(lab, activity_id, "properties")]
    assert sorted(keys) == sorted(set(keys))


async def test_a_refusal_holds_nothing_up(shared: Lab) -> None:
    lab = shared
    fault = lab.sandbox.faults.add("status", "POST .*/annotations/.*", target="api", status=403)
    activity_id = lab.activity("true")
    job = await lab.agent.job(activity_id)
    lab.sandbox.faults.remove(fault.id)
    assert job["state"] == "succeeded"
    _, story = await lab.agent.call("GET", f"/api/jobs/{job['id']}/events")
    assert "not told of on the Activity" in story["events"][-1]["note"]


@pytest.mark.asyncio(loop_scope="function")
async def test_it_can_be_switched_off(tmp_path: Path) -> None:
    async with laboratory(tmp_path, AGENT_ANNOTATE="false") as lab:
        activity_id = lab.activity("exit 3")
        await lab.agent.job(activity_id)
        for kind in ("timeline_events", "properties", "notes"):
            assert await said_on(lab, activity_id, kind) == []
        assert await lab.crate(activity_id)


@pytest.mark.asyncio(loop_scope="function")
async def test_killed_while_it_tells_it_is_told_once(lab: Lab) -> None:
    hole = lab.sandbox.faults.add("black_hole", "POST .*/annotations/notes", target="api")
    activity_id = lab.activity("exit 3")

    async def told() -> bool | None:
        return bool(hole.hits) or None

    await until(told, "the note is being written", lab.agent.log)
    await lab.agent.kill()
    lab.sandbox.faults.remove(hole.id)
    environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent")
    lab.watch(await AgentProcess.start(environment, lab.directory / "agent" / "agent.log"))
    await lab.agent.job(activity_id)
    for kind in ("timeline_events", "notes"):
        assert len(await said_on(lab, activity_id, kind)) == 1
    assert list(await lab.everything(activity_id)).count(CRATE) == 1


async def test_an_exact_repetition_is_compared(shared: Lab) -> None:
    lab = shared
    script = (
        "echo same > /outputs/same; cat /proc/sys/kernel/random/uuid > /outputs/time; echo 2 > /outputs/also-the-same"
    )
    activity_id = lab.activity(script)
    first = await lab.agent.job(activity_id)
    lab.sandbox.admin.link(activity_id, "inputs", lab.revision("more.csv"), "activities")
    await lab.agent.job(activity_id, run=2)  # by itself, because there is more
    status, again = await lab.agent.call("POST", f"/api/jobs/{first['id']}/rerun?exact=1")
    assert (status, again["exact_of"], again["run"]) == (201, first["id"], 3)
    done = await lab.agent.job(activity_id, run=3)
    status, found = await lab.agent.call("GET", f"/api/jobs/{done['id']}/comparison")
    assert (status, found["finished"], found["identical"]) == (200, True, False)
    assert {each["path"]: each["result"] for each in found["outputs"]} == {
        "same": "identical",
        "also-the-same": "identical",
        "time": "differs",
    }
    crate = await _crate_of(lab, activity_id, 3)
    inputs = [entity["name"] for entity in crate["@graph"] if entity.get("additionalType") == "Ovation Revision"]
    assert "more.csv" not in inputs
    status, _ = await lab.agent.call("GET", f"/api/jobs/{first['id']}/comparison")
    assert status == 409


async def _crate_of(lab: Lab, activity_id: str, run: int) -> dict[str, Any]:
    for document in await lab.output_documents(activity_id):
        if document["attributes"]["name"] == CRATE:
            crate: dict[str, Any] = json.loads(await lab._bytes(document))
            [root] = [entity for entity in crate["@graph"] if entity["@id"] == "./"]
            if root["name"].endswith(f"run {run}"):
                return crate
    raise AssertionError(f"no crate of run {run}")


async def test_the_commands(shared: Lab, tmp_path: Path) -> None:
    lab = shared
    first = lab.activity("echo 1 > /outputs/table.csv", name="Counting")
    await lab.agent.job(first)
    [table] = [each for each in await lab.output_documents(first) if each["attributes"]["name"] == "table.csv"]
    second = lab.activity("cat /inputs/table.csv > /outputs/plot.svg", inputs=[table["_id"]], name="Plotting")
    job = await lab.agent.job(second)
    environment = {
        **agent_environment(lab.sandbox.environment(), lab.directory / "agent"),
        "AGENT_ADMIN_TOKEN": ADMIN_TOKEN,
    }

    async def ask(*arguments: str) -> Any:
        return await command(*arguments, environment=environment, cwd=tmp_path)

    told = await ask("provenance", second)
    assert told.code == 0, told.err
    assert told.out.startswith(f"run 1 of Plotting: succeeded  (job {job['id']})")
    assert "← run 1 of Counting" in told.out
    assert "run 1 of Counting: succeeded" in told.out
    chain = json.loads((await ask("provenance", job["id"], "--json")).out)
    assert [run["activity_name"] for run in chain["runs"]] == ["Plotting", "Counting"]
    for name in ("chain.svg", "chain.png"):
        drawn = await ask("provenance", second, "--graph", name)
        assert (drawn.code, drawn.err) == (0, "")
    assert "Counting" in (tmp_path / "chain.svg").read_text()
    assert (tmp_path / "chain.png").read_bytes().startswith(b"\x89PNG")
    wrong = await ask("provenance", second, "--graph", "chain.pdf")
    assert wrong.code == 2
    missing = await ask("provenance", "nothing-of-that-name")
    assert (missing.code, "neither a job nor an Activity" in missing.err) == (1, True)
    again = await ask("rerun", job["id"], "--exact")
    assert again.code == 0, again.err
    assert "all 1 outputs are byte-identical" in again.out
