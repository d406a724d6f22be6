"""The numbers for Prometheus: each moves with what it counts, and no label has values without end."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from agent.beats import Beats
from agent.domain.decide import Limits, decide
from agent.domain.delivery import Receipt
from agent.domain.job import Done, Failed, Fault, FaultClass, Job, Outage, Outcome, Plan, PlannedFile, State, Verdict
from agent.metrics import PARTIES, Metrics, Numbers

IMAGE = PlannedFile("image", "Revision", "a.sif", "a.sif")
JOB = Job(
    id="job",
    organization=0,
    activity_id="activity",
    activity_name="An activity",
    project_id="project",
    run=1,
    plan=Plan((), (IMAGE,), IMAGE),
    state=State.STAGING,
    attempt=0,
    trigger="webhook",
    requested_by=None,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
)
NOTHING = Numbers({}, 0, 0.0, 0.0, 0, 0.0, 0.0, 0)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name.removeprefix("ovation_agent_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("ovation_agent_") and not sample.name.endswith("_created")
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def step(metrics: Metrics, job: Job, outcome: Outcome, seconds: float = 1.0) -> None:
    metrics.step(job, outcome, decide(job, outcome, Limits(), jitter=0.5), seconds)


def test_a_step_that_went_well() -> None:
    metrics = Metrics()
    step(metrics, JOB, Done(), 2.5)
    assert value(metrics, "step_seconds_count", state="staging", outcome="done") == 1
    assert value(metrics, "step_seconds_sum", state="staging", outcome="done") == 2.5
    assert value(metrics, "retries_total", state="staging") == 0


def test_a_failure_that_is_tried_again() -> None:
    metrics = Metrics()
    step(metrics, JOB, Failed(Fault(FaultClass.NODE, "the disk"), final=False))
    assert value(metrics, "retries_total", state="staging") == 1
    assert value(metrics, "step_seconds_count", state="staging", outcome="failed") == 1


@pytest.mark.parametrize("party", [*PARTIES, "somebody new"])
def test_an_outage(party: str) -> None:
    metrics = Metrics()
    step(metrics, JOB, Outage(party, "no answer"))
    assert value(metrics, "outages_total", party=party if party in PARTIES else "another") == 1


def test_runs_are_counted_when_they_have_ended() -> None:
    metrics = Metrics()
    reporting = replace(JOB, state=State.REPORTING)
    step(metrics, replace(reporting, verdict=Verdict.SUCCEEDED), Done())
    fault = Fault(FaultClass.MEMORY, "too much")
    step(metrics, replace(reporting, verdict=Verdict.FAILED, fault=fault), Done())
    step(metrics, replace(JOB, verdict=Verdict.FAILED, fault=fault), Done())
    assert value(metrics, "runs_total", verdict="succeeded", fault_class="none") == 1
    assert value(metrics, "runs_total", verdict="failed", fault_class="memory") == 1


def test_webhooks() -> None:
    metrics = Metrics()
    for receipt in (*Receipt, None):
        metrics.delivery(receipt)
    metrics.delivery_lost()
    metrics.refusal(401)
    for result in ("stored", "repeated", "full", "stopping", "irrelevant", "database_away", "refused"):
        assert value(metrics, "deliveries_total", result=result) == 1
    assert value(metrics, "refusals_total", status="401") == 1


def test_what_the_database_says() -> None:
    metrics = Metrics()
    metrics.database(Numbers({"running": 3, "collecting": 2, "reporting": 1}, 4, 5.5, 6.5, 7, 8.5, 9.5, 10))
    found = {
        **{f"jobs {state}": value(metrics, "jobs", state=state) for state in ("queued", "running", "collecting")},
        **{
            name: value(metrics, name)
            for name in (
                *("outbox_jobs", "looks_due", "oldest_look_seconds", "oldest_unjudged_seconds", "leases"),
                *("lease_overdue_seconds", "unwatched_seconds", "agents", "database_up"),
            )
        },
    }
    assert list(found.values()) == [0, 3, 2, 3, 4, 5.5, 6.5, 7, 8.5, 9.5, 10, 1]
    metrics.database(replace(NOTHING, agents=2))
    assert value(metrics, "jobs", state="running") == 0
    metrics.database(None)
    assert value(metrics, "database_up") == 0
    assert value(metrics, "agents") == 2


def test_what_other_parts_know() -> None:
    metrics, beats = Metrics(), Beats(clock=lambda: 100.0)
    beats.of("worker")
    moved = {"down": 10, "up": 20}
    metrics.watch(
        bytes_moved=lambda: moved,
        away={"Ovation": lambda: True, "the object store": lambda: False},
        loop_ages=beats.ages,
        held=lambda: 3,
        disk_free=lambda: 4e9,
    )
    assert value(metrics, "transferred_bytes_total", direction="down") == 10
    moved["up"] += 5
    assert value(metrics, "transferred_bytes_total", direction="up") == 25
    assert value(metrics, "party_away", party="Ovation") == 1
    assert value(metrics, "party_away", party="the object store") == 0
    assert value(metrics, "loop_age_seconds", loop="worker") == 0
    assert value(metrics, "held_jobs") == 3
    assert value(metrics, "disk_free_bytes") == 4e9


@given(st.text(), st.text(), st.text())
def test_names_from_outside_make_no_series(name: str, message: str, party: str) -> None:
    metrics = Metrics()
    before = set(samples(metrics))
    step(metrics, replace(JOB, activity_name=name, id=name), Outage(party, message))
    step(
        metrics,
        replace(JOB, state=State.REPORTING, verdict=Verdict.FAILED, fault=Fault(FaultClass.INPUT, message)),
        Done(),
    )
    assert set(samples(metrics)) == before


def test_a_loop_that_does_not_come_round_is_stuck() -> None:
    now = 0.0
    beats = Beats(clock=lambda: now)
    worker, walk = beats.of("worker", 90), beats.of("walk", 900)
    now = 89.0
    assert beats.stuck() == {}
    now = 91.0
    assert beats.stuck() == {"worker": 91.0}
    worker()
    assert beats.stuck() == {}
    now = 1000.0
    worker()
    assert beats.stuck() == {"walk": 1000.0}
    walk()
    assert beats.stuck() == {}
