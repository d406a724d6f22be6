"""Given what a step found, where the job goes. The only place where that is decided."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from agent.domain.job import (
    BEFORE_RUNNING,
    TRANSITIONS,
    Done,
    Failed,
    Job,
    Move,
    NotYet,
    Outage,
    Outcome,
    State,
    Verdict,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient the agent is. Seconds, except `attempts`."""

    attempts: int = 5
    backoff_seconds: float = 2.0
    backoff_max_seconds: float = 60.0
    refused_seconds: float = 600.0  # between tries of a delivery that was refused for good: only a person can help


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


def decide(job: Job, outcome: Outcome, now: datetime, limits: Limits, jitter: float = 1.0) -> Move:
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
            return _advance(job, outcome, now)
        case NotYet():
            return _stay(job, now + timedelta(seconds=outcome.seconds), job.attempt, outcome.reason)
        case Outage():
            wait = _backoff(job.attempt + 3, limits, jitter)
            return _stay(job, now + wait, job.attempt, f"waiting for {outcome.party}: {outcome.reason}")
        case Failed():
            return _failed(job, outcome, now, limits, jitter)


def _advance(job: Job, done: Done, now: datetime) -> Move:
    verdict = job.verdict or done.verdict
    state = _END[verdict] if job.state is State.REPORTING else _NEXT[job.state]
    if job.state in BEFORE_RUNNING and done.verdict is not None:
        state = State.COLLECTING  # it was found to be over before it ran
    return Move(
        state=state,
        due_at=now,
        attempt=0,
        verdict=verdict,
        fault=job.fault or done.fault,
        exit_code=done.exit_code if job.exit_code is None else job.exit_code,
        native_id=done.native_id or job.native_id,
        started_at=job.started_at or done.started_at,
        waiting_for=None,
    )


def _failed(job: Job, failed: Failed, now: datetime, limits: Limits, jitter: float) -> Move:
    attempt = job.attempt + 1
    before = job.state in BEFORE_RUNNING or job.state is State.RUNNING
    if before and (failed.final or attempt >= limits.attempts):
        return Move(
            state=State.COLLECTING,
            due_at=now,
            attempt=0,
            verdict=job.verdict or Verdict.FAILED,
            fault=job.fault or failed.fault,
            exit_code=job.exit_code,
            native_id=job.native_id,
            started_at=job.started_at,
            waiting_for=None,
        )
    wait = timedelta(seconds=limits.refused_seconds) if failed.final else _backoff(attempt, limits, jitter)
    return _stay(job, now + wait, attempt, failed.fault.message)


def _stay(job: Job, due_at: datetime, attempt: int, waiting_for: str) -> Move:
    return Move(
        state=job.state,
        due_at=due_at,
        attempt=attempt,
        verdict=job.verdict,
        fault=job.fault,
        exit_code=job.exit_code,
        native_id=job.native_id,
        started_at=job.started_at,
        waiting_for=waiting_for,
    )


def _backoff(attempt: int, limits: Limits, jitter: float) -> timedelta:
    ceiling = min(limits.backoff_max_seconds, limits.backoff_seconds * 2 ** min(attempt - 1, 16))
    return timedelta(seconds=ceiling * jitter)
