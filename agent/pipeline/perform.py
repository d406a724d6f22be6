"""Perform one step under its lease, and turn what came of it, or what it raised, into an outcome."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from agent.db.jobs import Claim, LeaseLost
from agent.domain.job import Done, Failed, Fault, FaultClass, Outage, Outcome, State, Verdict
from agent.errors import (
    AgentError,
    DatabaseError,
    ExecutorUnavailable,
    ImageError,
    OvationUnavailable,
    StorageUnavailable,
)
from agent.logs import logger
from agent.pipeline.collect import collect
from agent.pipeline.context import Context, Control, Step
from agent.pipeline.hand_over import hand_over
from agent.pipeline.launch import launch
from agent.pipeline.progress import Meter
from agent.pipeline.report import report
from agent.pipeline.stage import stage
from agent.pipeline.watch import watch

_T = TypeVar("_T")

LEASE_SECONDS = 15.0
OVATION = "Ovation"
OBJECT_STORE = "the object store"
RUNTIME = "the container runtime"
DISK = "disk space"
HAVE_CIRCUITS = frozenset({OVATION, OBJECT_STORE})
"""The outside parties whose coming and going `agent.adapters.circuit` tells."""

_PROGRESS_SECONDS = 0.5
_WATCH_SECONDS = 2.0  # a thousand containers may be watched, and there is little to tell of them
_ENDS_AT_ONCE = frozenset({State.QUEUED, State.STAGING})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


async def admit(context: Context, claim: Claim, control: Control) -> Outcome:
    """Let a queued job in: its place among those that stage is free, or it would not have been claimed."""
    del context, claim, control
    return Done()


STEPS: Mapping[State, Step] = {
    State.QUEUED: admit,
    State.STAGING: stage,
    State.LAUNCHING: launch,
    State.RUNNING: watch,
    State.COLLECTING: collect,
    State.REPORTING: report,
}


async def perform(
    context: Context,
    claim: Claim,
    control: Control,
    on_database: Callable[[DatabaseError], None],
    lease_seconds: float = LEASE_SECONDS,
) -> Outcome:
    """Perform the step while its lease is kept.

    Raises:
        LeaseLost: another worker may hold the job by now; what the step found out does not count.
        DatabaseError: PostgreSQL is away.
    """
    ends_at_once = claim.job.state in _ENDS_AT_ONCE
    if control.cancelled.is_set() and ends_at_once:
        return Done(verdict=Verdict.CANCELLED)
    step = asyncio.create_task(_outcome(context, claim, control), name=f"step {claim.job.id}")
    tasks: set[asyncio.Task[Any]] = {step}
    if ends_at_once:
        tasks.add(asyncio.create_task(control.cancelled.wait()))
    try:
        ended, _ = await asyncio.wait(tasks, timeout=_PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not ended:  # most steps are over by now, and their lease needs no keeping
            keeping = _keep(context, claim, control, on_database, lease_seconds)
            keeper = asyncio.create_task(keeping, name=f"lease {claim.job.id}")
            tasks.add(keeper)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if keeper.done() and not step.done():
                keeper.result()
        return step.result() if step.done() else Done(verdict=Verdict.CANCELLED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within_lease(write: Callable[[], Awaitable[_T]], seconds: float = LEASE_SECONDS * 2 / 3) -> _T:
    """Write what a step came to, again while PostgreSQL is away for a moment: else the step would be done again.

    Raises:
        LeaseLost: another worker holds the job; or it was written although the answer was lost.
        DatabaseError: PostgreSQL is away for longer.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return await write()
        except LeaseLost:
            raise
        except DatabaseError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(_PROGRESS_SECONDS)


async def _keep(
    context: Context,
    claim: Claim,
    control: Control,
    on_database: Callable[[DatabaseError], None],
    lease_seconds: float,
) -> None:
    """Renew the lease and write the progress down until cancelled; raise when the lease is lost."""
    renewed = time.monotonic() - _PROGRESS_SECONDS  # that long the step has gone on by now
    meter = Meter(control.progress)
    is_watched = claim.job.state is State.RUNNING
    written = claim.job.progress if is_watched else {}  # a step that begins anew has nothing to tell yet
    pause = min(_WATCH_SECONDS, lease_seconds / 6) if is_watched else _PROGRESS_SECONDS
    while True:
        try:
            if time.monotonic() - renewed > lease_seconds / 3:
                asked_at = time.monotonic()
                if await context.jobs.renew(claim, lease_seconds):
                    control.cancelled.set()
                renewed = asked_at
            progress = meter.read(time.monotonic())
            if progress != written:
                await context.jobs.progress(claim, progress)
                written = progress
        except LeaseLost:
            raise
        except DatabaseError as error:
            on_database(error)
            if time.monotonic() - renewed > lease_seconds:
                raise LeaseLost("PostgreSQL was away for longer than the lease") from None
        await asyncio.sleep(pause)


async def _outcome(context: Context, claim: Claim, control: Control) -> Outcome:
    """Perform the step and turn what it raises into an outcome; here and nowhere else."""
    try:
        hands_over = context.hands_over and claim.job.state is State.STAGING
        step = hand_over if hands_over else STEPS[claim.job.state]
        return await step(context, claim, control)
    except DatabaseError:
        raise
    except AgentError as error:
        return _expected(error)
    except OSError as error:
        if error.errno in _NO_ROOM:
            return Outage(DISK, f"{error.strerror} on the agent's disk")
        logger().exception("step_failed")
        return Failed(Fault(FaultClass.NODE, f"{type(error).__name__}: {error.strerror}"), final=False)
    except Exception as error:  # noqa: BLE001 a bug: loud in the log, and the other jobs go on
        logger().exception("step_failed")
        return Failed(Fault(FaultClass.AGENT, f"the agent failed: {type(error).__name__}"), final=False)


def _expected(error: AgentError) -> Outcome:
    """Say what an error of an outside party means: wait it out, try again, or give up."""
    parties = {OvationUnavailable: OVATION, StorageUnavailable: OBJECT_STORE, ExecutorUnavailable: RUNTIME}
    for kind, party in parties.items():
        if isinstance(error, kind):
            seconds, is_told = getattr(error, "retry_after_seconds", None), getattr(error, "away", False)
            return Outage(getattr(error, "party", None) or party, str(error), seconds=seconds, is_told=is_told)
    cls = FaultClass.IMAGE if isinstance(error, ImageError) else FaultClass.PLATFORM
    return Failed(Fault(cls, str(error)), final=not error.transient)
