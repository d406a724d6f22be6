"""The state machine: what `decide` may do with any job and any outcome."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agent.domain.decide import Limits, decide, probation_seconds, set_aside
from agent.domain.job import (
    TERMINAL,
    TRANSITIONS,
    Done,
    Failed,
    Fault,
    FaultClass,
    HandedOver,
    Job,
    Lost,
    Move,
    NodeOver,
    NotYet,
    Outage,
    Outcome,
    Plan,
    PlannedFile,
    SetAside,
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
    st.builds(Outage, party=st.text(), reason=st.text(), seconds=st.none() | st.floats(0, 1e6)),
    st.builds(Failed, fault=faults, final=st.booleans()),
    st.builds(Lost, fault=faults),
    st.builds(HandedOver, place=st.uuids().map(str), waiting_for=st.text()),
    st.builds(
        NodeOver, fault=faults, verdict=st.sampled_from([Verdict.FAILED, Verdict.CANCELLED]), again=st.booleans()
    ),
    st.builds(SetAside, fault=faults),
)
live_states = st.sampled_from(sorted(set(State) - TERMINAL))
jobs = st.builds(
    lambda **known: replace(JOB, **known),
    state=live_states,
    attempt=st.integers(0, 20),
    launch=st.integers(1, 3),
    verdict=st.none() | verdicts,
    fault=st.none() | faults,
    native_id=st.none() | st.just("1234"),
    waiting_seconds=st.floats(0, 1e7),
    suspicion=st.integers(0, 9),
    cancel_requested=st.booleans(),
)
limits_of = st.builds(Limits, attempts=st.integers(1, 9), node_retries=st.integers(0, 3))


def after(job: Job, move: Move) -> Job:
    """Return the job as the database has it once it has moved."""
    return replace(
        job,
        state=move.state,
        attempt=move.attempt,
        launch=move.launch,
        verdict=move.verdict,
        fault=move.fault,
        exit_code=move.exit_code,
        native_id=move.native_id,
        started_at=move.started_at,
        waiting_for=move.waiting_for,
        suspicion=0,
    )


@given(jobs, outcomes, limits_of, st.floats(0, 1))
def test_every_move_is_in_the_transition_table(job: Job, outcome: Outcome, limits: Limits, jitter: float) -> None:
    assume(job.state is State.RUNNING or not isinstance(outcome, Lost))  # only who watches a run can lose it
    move = decide(job, outcome, limits, jitter)
    assert move.state is job.state or move.state in TRANSITIONS[job.state]
    assert move.wait_seconds >= 0
    assert move.launch >= job.launch


@given(jobs, outcomes, limits_of)
def test_a_verdict_and_its_cause_are_never_changed(job: Job, outcome: Outcome, limits: Limits) -> None:
    move = decide(job, outcome, limits)
    undelivered = isinstance(outcome, SetAside | NodeOver) and job.state is State.COLLECTING
    if undelivered and job.verdict is Verdict.SUCCEEDED:  # the one exception: its outputs do not come
        assert move.verdict is Verdict.FAILED
    elif job.verdict is not None:
        assert move.verdict is job.verdict
    if job.fault is not None:
        assert move.fault == job.fault


@given(jobs, outcomes, limits_of)
def test_whoever_ends_has_ended_as_its_verdict_says(job: Job, outcome: Outcome, limits: Limits) -> None:
    move = decide(job, outcome, limits)
    if move.state in TERMINAL:
        assert str(move.state) == (move.verdict or Verdict.FAILED)


@given(st.lists(outcomes, max_size=60), limits_of)
def test_every_way_leads_to_one_end_once_the_work_can_be_done(way: list[Outcome], limits: Limits) -> None:
    job = JOB
    for outcome in [*way, *[Done(verdict=Verdict.SUCCEEDED)] * 6]:
        if job.state in TERMINAL:
            break
        job = after(job, decide(job, outcome, limits))
    assert job.state in TERMINAL
    assert job.launch <= limits.node_retries + 1


@given(jobs, st.builds(Outage, party=st.text(), reason=st.text()) | st.builds(NotYet, st.floats(0, 60), st.text()))
def test_waiting_uses_no_attempt(job: Job, outcome: Outcome) -> None:
    move = decide(job, outcome, Limits())
    assert (move.state, move.attempt) == (job.state, job.attempt)


@given(st.lists(outcomes, min_size=1, max_size=60))
def test_delivery_is_never_given_up(results: list[Outcome]) -> None:
    job = replace(JOB, state=State.COLLECTING, verdict=Verdict.SUCCEEDED)
    for result in results:
        if isinstance(result, Done | Lost | NodeOver | SetAside):
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


@given(st.integers(0, 3), st.integers(1, 4))
def test_a_lost_run_is_started_again_so_often_and_then_ends(retries: int, launch: int) -> None:
    fault = Fault(FaultClass.NODE, "the machine restarted")
    job = replace(JOB, state=State.RUNNING, launch=launch, native_id="1234", started_at=NOW)
    move = decide(job, Lost(fault), Limits(node_retries=retries))
    if launch <= retries:
        assert (move.state, move.launch, move.attempt) == (State.STAGING, launch + 1, 0)
        assert (move.verdict, move.fault, move.native_id, move.started_at) == (None, None, None, None)
    else:
        assert (move.state, move.launch) == (State.COLLECTING, launch)
        assert (move.verdict, move.fault) == (Verdict.FAILED, fault)


@given(st.integers(0, 3), st.integers(1, 4), st.sampled_from([State.STAGING, State.LAUNCHING, State.RUNNING]))
def test_what_a_node_lost_begins_anew_elsewhere_so_often_and_then_ends(retries: int, launch: int, state: State) -> None:
    over = NodeOver(Fault(FaultClass.NODE, "the node failed"), Verdict.FAILED, again=True)
    job = replace(JOB, state=state, launch=launch, native_id="1234", started_at=NOW, place="of the node")
    move = decide(job, over, Limits(node_retries=retries))
    assert move.elsewhere
    if launch <= retries:
        assert (move.state, move.launch, move.verdict, move.fault) == (State.STAGING, launch + 1, None, None)
    else:
        assert (move.state, move.launch) == (State.COLLECTING, launch)
        assert (move.verdict, move.fault) == (Verdict.FAILED, over.fault)


@pytest.mark.parametrize("again", [True, False])
def test_what_a_node_had_delivered_is_not_run_again(again: bool) -> None:
    over = NodeOver(Fault(FaultClass.NODE, "the node failed"), Verdict.FAILED, again=again)
    collecting = replace(JOB, state=State.COLLECTING, verdict=Verdict.SUCCEEDED, exit_code=0)
    move = decide(collecting, over, Limits())
    assert (move.state, move.elsewhere, move.launch) == (State.COLLECTING, True, 1)
    assert (move.verdict, move.fault) == (Verdict.FAILED, over.fault)
    reporting = replace(collecting, state=State.REPORTING)
    move = decide(reporting, over, Limits())
    assert (move.state, move.elsewhere, move.verdict, move.fault) == (State.REPORTING, True, Verdict.SUCCEEDED, None)


def test_what_slurm_ended_is_not_run_again() -> None:
    over = NodeOver(Fault(FaultClass.MEMORY, "too much"), Verdict.FAILED, again=False)
    move = decide(replace(JOB, state=State.RUNNING), over, Limits(node_retries=3))
    assert (move.state, move.verdict, move.fault) == (State.COLLECTING, Verdict.FAILED, over.fault)


def test_a_job_that_is_handed_over_goes_on_where_it_was_told() -> None:
    move = decide(replace(JOB, state=State.STAGING), HandedOver("there", "Slurm", {"granted": {}}), Limits())
    assert (move.state, move.place, move.waiting_for) == (State.STAGING, "there", "Slurm")
    assert (move.elsewhere, move.resources) == (False, {"granted": {}})


def test_a_lost_run_whose_end_was_asked_for_is_cancelled() -> None:
    job = replace(JOB, state=State.RUNNING, cancel_requested=True, started_at=NOW)
    move = decide(job, Lost(Fault(FaultClass.NODE, "the machine restarted")), Limits())
    assert (move.state, move.verdict, move.fault, move.launch) == (State.COLLECTING, Verdict.CANCELLED, None, 1)


@pytest.mark.parametrize(
    ("state", "verdict", "to", "becomes"),
    [
        (State.QUEUED, None, State.COLLECTING, Verdict.FAILED),
        (State.STAGING, None, State.COLLECTING, Verdict.FAILED),
        (State.LAUNCHING, None, State.COLLECTING, Verdict.FAILED),
        (State.COLLECTING, Verdict.SUCCEEDED, State.REPORTING, Verdict.FAILED),
        (State.COLLECTING, Verdict.FAILED, State.REPORTING, Verdict.FAILED),
        (State.COLLECTING, Verdict.CANCELLED, State.REPORTING, Verdict.CANCELLED),
        (State.REPORTING, Verdict.SUCCEEDED, State.SUCCEEDED, Verdict.SUCCEEDED),
        (State.REPORTING, Verdict.CANCELLED, State.CANCELLED, Verdict.CANCELLED),
    ],
)
def test_what_is_set_aside_goes_past_the_work_that_kills(
    state: State, verdict: Verdict | None, to: State, becomes: Verdict
) -> None:
    job = replace(JOB, state=state, verdict=verdict, suspicion=Limits().suspicion)
    aside = set_aside(job, Limits())
    assert aside is not None
    assert aside.fault.cls is FaultClass.AGENT
    move = decide(job, aside, Limits())
    assert (move.state, move.verdict, move.wait_seconds) == (to, becomes, 0)


@given(st.integers(0, 20), st.integers(0, 20))
def test_suspicion_grows_before_anything_is_set_aside(suspicion: int, more: int) -> None:
    limits = Limits()
    job, worse = replace(JOB, suspicion=suspicion), replace(JOB, suspicion=suspicion + more)
    assert (set_aside(job, limits) is None) == (suspicion < limits.suspicion)
    trial, longer = probation_seconds(job, limits), probation_seconds(worse, limits)
    assert (trial is None) == (suspicion >= limits.suspicion - 1)  # its last try is alone, however long it takes
    assert longer is None or (trial is not None and trial <= longer)
    assert limits.suspects_from < limits.suspicion


@given(jobs, st.none() | st.floats(0, 1e6), st.floats(0, 1), st.booleans())
def test_an_outage_is_waited_out_for_longer_the_longer_it_lasts(
    job: Job, asked_seconds: float | None, jitter: float, is_told: bool
) -> None:
    limits = Limits()
    move = decide(job, Outage("Ovation", "503", asked_seconds, is_told), limits, jitter)
    assert (move.state, move.attempt, move.waiting_party) == (job.state, job.attempt, "Ovation")
    asked = min(asked_seconds or 0, limits.retry_after_max_seconds)
    assert asked <= move.wait_seconds <= max(asked, limits.backoff_max_seconds)
    longest = decide(job, Outage("Ovation", "503", is_told=is_told), limits, jitter=1).wait_seconds
    most = limits.backoff_max_seconds if is_told else limits.trouble_max_seconds  # told: its return is told too
    assert longest == min(most, max(limits.outage_seconds, job.waiting_seconds))


def test_only_what_may_go_elsewhere_goes_there() -> None:
    job = replace(JOB, state=State.STAGING)
    assert decide(job, NotYet(30, "no room", elsewhere=True), Limits()).elsewhere
    for outcome in (NotYet(30, "no room"), Outage("Ovation", "503"), Done()):
        assert not decide(job, outcome, Limits()).elsewhere
