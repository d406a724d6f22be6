"""What no webhook told is found; history starts nothing; several agents walk once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import encode_basic_auth

from agent.db.database import Database
from agent.db.reconciliations import Reconciliations, Seen
from agent.db.watched import WatchList
from agent.domain.webhook import Hint
from agent.sandbox.server import Sandbox
from tests.agents import WEBHOOK_KEY, AgentProcess, running_agent, until
from tests.images import SCRIPT
from tests.lab import Lab

QUICK = {"AGENT_RECONCILE_SECONDS": "1"}


@pytest.fixture
async def deaf(tmp_path: Path) -> AsyncIterator[Lab]:
    """A laboratory whose Ovation sends no webhooks at all."""
    async with Sandbox(tmp_path / "sandbox") as sandbox:
        yield Lab(sandbox, tmp_path)


async def test_a_change_that_no_webhook_told_is_found(deaf: Lab) -> None:
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent", **QUICK) as agent:
        activity_id = deaf.activity("echo 1 > /outputs/one")
        job = await agent.job(activity_id)
        assert (job["state"], job["trigger"]) == ("succeeded", "reconcile")
        deaf.sandbox.admin.link(activity_id, "inputs", deaf.revision("more.csv"), "activities")
        assert (await agent.job(activity_id, run=2))["state"] == "succeeded"
        await agent.why(activity_id, "nothing new since the last run")
        assert len(await agent.jobs(activity_id)) == 2


async def test_what_happened_while_the_agent_was_down_is_found_at_its_start(deaf: Lab) -> None:
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent") as agent:

        async def walked() -> bool | None:
            return bool(agent.events("reconciled")) or None

        await until(walked, "the first walk", agent.log)
    activity_id = deaf.activity("echo 1 > /outputs/one")
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent") as agent:
        assert (await agent.job(activity_id))["state"] == "succeeded"


async def test_history_starts_nothing(deaf: Lab) -> None:
    old = deaf.activity("echo 1 > /outputs/one")
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent", **QUICK) as agent:
        await agent.why(old, "nothing new since the agent was installed")
        deaf.sandbox.admin.link(old, "inputs", deaf.revision("new.csv"), "activities")
        job = await agent.job(old)
        assert (job["state"], job["run"], job["trigger"]) == ("succeeded", 1, "reconcile")


async def test_removing_an_input_of_an_old_activity_starts_nothing(deaf: Lab) -> None:
    kept, removed = deaf.revision(SCRIPT, "true"), deaf.revision("removed.csv")
    activity_id = deaf.activity(None, inputs=[kept, removed])
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent") as agent:
        deaf.watch(agent)
        deaf.sandbox.admin.unlink(f"{activity_id}--inputs-->{removed}")
        await agent.why(activity_id, "nothing new since the agent was installed")
        assert await agent.jobs(activity_id) == []


async def test_a_new_link_on_an_old_activity_is_a_reason_although_the_file_is_old(deaf: Lab) -> None:
    activity_id, old_file = deaf.activity("true"), deaf.revision("old.csv")
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent") as agent:
        deaf.watch(agent)
        deaf.sandbox.admin.link(activity_id, "inputs", old_file, "activities")
        job = await agent.job(activity_id)
        assert (job["state"], job["trigger"]) == ("succeeded", "webhook")


async def test_a_walk_that_is_quicker_than_the_webhook_hides_nothing(deaf: Lab) -> None:
    """Files from before the agent, linked after it: the walk looks first and takes them for history."""
    old_file, old_image = deaf.revision(SCRIPT, "true"), deaf.image()
    admin = deaf.sandbox.admin
    activity_id = str(admin.create_activity(deaf.project_id, "Old", [], [])["_id"])
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent", **QUICK) as agent:
        admin.link(activity_id, "inputs", old_file, "activities")
        admin.link(activity_id, "actions", old_image, "procedures")
        await agent.why(activity_id, "nothing new since the agent was installed")
        for rel, target in (("inputs", old_file), ("actions", old_image)):
            status, _ = await agent.call(
                "POST",
                "/webhooks/ovation",
                json={"rel": rel, "entity_id": activity_id, "target_id": target},
                headers={"Authorization": encode_basic_auth(WEBHOOK_KEY, WEBHOOK_KEY)},
            )
            assert status == 202
        assert (await agent.job(activity_id))["state"] == "succeeded"


async def test_an_outage_of_ovation_is_waited_out(deaf: Lab) -> None:
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent", **QUICK) as agent:
        deaf.sandbox.faults.add("status", "GET .*/activities/", target="api", status=500, times=8)
        activity_id = deaf.activity("true")
        assert (await agent.job(activity_id))["state"] == "succeeded"
        assert agent.events("reconcile_failed")


async def test_properties_steer_runs(deaf: Lab) -> None:
    async with running_agent(deaf.sandbox.environment(), deaf.directory / "agent", **QUICK) as agent:
        deaf.watch(agent)
        related = [deaf.image(name="a.sif"), deaf.image(name="b.sif")]
        activity_id = deaf.activity("true", related=related)
        await agent.why(activity_id, "2 images among the related files and no compute.image property names one")
        await _annotate(deaf, agent, activity_id, "compute.image", "b.sif")
        assert (await agent.job(activity_id))["image_name"] == "b.sif"
        await _annotate(deaf, agent, activity_id, "compute.auto", False)
        deaf.sandbox.admin.link(activity_id, "inputs", deaf.revision("more.csv"), "activities")
        await agent.why(activity_id, "compute.auto switches automatic runs off")
        assert len(await agent.jobs(activity_id)) == 1


async def _annotate(lab: Lab, agent: AgentProcess, activity_id: str, key: str, value: object) -> None:
    status, _ = await agent.call(
        "POST",
        f"{lab.sandbox.api_url}/api/v1/o/0/entities/{activity_id}/annotations/properties",
        json={"properties": [{"key": key, "value": value}]},
        headers={"Authorization": f"Bearer {lab.sandbox.service_token}"},
    )
    assert status == 201


async def test_several_agents_walk_once(database: Database) -> None:
    tables = [Reconciliations(database) for _ in range(5)]
    walks = await asyncio.gather(*(each.claim(0, 30) for each in tables))
    [walk] = [each for each in walks if each]
    assert await tables[0].claim(0, 30) is None
    await tables[0].end(walk, 0, 10, 0)
    again = await tables[1].claim(0, 30)
    assert again is not None
    await tables[1].end(again, 3600, 10, 0)
    assert await tables[2].claim(0, 30) is None
    assert await tables[2].claim(1, 30) is not None


async def test_only_what_changed_is_due(database: Database) -> None:
    reconciliations, watch_list = Reconciliations(database), WatchList(database)
    walk = await reconciliations.claim(0, 30)
    assert walk is not None
    seen = [Seen(f"activity-{number}", "t1", recent=number < 3) for number in range(100)]
    assert await reconciliations.note(walk, seen) == 3
    assert await reconciliations.note(walk, seen) == 0  # due already
    for watched in await watch_list.claim(10, 30, "tests"):
        await watch_list.judged(watched)
    assert await reconciliations.note(walk, seen) == 0
    changed = [Seen("activity-50", "t2", recent=True), Seen("activity-51", "t1", recent=False)]
    assert await reconciliations.note(walk, changed) == 1
    assert [each.entity_id for each in await watch_list.claim(10, 30, "tests")] == ["activity-50"]


async def test_the_slow_round_reaches_everything(database: Database) -> None:
    reconciliations, watch_list = Reconciliations(database), WatchList(database)
    walk = await reconciliations.claim(0, 30)
    assert walk is not None
    await reconciliations.note(walk, [Seen(f"activity-{number}", "t", recent=False) for number in range(40)])
    looked_at: set[str] = set()
    for _ in range(4):
        assert await reconciliations.look_slowly(walk, 10, age_seconds=0) == 10
        for watched in await watch_list.claim(20, 30, "tests"):
            looked_at.add(watched.entity_id)
            await watch_list.judged(watched)
    assert len(looked_at) == 40


async def test_the_slow_round_prefers_what_a_walk_saw_change(database: Database) -> None:
    reconciliations, watch_list = Reconciliations(database), WatchList(database)
    walk = await reconciliations.claim(0, 30)
    assert walk is not None
    await reconciliations.note(walk, [Seen(f"activity-{number}", "t1", recent=False) for number in range(40)])
    assert await reconciliations.note(walk, [Seen("activity-7", "t2", recent=True)]) == 1
    [watched] = await watch_list.claim(10, 30, "tests")
    await watch_list.judged(watched)
    assert await reconciliations.look_slowly(walk, 2, age_seconds=0) == 2
    assert "activity-7" in {each.entity_id for each in await watch_list.claim(10, 30, "tests")}


async def test_a_webhook_is_not_taken_for_a_walk(database: Database) -> None:
    reconciliations, watch_list = Reconciliations(database), WatchList(database)
    await watch_list.hint([Hint("activity-1", "Activity", 0, gained="image-1")], settle_seconds=0)
    walk = await reconciliations.claim(0, 30)
    assert walk is not None
    await reconciliations.note(walk, [Seen("activity-1", "t", recent=True)])
    [watched] = await watch_list.claim(10, 30, "tests")
    assert (watched.trigger, watched.gained) == ("webhook", frozenset({"image-1"}))


async def test_the_agent_knows_when_it_was_installed(database: Database) -> None:
    at = await WatchList(database).installed_at()
    assert timedelta(0) <= datetime.now(UTC) - at < timedelta(minutes=5)


async def test_a_walk_that_broke_off_is_begun_again_by_who_walked(database: Database) -> None:
    reconciliations = Reconciliations(database)
    walk = await reconciliations.claim(0, 30, "here")
    assert walk is not None
    assert await reconciliations.claim(0, 30, "there") is None
    again = await reconciliations.claim(0, 30, "here")  # the process before it was killed, or its connection was cut
    assert again is not None
    await reconciliations.end(walk, 3600, 1, 1)  # which the fence keeps out
    assert await reconciliations.claim(0, 30, "there") is None
    await reconciliations.leave("here")
    assert await reconciliations.claim(0, 30, "there") is not None


async def test_a_look_that_was_lost_with_a_connection_is_begun_again(database: Database) -> None:
    watch_list = WatchList(database)
    await watch_list.hint([Hint(f"activity-{number}", "Activity", 0) for number in range(3)], settle_seconds=0)
    [kept, lost] = await watch_list.claim(2, 30, "here")
    assert len(await watch_list.claim(5, 30, "there", [])) == 1
    assert await watch_list.claim(5, 30, "here", [kept.entity_id, lost.entity_id]) == []
    [again] = await watch_list.claim(5, 30, "here", [kept.entity_id])
    assert (again.entity_id, again.token) == (lost.entity_id, lost.token + 1)
    await watch_list.leave("here")
    left = {each.entity_id for each in await watch_list.claim(5, 30, "there", [])}
    assert {kept.entity_id, lost.entity_id} <= left
