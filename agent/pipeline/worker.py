"""Claim due jobs, have their steps performed under a lease, and move them: claim, perform, decide, move."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import structlog

from agent.db.jobs import Claim, LeaseLost
from agent.domain.decide import Limits, decide
from agent.domain.job import Done, Failed, Fault, FaultClass, NotYet, Outage, Outcome, State, Verdict
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
from agent.pipeline.launch import launch
from agent.pipeline.report import report
from agent.pipeline.stage import stage
from agent.pipeline.watch import watch

LEASE_SECONDS = 15.0
_PROGRESS_SECONDS = 0.5
_IDLE_SECONDS = 2.0
_MANY = 1000
_DRAIN_SECONDS = 10.0


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
_ENDS_AT_ONCE = frozenset({State.QUEUED, State.STAGING})


@dataclass(slots=True)
class _Held:
    claim: Claim
    control: Control
    task: asyncio.Task[None]


class Worker:
    """Moves this agent's share of the jobs, so many at once a stage."""

    def __init__(self, context: Context, holder: str, limits: Limits | None = None) -> None:
        self._context = context
        self._limits = limits or Limits()
        self._holder = holder
        self._held: dict[str, _Held] = {}
        self._wake = asyncio.Event()
        self._database_away = False

    def wake(self) -> None:
        """Look for due work now."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Tell a step that this worker performs that the job's end was asked for."""
        if held := self._held.get(job_id):
            held.control.cancelled.set()
        self.wake()

    async def run(self) -> None:
        """Work until cancelled; then give every job back as it is. Containers go on."""
        try:
            while True:
                self._wake.clear()
                seconds = _IDLE_SECONDS
                try:
                    await self._claim()
                    seconds = await self._context.jobs.seconds_to_next(_IDLE_SECONDS)
                    self._database(away=None)
                except DatabaseError as error:
                    self._database(away=error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), seconds)
        finally:
            await self._drain()

    async def _claim(self) -> None:
        settings = self._context.settings
        # Those that run come first: watching costs nothing, and each one takes a place from those to be launched.
        await self._claim_some(_MANY, State.RUNNING)
        running = self._count(State.RUNNING, State.LAUNCHING)
        await self._claim_some(settings.max_running - running, State.LAUNCHING)
        collecting = self._count(State.COLLECTING, State.REPORTING)
        await self._claim_some(settings.max_collecting - collecting, State.COLLECTING, State.REPORTING)
        staging = self._count(State.QUEUED, State.STAGING)
        await self._claim_some(settings.max_staging - staging, State.QUEUED, State.STAGING)

    def _count(self, *states: State) -> int:
        return sum(held.claim.job.state in states for held in self._held.values())

    async def _claim_some(self, most: int, *states: State) -> None:
        if most <= 0:
            return
        for claim in await self._context.jobs.claim(states, most, LEASE_SECONDS, self._holder):
            control = Control()
            if claim.job.cancel_requested:
                control.cancelled.set()
            task = asyncio.create_task(self._hold(claim, control), name=f"{claim.job.state} {claim.job.id}")
            self._held[claim.job.id] = _Held(claim, control, task)

    async def _hold(self, claim: Claim, control: Control) -> None:
        job = claim.job
        with structlog.contextvars.bound_contextvars(
            job_id=job.id, activity_id=job.activity_id, state=str(job.state), attempt=job.attempt
        ):
            try:
                await self._work(claim, control)
            except LeaseLost:
                logger().warning("lease_lost")
            except DatabaseError as error:
                self._database(away=error)
            finally:
                self._held.pop(job.id, None)
                self.wake()

    async def _work(self, claim: Claim, control: Control) -> None:
        began = time.monotonic()
        outcome = await self._perform(claim, control)
        now = datetime.now(UTC)
        move = decide(claim.job, outcome, now, self._limits, jitter=random.random())  # noqa: S311 no secret
        note = outcome.note if isinstance(outcome, Done) else None
        progress = asdict(control.progress) if any(asdict(control.progress).values()) else None
        await self._context.jobs.move(claim, move, note=note, done=progress)
        if isinstance(outcome, NotYet):
            return
        logger().info(
            "step",
            outcome=type(outcome).__name__.lower(),
            next=str(move.state),
            seconds=round(time.monotonic() - began, 3),
            **({"verdict": str(move.verdict)} if move.verdict else {}),
            **({"waiting_for": move.waiting_for} if move.waiting_for else {}),
            **({"fault": str(move.fault.cls), "message": move.fault.message} if move.fault else {}),
        )

    async def _perform(self, claim: Claim, control: Control) -> Outcome:
        """Perform the step while its lease is kept; lost leases and shutdowns end it."""
        if control.cancelled.is_set() and claim.job.state in _ENDS_AT_ONCE:
            return Done(verdict=Verdict.CANCELLED)
        step = asyncio.create_task(self._outcome(claim, control))
        keeper = asyncio.create_task(self._keep(claim, control))
        cancelled = asyncio.create_task(control.cancelled.wait())
        ends_at_once = {cancelled} if claim.job.state in _ENDS_AT_ONCE else set()
        try:
            await asyncio.wait({step, keeper, *ends_at_once}, return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                return step.result()
            if keeper.done():
                keeper.result()
            return Done(verdict=Verdict.CANCELLED)
        finally:
            for task in (step, keeper, cancelled):
                task.cancel()
            await asyncio.gather(step, keeper, cancelled, return_exceptions=True)

    async def _keep(self, claim: Claim, control: Control) -> None:
        """Renew the lease and write the progress down until cancelled; raise when the lease is lost."""
        renewed = time.monotonic()
        written: Mapping[str, object] = {}
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            try:
                progress = asdict(control.progress)
                if progress != written and any(progress.values()):
                    await self._context.jobs.progress(claim, progress)
                    written = progress
                if time.monotonic() - renewed > LEASE_SECONDS / 3:
                    if await self._context.jobs.renew(claim, LEASE_SECONDS):
                        control.cancelled.set()
                    renewed = time.monotonic()
            except LeaseLost:
                raise
            except DatabaseError as error:
                self._database(away=error)
                if time.monotonic() - renewed > LEASE_SECONDS:
                    raise LeaseLost("PostgreSQL was away for longer than the lease") from None

    async def _outcome(self, claim: Claim, control: Control) -> Outcome:
        """Perform the step and turn what it raises into an outcome; here and nowhere else."""
        try:
            return await STEPS[claim.job.state](self._context, claim, control)
        except DatabaseError:
            raise
        except AgentError as error:
            return _expected(error)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                return Outage("disk space", f"{error.strerror}: {self._context.settings.data_dir}")
            logger().exception("step_failed")
            return Failed(Fault(FaultClass.NODE, f"{type(error).__name__}: {error.strerror}"), final=False)
        except Exception as error:  # noqa: BLE001 a bug: loud in the log, and the other jobs go on
            logger().exception("step_failed")
            return Failed(Fault(FaultClass.AGENT, f"the agent failed: {type(error).__name__}"), final=False)

    async def _drain(self) -> None:
        held = list(self._held.values())
        for each in held:
            each.task.cancel()
        await asyncio.gather(*(each.task for each in held), return_exceptions=True)
        for each in held:
            with contextlib.suppress(DatabaseError, TimeoutError):
                await asyncio.wait_for(self._context.jobs.release(each.claim), _DRAIN_SECONDS)

    def _database(self, *, away: DatabaseError | None) -> None:
        """Say once that PostgreSQL is away, and once that it is back."""
        if away is not None and not self._database_away:
            logger().warning("database_away", error=str(away))
        elif away is None and self._database_away:
            logger().info("database_back")
        self._database_away = away is not None


def _expected(error: AgentError) -> Outcome:
    """Say what an error of an outside party means: wait it out, try again, or give up."""
    parties = {
        OvationUnavailable: "Ovation",
        StorageUnavailable: "the object store",
        ExecutorUnavailable: "the container runtime",
    }
    for kind, party in parties.items():
        if isinstance(error, kind):
            return Outage(party, str(error))
    cls = FaultClass.IMAGE if isinstance(error, ImageError) else FaultClass.PLATFORM
    return Failed(Fault(cls, str(error)), final=not error.transient)
