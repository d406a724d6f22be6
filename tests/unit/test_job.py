"""The state machine: what `decide` may do with any job and any outcome."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.decide import Limits, decide
from agent.domain.job import (
    TERMINAL,
    TRANSITIONS,
    Done,
    Failed,
    Fault,
    FaultClass,
    Job,
    NotYet,
    Outage,
    Outcome,
    Plan,
    PlannedFile,
    State,
    Verdict,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
IMAGE = PlannedFile("r-image", "Revision", "a.sif", "a.sif")
JOB = Job(
    id="j",
    organization=0,
    activity_id="a",
    activity_name="An activity",
    project_id="p",
    run=1,
    plan=Plan(inputs=(), related=(IMAGE,), image=IMAGE),
    state=State.QUEUED,
    attempt=0,
    trigger="webhook",
    requested_by=None,
    created_at=NOW,
)

faults = st.builds(Fault, st.sampled_from(FaultClass), st.text(min_size=1))
verdicts = st.sampled_from(Verdict)
outcomes: st.SearchStrategy[Outcome] = st.one_of(
    st.builds(
        Done,
        verdict=st.none() | verdicts,
        fault=st.none() | faults,
        exit_code=st.none() | st.integers(0, 255),
        native_id=st.none() | st.text(min_size=1),
    ),
    st.builds(NotYet, seconds=st.floats(0, 3600), reason=st.text()),
    st.builds(Outage, party=st.text(), reason=st.text()),
    st.builds(Failed, fault=faults, final=st.booleans()),
)
live_states = st.sampled_from(sorted(set(State) - TERMINAL))
jobs = st.builds(
    lambda state, attempt, verdict, fault: replace(JOB, state=state, attempt=attempt, verdict=verdict, fault=fault),
    live_states,
    st.integers(0, 20),
    st.none() | verdicts,
    st.none() | faults,
)


@given(jobs, outcomes, st.floats(0, 1))
def test_every_move_is_in_the_transition_table(job: Job, outcome: Outcome, jitter: float) -> None:
    move = decide(job, outcome, Limits(), jitter)
    assert move.state is job.state or move.state in TRANSITIONS[job.state]
    assert move.wait_seconds >= 0


@given(jobs, outcomes)
def test_a_verdict_and_its_cause_are_never_changed(job: Job, outcome: Outcome) -> None:
    move = decide(job, outcome, Limits())
    if job.verdict is not None:
        assert move.verdict is job.verdict
    if job.fault is not None:
        assert move.fault == job.fault


@given(jobs, st.builds(Outage, party=st.text(), reason=st.text()) | st.builds(NotYet, st.floats(0, 60), st.text()))
def test_waiting_uses_no_attempt(job: Job, outcome: Outcome) -> None:
    move = decide(job, outcome, Limits())
    assert (move.state, move.attempt) == (job.state, job.attempt)


@given(st.lists(outcomes, min_size=1, max_size=60))
def test_delivery_is_never_given_up(results: list[Outcome]) -> None:
    job = replace(JOB, state=State.COLLECTING, verdict=Verdict.SUCCEEDED)
    for result in results:
        if isinstance(result, Done):
            continue
        move = decide(job, result, Limits())
        assert move.state is State.COLLECTING
        assert move.verdict is Verdict.SUCCEEDED
        job = replace(job, attempt=move.attempt)


@given(jobs, faults)
def test_failures_are_counted_and_then_end_in_delivery(job: Job, fault: Fault) -> None:
    limits = Limits(attempts=3)
    job = replace(job, state=State.STAGING, attempt=0, verdict=None, fault=None)
    moves = []
    while job.state is State.STAGING:
        move = decide(job, Failed(fault, final=False), limits)
        moves.append(move)
        job = replace(job, state=move.state, attempt=move.attempt, verdict=move.verdict, fault=move.fault)
    assert len(moves) == limits.attempts
    assert (job.state, job.verdict, job.fault) == (State.COLLECTING, Verdict.FAILED, fault)


@given(st.integers(0, 100), st.floats(0, 1))
def test_backoff_stays_within_its_bound(attempt: int, jitter: float) -> None:
    limits = Limits()
    job = replace(JOB, state=State.COLLECTING, attempt=attempt)
    move = decide(job, Failed(Fault(FaultClass.PLATFORM, "x"), final=False), limits, jitter)
    assert 0 <= move.wait_seconds <= limits.backoff_max_seconds


def test_a_delivery_that_was_refused_is_tried_again_seldom() -> None:
    job = replace(JOB, state=State.COLLECTING, verdict=Verdict.SUCCEEDED, attempt=3)
    move = decide(job, Failed(Fault(FaultClass.PLATFORM, "no such bucket"), final=True), Limits(), jitter=0)
    assert move.state is State.COLLECTING
    assert move.wait_seconds == Limits().refused_seconds
    assert move.waiting_for == "no such bucket"


def test_a_final_fault_before_the_run_goes_straight_to_delivery() -> None:
    for state in (State.QUEUED, State.STAGING, State.LAUNCHING):
        move = decide(replace(JOB, state=state), Failed(Fault(FaultClass.INPUT, "gone"), final=True), Limits())
        assert (move.state, move.verdict) == (State.COLLECTING, Verdict.FAILED)


@pytest.mark.parametrize(
    ("verdict", "state"),
    [(Verdict.SUCCEEDED, State.SUCCEEDED), (Verdict.FAILED, State.FAILED), (Verdict.CANCELLED, State.CANCELLED)],
)
def test_reporting_ends_where_the_verdict_says(verdict: Verdict, state: State) -> None:
    assert decide(replace(JOB, state=State.REPORTING, verdict=verdict), Done(), Limits()).state is state


def test_the_way_of_a_good_run() -> None:
    job, way = JOB, [JOB.state]
    while job.state not in TERMINAL:
        done = Done(verdict=Verdict.SUCCEEDED, exit_code=0) if job.state is State.RUNNING else Done()
        move = decide(job, done, Limits())
        job = replace(job, state=move.state, verdict=move.verdict, exit_code=move.exit_code)
        way.append(job.state)
    assert [str(state) for state in way] == [
        "queued", "staging", "launching", "running", "collecting", "reporting", "succeeded",
    ]  # fmt: skip
    assert job.exit_code == 0


def test_a_run_cancelled_before_it_began_is_still_delivered() -> None:
    move = decide(replace(JOB, state=State.STAGING), Done(verdict=Verdict.CANCELLED), Limits())
    assert (move.state, move.verdict) == (State.COLLECTING, Verdict.CANCELLED)


def test_a_terminal_job_moves_no_further() -> None:
    with pytest.raises(ValueError, match="moves no further"):
        decide(replace(JOB, state=State.SUCCEEDED), Done(), Limits())
