"""Given what a step found, where the job goes. The only place where that is decided."""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.domain.job import (
    BEFORE_RUNNING,
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
    SetAside,
    State,
    Verdict,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient the agent is. Seconds, except where the name says otherwise."""

    attempts: int = 5
    backoff_seconds: float = 2.0
    backoff_max_seconds: float = 60.0
    outage_seconds: float = 4.0  # the longest first wait for a party that is away
    trouble_max_seconds: float = 20.0  # the longest wait where the party is there, so that nobody tells of its return
    retry_after_max_seconds: float = 600.0  # a party that asks to be left alone for longer is asked all the same
    refused_seconds: float = 60.0  # between tries of a delivery that was refused for good: only a person can help
    node_retries: int = 1  # how often a run that its machine lost is started again
    suspects_from: int = 2  # deaths of the process after which a job is worked at alone
    suspicion: int = 6  # deaths of the process after which a job is set aside
    probation_seconds: float = 10.0  # how long a suspect is alone at first; doubled with every further death


_NEXT = {
    State.QUEUED: State.STAGING,
    State.STAGING: State.LAUNCHING,
    State.LAUNCHING: State.RUNNING,
    State.RUNNING: State.COLLECTING,
    State.COLLECTING: State.REPORTING,
}
_END = {
    None: State.FAILED,
    Verdict.SUCCEEDED: State.SUCCEEDED,
    Verdict.FAILED: State.FAILED,
    Verdict.CANCELLED: State.CANCELLED,
}


def decide(  # noqa: PLR0911 one for each outcome
    job: Job, outcome: Outcome, limits: Limits, jitter: float = 1.0
) -> Move:
    """Return the move that `outcome` of the job's current step leads to.

    `jitter` in 0…1 scales the backoff (full jitter: the caller draws it).

    Before the container runs, a final fault, or attempts used up, ends in collecting what there is. Once it has run,
    delivery is tried until it works: the verdict stands and is not touched by what fails later.

    Raises:
        ValueError: the job is terminal.
    """
    if not TRANSITIONS[job.state]:
        raise ValueError(f"a {job.state} job moves no further")
    match outcome:
        case Done():
            return _advance(job, outcome)
        case NotYet():
            return replace(_stay(job, outcome.seconds, job.attempt, outcome.reason), elsewhere=outcome.elsewhere)
        case Outage():
            wait = max(
                _outage_seconds(job, outcome, limits) * jitter,
                min(outcome.seconds or 0, limits.retry_after_max_seconds),
            )
            reason = f"waiting for {outcome.party}: {outcome.reason}"
            return replace(_stay(job, wait, job.attempt, reason), waiting_party=outcome.party)
        case Failed():
            return _failed(job, outcome, limits, jitter)
        case Lost():
            return _lost(job, outcome, limits)
        case HandedOver():
            stays = _stay(job, 0, job.attempt, outcome.waiting_for)
            return replace(stays, place=outcome.place, resources=outcome.resources)
        case NodeOver():
            return replace(_node_over(job, outcome, limits), elsewhere=True)
        case SetAside():
            return _set_aside(job, outcome)


def set_aside(job: Job, limits: Limits) -> SetAside | None:
    """Return the outcome of a job whose work has ended the agent's process too often to be tried again."""
    if job.suspicion < limits.suspicion:
        return None
    return SetAside(
        Fault(
            FaultClass.AGENT,
            f"The agent's process ended {job.suspicion} times while it worked on this run ({job.state}); it was set"
            " aside, so that other runs go on. Its operator should look into this.",
        )
    )


def probation_seconds(job: Job, limits: Limits) -> float | None:
    """Return how long a suspect is worked at alone, before others may go on beside it.

    None is to its step's end: once more would have it set aside, so it must be known whose doing that is.
    """
    if job.suspicion >= limits.suspicion - 1:
        return None
    return float(limits.probation_seconds * 2 ** max(0, job.suspicion - limits.suspects_from))


def _advance(job: Job, done: Done) -> Move:
    verdict = job.verdict or done.verdict
    state = _END[verdict] if job.state is State.REPORTING else _NEXT[job.state]
    if job.state in BEFORE_RUNNING and done.verdict is not None:
        state = State.COLLECTING  # it was found to be over before it ran
    return Move(
        state=state,
        wait_seconds=0,
        attempt=0,
        launch=job.launch,
        verdict=verdict,
        fault=job.fault or done.fault,
        exit_code=done.exit_code if job.exit_code is None else job.exit_code,
        native_id=done.native_id or job.native_id,
        started_at=job.started_at or done.started_at,
        waiting_for=None,
        resources=done.resources,
    )


def _failed(job: Job, failed: Failed, limits: Limits, jitter: float) -> Move:
    attempt = job.attempt + 1
    before = job.state in BEFORE_RUNNING or job.state is State.RUNNING
    if before and (failed.final or attempt >= limits.attempts):
        return _end_before_delivery(job, failed.fault)
    if failed.final:  # a refused delivery: one try is like the other, and none is told again
        return _stay(job, limits.refused_seconds, job.attempt, failed.fault.message)
    return _stay(job, _backoff_seconds(attempt, limits) * jitter, attempt, failed.fault.message)


def _end_before_delivery(job: Job, fault: Fault) -> Move:
    return Move(
        state=State.COLLECTING,
        wait_seconds=0,
        attempt=0,
        launch=job.launch,
        verdict=job.verdict or Verdict.FAILED,
        fault=job.fault or fault,
        exit_code=job.exit_code,
        native_id=job.native_id,
        started_at=job.started_at,
        waiting_for=None,
    )


def _lost(job: Job, lost: Lost, limits: Limits) -> Move:
    """Start again from staging, whose files are mostly there, as often as the limits say."""
    if job.cancel_requested:
        return replace(_end_before_delivery(job, lost.fault), verdict=job.verdict or Verdict.CANCELLED, fault=job.fault)
    if job.launch > limits.node_retries or State.STAGING not in TRANSITIONS[job.state]:
        return _end_before_delivery(job, lost.fault)
    return _again(job, lost.fault)


def _again(job: Job, fault: Fault) -> Move:
    """Begin anew with staging, as the next launch."""
    return replace(
        _end_before_delivery(job, fault),
        state=State.STAGING,
        launch=job.launch + 1,
        verdict=job.verdict,
        fault=job.fault,
        native_id=None,
        started_at=None,
    )


def _node_over(job: Job, over: NodeOver, limits: Limits) -> Move:
    """Begin anew with another batch job as often as the limits say, while nothing of the run has been delivered.

    Where outputs were still to be delivered they are lost, and the run has not succeeded. What is left to do, the logs
    that were saved and the word to people, needs nothing of the node.
    """
    if job.state is State.REPORTING:
        return _stay(job, 0, job.attempt, over.fault.message)
    if job.state is State.COLLECTING:
        stood = Verdict.FAILED if job.verdict is Verdict.SUCCEEDED else job.verdict
        return replace(_stay(job, 0, 0, over.fault.message), verdict=stood, fault=job.fault or over.fault)
    verdict = job.verdict or (Verdict.CANCELLED if job.cancel_requested else over.verdict)
    if verdict is Verdict.FAILED and over.again and job.launch <= limits.node_retries:
        return _again(job, over.fault)
    fault = None if verdict is Verdict.CANCELLED else over.fault
    return replace(_end_before_delivery(job, over.fault), verdict=verdict, fault=job.fault or fault)


def _set_aside(job: Job, aside: SetAside) -> Move:
    """Skip the work that cannot be done. Where outputs are not delivered, the run has not succeeded."""
    move = _end_before_delivery(job, aside.fault)
    if job.state is State.COLLECTING:
        verdict = Verdict.FAILED if job.verdict is Verdict.SUCCEEDED else move.verdict
        return replace(move, state=State.REPORTING, verdict=verdict)
    if job.state is State.REPORTING:
        return replace(move, state=_END[job.verdict], verdict=job.verdict, fault=job.fault)
    return move


def _stay(job: Job, wait_seconds: float, attempt: int, waiting_for: str) -> Move:
    return Move(
        state=job.state,
        wait_seconds=wait_seconds,
        attempt=attempt,
        launch=job.launch,
        verdict=job.verdict,
        fault=job.fault,
        exit_code=job.exit_code,
        native_id=job.native_id,
        started_at=job.started_at,
        waiting_for=waiting_for,
    )


def _backoff_seconds(attempt: int, limits: Limits) -> float:
    return float(min(limits.backoff_max_seconds, limits.backoff_seconds * 2 ** min(attempt - 1, 16)))


def _outage_seconds(job: Job, outage: Outage, limits: Limits) -> float:
    """Wait about as long again as it has lasted: that is exponential, and needs no count of tries."""
    most = limits.backoff_max_seconds if outage.is_told else limits.trouble_max_seconds
    return min(most, max(limits.outage_seconds, job.waiting_seconds))
