"""`/metrics` and `/readyz` on a real agent and a real database: what happens shows, and trouble is named."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.beats import Beats
from agent.db.database import Database
from agent.db.jobs import Jobs
from agent.db.watched import WatchList
from agent.db.work import Work
from agent.domain.job import State
from agent.domain.webhook import Hint
from agent.web import health
from tests.agents import WEBHOOK_KEY, AgentProcess, until
from tests.integration.test_database import PLAN, activity, claim_one
from tests.integration.test_web import RIGHT, agent_on, basic, stopped_server
from tests.lab import Lab, laboratory
from tests.postgres import debian_server

Labels = dict[str, str]


class Scrape:
    """What an agent's `/metrics` says."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples[f"ovation_agent_{name}", frozenset(labels.items())]


async def scrape(agent: AgentProcess) -> Scrape:
    async with aiohttp.ClientSession(agent.address) as http, http.get("/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return Scrape(await answer.text())


async def shows(agent: AgentProcess, condition: Callable[[Scrape], bool], what: str) -> Scrape:
    async def look() -> Scrape | None:
        found = await scrape(agent)
        return found if condition(found) else None

    return await until(look, what, agent.log)


async def told(lab: Lab, headers: Labels, body: dict[str, Any]) -> None:
    async with aiohttp.ClientSession(lab.agent.address) as http:
        await http.post("/webhooks/ovation", json=body, headers=headers)


async def test_what_happens_shows(tmp_path: Path) -> None:
    async with laboratory(tmp_path, AGENT_ANNOTATE="false") as lab:
        before = await scrape(lab.agent)
        assert before("runs_total", verdict="succeeded", fault_class="none") == 0
        assert before("database_up") == 1
        assert before("agents") == 1
        await told(lab, basic(WEBHOOK_KEY, "wrong"), {"id": "x", "type": "Activity"})
        await told(lab, RIGHT, {"id": "x", "type": "Folder"})
        await lab.run("head -c 300000 /dev/zero > /outputs/zeros", inputs=[lab.revision("some.csv", b"x" * 200_000)])
        await lab.run("exit 3")
        slow = lab.activity("sleep 60")
        job = await lab.agent.job(slow, states={"running"})
        after = await shows(lab.agent, lambda found: found("jobs", state="running") == 1, "a run")
        assert after("held_jobs") >= 1
        assert after("leases") >= 1
        assert after("deliveries_total", result="refused") == 1
        assert after("refusals_total", status="401") == 1
        assert after("deliveries_total", result="irrelevant") >= 1
        assert after("deliveries_total", result="stored") > 0
        assert after("runs_total", verdict="succeeded", fault_class="none") == 1
        assert after("runs_total", verdict="failed", fault_class="user_code") == 1
        for state in ("queued", "staging", "launching", "running", "collecting", "reporting"):
            assert after("step_seconds_count", state=state, outcome="done") >= 2, state
        assert after("transferred_bytes_total", direction="down") > 200_000
        assert after("transferred_bytes_total", direction="up") > 300_000
        assert after("disk_free_bytes") > 1e6
        assert 0 <= after("loop_age_seconds", loop="worker") < 30
        assert after("info", version=(await lab.agent.call("GET", "/openapi.json"))[1]["info"]["version"]) == 1
        # While Ovation is away, its circuit is open, what waits grows old, and steps wait for it.
        lab.sandbox.faults.add("status", status=503, target="api")
        await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")
        away = await shows(lab.agent, lambda found: found("outages_total", party="Ovation") > 0, "an outage")
        assert away("party_away", party="Ovation") == 1
        await shows(lab.agent, lambda found: found("outbox_jobs") == 1, "what is to be delivered")
        await told(lab, RIGHT, {"id": slow, "type": "Activity"})
        await shows(lab.agent, lambda found: found("oldest_unjudged_seconds") > 1, "what is not judged yet")
        lab.sandbox.faults.remove()
        await lab.agent.job(slow)
        back = await shows(lab.agent, lambda found: found("party_away", party="Ovation") == 0, "Ovation's return")
        assert back("runs_total", verdict="cancelled", fault_class="none") == 1


async def test_numbers_while_the_database_is_away(tmp_path: Path) -> None:
    with debian_server() as url:
        async with agent_on(url, tmp_path) as agent:
            with stopped_server(url):
                found = await shows(agent, lambda found: found("database_up") == 0, "an outage of the database")
                assert found("loop_age_seconds", loop="worker") >= 0
                status, answer = await agent.call("GET", "/readyz")
                assert status == 503
                assert "PostgreSQL" in answer["errors"]["detail"]
            await shows(agent, lambda found: found("database_up") == 1, "the database's return")


async def test_what_the_database_counts(database: Database) -> None:
    jobs, watch_list, work = Jobs(database), WatchList(database), Work(database, "tests")
    assert (await work.numbers()).live == {}
    await watch_list.start(activity(), PLAN, "webhook")
    assert (await work.numbers()).live == {"queued": 1}
    claim = await claim_one(jobs, lease_seconds=30)
    assert (await work.numbers()).leases == 1
    await watch_list.hint([Hint("activity-2", "Activity", 0)], 0, 0)
    async with database.connection() as connection:
        await connection.execute("UPDATE jobs SET lease_until = now() - interval '50 s' WHERE id = $1", claim.job.id)
        await connection.execute(
            "UPDATE watched SET due_at = now() - interval '400 s', changed_at = now() - interval '500 s'"
        )
        numbers = await work.numbers()
        assert numbers.lease_overdue == pytest.approx(50, abs=5)
        assert (numbers.looks_due, numbers.leases) == (1, 0)
        assert numbers.oldest_look == pytest.approx(400, abs=5)
        assert numbers.oldest_unjudged == pytest.approx(500, abs=5)
        await connection.execute(
            "UPDATE jobs SET state = 'running', lease_until = NULL, due_at = now() - interval '600 s'"
        )
        await connection.execute("UPDATE watched SET judged_at = now(), due_at = NULL, reasons = '{why}'")
        numbers = await work.numbers()
        assert numbers.unwatched == pytest.approx(600, abs=5)
        assert (numbers.oldest_unjudged, numbers.looks_due) == (0, 0)
        assert (await Work(database, "elsewhere").numbers()).unwatched == 0
    [waiting] = await work.waiting_activities()
    assert (waiting.entity_id, waiting.reasons) == ("activity-2", ["why"])


async def test_the_last_days(database: Database) -> None:
    jobs, watch_list, work = Jobs(database), WatchList(database), Work(database, "tests")
    for number in range(3):
        await watch_list.start(activity(f"activity-{number}"), PLAN, "webhook")
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET state = 'succeeded', verdict = 'succeeded', finished_at = now(),"
            " started_at = created_at + interval '7 s' WHERE activity_id <> 'activity-2'"
        )
        await connection.execute(
            "INSERT INTO outputs SELECT id, 'output', 'a', 1000, 's', 'e', 'r', true, true FROM jobs"
        )
    days = await work.last_days()
    assert len(days) == 7
    assert (days[-1].succeeded, days[-1].failed, days[-1].waited_seconds, days[-1].bytes) == (2, 0, 7, 2000)
    assert days[0].succeeded == 0
    assert days[-1].day - days[0].day == timedelta(days=6)
    assert (await jobs.newest(state=State.QUEUED))[0].activity_id == "activity-2"


class _Services:
    """As much of an agent as `/readyz` asks."""

    def __init__(self, database: Database, beats: Beats) -> None:
        self.database, self.beats, self.work = database, beats, Work(database, "tests")
        self.ovation: Any = type("Ovation", (), {"away": False})()


async def test_readiness_names_what_keeps_the_agent_from_its_work(database: Database) -> None:
    now = 0.0
    beats = Beats(clock=lambda: now)
    beats.of("worker")
    services: Any = _Services(database, beats)
    assert await health.troubles(services) == []
    now = 200.0
    assert await health.troubles(services) == ["the worker has not come round for 200 s"]
    await WatchList(database).hint([Hint("activity-2", "Activity", 0)], 0, 0)
    async with database.connection() as connection:
        await connection.execute("UPDATE watched SET due_at = now() - interval '400 s'")
    now = 1.0
    assert await health.troubles(services) == ["an Activity has waited for 400 s to be looked at"]
    services.ovation.away = True  # then no waiting is the agent's own fault
    assert await health.troubles(services) == []
