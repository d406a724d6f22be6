"""Claim due jobs, have their steps performed under a lease, and move them: claim, perform, decide, move."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import structlog

from agent import __version__
from agent.db.jobs import Claim, LeaseLost
from agent.domain.decide import Limits, decide, probation_seconds, set_aside
from agent.domain.job import Done, Job, Lost, Move, Outage, Outcome, State
from agent.errors import DatabaseError
from agent.logs import logger
from agent.pipeline.context import Context, Control
from agent.pipeline.perform import HAVE_CIRCUITS, LEASE_SECONDS, perform, within_lease
from agent.pipeline.places import LATER, STAGING, Places
from agent.pipeline.teller import Teller

_IDLE_SECONDS = 2.0
_SEEN_SECONDS = 10.0
_MANY = 1000
_RELEASE_SECONDS = 5.0
_SUSPECTABLE = (State.QUEUED, State.STAGING, State.LAUNCHING, State.COLLECTING, State.REPORTING)


@dataclass(slots=True)
class _Held:
    claim: Claim
    control: Control
    task: asyncio.Task[None]
    since: float
    goes_to: State | None = None  # where it is being moved to under the same lease


class Worker:
    """Moves this agent's share of the jobs, so many at once a stage.

    `place` names the data directory whose files the jobs are; only one worker has it at a time. `lease_seconds` is for
    how long a job stays this worker's after it was last heard of.
    """

    def __init__(
        self,
        context: Context,
        place: str,
        limits: Limits | None = None,
        *,
        lease_seconds: float = LEASE_SECONDS,
        beat: Callable[[], None] = lambda: None,
        guest: bool = False,
    ) -> None:
        self._beat = beat
        self._context = context
        self._lease_seconds = lease_seconds
        self._limits = limits or Limits(node_retries=context.settings.node_retries)
        self._place = place
        self._held: dict[str, _Held] = {}
        self._lost: list[Claim] = []  # dropped while PostgreSQL was away; given back when it returns
        self._wake = asyncio.Event()
        self._stopping = False
        self._admits = not guest
        self._seen_at = float("-inf")
        self._books_at = float("-inf")  # when the books are to be kept next, and what needs no place is claimed
        self._next_at: float | None = None  # when the next job falls due; to be asked for where it is not known
        self._places = Places(context.settings)
        self._suspects = True  # there may be some: the process before this one may have been killed
        self._teller = Teller()
        # What waits for these is to go on: they may have come back while no agent ran.
        self._back = set() if guest else set(HAVE_CIRCUITS)
        self._back_at: dict[str, float] = {}

    @property
    def held(self) -> int:
        """How many jobs are worked at now."""
        return len(self._held)

    def wake(self) -> None:
        """Look for due work now."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Tell a step that this worker performs that the job's end was asked for."""
        if held := self._held.get(job_id):
            held.control.cancelled.set()
        self._wake_for_books()

    async def party_back(self, party: str) -> None:
        """Go on at once with what waits for an outside party that is back."""
        self._back_at[party] = time.monotonic()
        self._back.add(party)
        self._wake_for_books()

    def _wake_for_books(self) -> None:
        self._books_at = float("-inf")
        self.wake()

    async def run(self) -> None:
        """Work until cancelled; then every job is given back as it is."""
        try:
            while True:
                self._beat()
                self._wake.clear()
                seconds = _IDLE_SECONDS
                try:
                    await self._turn()
                    if not self._wake.is_set():
                        seconds = await self._seconds_to_next()
                    self._teller.database(None)
                except DatabaseError as error:
                    self._books_at = float("-inf")
                    self._teller.database(error)
                try:
                    async with asyncio.timeout(seconds):
                        await self._wake.wait()
                except TimeoutError:
                    self._places.anybody_may_wait()  # something is due
                    self._next_at = None
        finally:
            await self._give_back()

    @property
    def admits(self) -> bool:
        """Whether queued jobs are let in."""
        return self._admits

    def admit(self, *, admits: bool) -> None:
        """Let queued jobs in, or none until further notice; what was let in goes on to its end."""
        self._admits = admits
        self.wake()

    async def drain(self, seconds: float, at_once: asyncio.Event) -> None:
        """Claim nothing more; give steps so long to end, or until `at_once`. Containers go on, watched or not."""
        self._stopping = True
        watched = [held for held in self._held.values() if held.claim.job.state is State.RUNNING]
        steps = {held.task for held in self._held.values() if held not in watched}
        for held in watched:
            held.task.cancel()
        await asyncio.gather(*(held.task for held in watched), return_exceptions=True)
        self._lost += [held.claim for held in watched]
        self.wake()
        if not steps:
            return
        logger().info("draining", steps=len(steps), seconds=seconds)
        hurry = asyncio.create_task(at_once.wait())
        until = time.monotonic() + seconds
        while steps and not at_once.is_set() and (left := until - time.monotonic()) > 0:
            await asyncio.wait({*steps, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            steps = {step for step in steps if not step.done()}
        hurry.cancel()

    async def _turn(self) -> None:
        """Claim what there are places for; now and then, see to what no end of a step and no new job tells of."""
        is_full = time.monotonic() >= self._books_at
        if is_full:
            self._places.anybody_may_wait()
            self._books_at = time.monotonic() + _IDLE_SECONDS
            self._next_at = None
            await self._tidy()
        await self._release_lost()
        if self._stopping:
            return
        if is_full:
            await self._claim_free()
        if not await self._has_suspects():
            await self._claim()

    async def _seconds_to_next(self) -> float:
        """Return for how long to sleep. Between two keepings of the books only a worker's own moves change that."""
        if self._next_at is None:
            self._next_at = math.inf
            seconds = await self._context.jobs.seconds_to_next(self._place, max(0.0, self._books_at - time.monotonic()))
            self._falls_due_in(seconds)
        return max(0.0, min(self._next_at, self._books_at) - time.monotonic())

    def _falls_due_in(self, seconds: float) -> None:
        if self._next_at is not None:
            self._next_at = min(self._next_at, time.monotonic() + seconds)

    async def _tidy(self) -> None:
        """Keep the books before work is claimed: who is here, what was dropped, whose lease ran out."""
        jobs = self._context.jobs
        if time.monotonic() - self._seen_at > _SEEN_SECONDS:
            starts = self._seen_at == float("-inf")
            await jobs.agent_seen(self._place, socket.gethostname(), __version__, starts=starts)
            self._seen_at = time.monotonic()
            self._suspects = True  # another agent may have seen the leases run out while this one was asleep
        await self._release_lost()
        while self._back:
            await jobs.wake_waiting(next(iter(self._back)))
            self._back.pop()
        if lapsed := await jobs.lapse_leases(self._limits.suspicion, self._place, self._held):
            logger().warning("leases_ran_out", jobs=lapsed)
            self._suspects = True

    async def _claim_free(self) -> None:
        """Claim what takes no place: those that run, whose watching costs nothing, and those that are not to run."""
        await self._claim_some(_MANY, State.RUNNING)
        self._begin(
            await self._context.jobs.claim_cancelled(
                _MANY, self._lease_seconds, self._place, suspects_from=self._limits.suspects_from
            )
        )

    async def _claim(self) -> None:
        """Claim what there are places for: in later stages, and meanwhile what is to be staged."""
        found = await asyncio.gather(self._claim_due(LATER), self._claim_to_stage(), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException):
                raise error

    async def _claim_to_stage(self) -> None:
        await self._claim_due([STAGING])
        settings, free = self._context.settings, self._places.free(STAGING, self._states())
        if free > 0 and self._admits:
            ahead, suspects_from = settings.max_staging + settings.most_running, self._limits.suspects_from
            self._begin(
                await self._context.jobs.claim_queued(
                    free, self._lease_seconds, self._place, ahead=ahead, suspects_from=suspects_from
                )
            )

    async def _claim_due(self, stages: Collection[str]) -> None:
        """Claim the due jobs that wait for places of these stages, if any may."""
        if wanted := self._places.to_ask_for(stages, self._states()):
            suspects_from = self._limits.suspects_from
            claims = await self._context.jobs.claim_each(
                tuple(wanted.values()), self._lease_seconds, self._place, suspects_from=suspects_from
            )
            self._places.answered(wanted, [claim.job.state for claim in claims])
            self._begin(claims)

    def _states(self) -> list[tuple[State, State]]:
        """Return the state of each job that is held, and the one that it is being moved to."""
        return [(held.claim.job.state, held.goes_to or held.claim.job.state) for held in self._held.values()]

    async def _has_suspects(self) -> bool:
        """Work at jobs that may be ending the process one at a time, and begin nothing beside them, until none is left.

        What has been worked at for a while without harm is left to go on beside them.
        """
        if any(held.control.alone for held in self._held.values()):
            return True
        if not self._suspects:
            return False
        self._suspects = bool(await self._context.jobs.suspects(self._place, self._limits.suspects_from))
        harmless_since = time.monotonic() - self._limits.probation_seconds
        young = any(
            held.since > harmless_since and held.claim.job.state is not State.RUNNING for held in self._held.values()
        )
        if self._suspects and not young:
            await self._claim_some(1, *_SUSPECTABLE, alone=True)
        return self._suspects

    async def _claim_some(self, most: int, *states: State, alone: bool = False) -> None:
        if most > 0:
            suspects_from = self._limits.suspects_from
            self._begin(
                await self._context.jobs.claim(
                    states, most, self._lease_seconds, self._place, alone=alone, suspects_from=suspects_from
                ),
                alone=alone,
            )

    def _begin(self, claims: Collection[Claim], *, alone: bool = False, goes_on: bool = False) -> None:
        if self._stopping or (goes_on and self._suspects):  # that came while PostgreSQL was asked
            self._lost += claims
            self.wake()
            return
        for claim in claims:
            control = Control(alone=alone)
            if claim.job.cancel_requested:
                control.cancelled.set()
            earlier = self._held.get(claim.job.id)
            task = asyncio.create_task(self._hold(claim, control, earlier), name=f"{claim.job.state} {claim.job.id}")
            self._held[claim.job.id] = _Held(claim, control, task, time.monotonic())

    async def _hold(self, claim: Claim, control: Control, earlier: _Held | None = None) -> None:
        job, kept = claim.job, None
        trial = asyncio.create_task(self._trial(claim, control)) if control.alone else None
        with structlog.contextvars.bound_contextvars(
            job_id=job.id, activity_id=job.activity_id, state=str(job.state), attempt=job.attempt
        ):
            try:
                if earlier is not None:
                    await _ended(earlier)
                kept = await self._work(claim, control)
            except LeaseLost as error:
                self._lost.append(claim)
                logger().warning("lease_lost", error=str(error))
            except DatabaseError as error:
                self._lost.append(claim)
                self._teller.database(error)
            except Exception:  # noqa: BLE001 a bug: its lease runs out, so that the job is set aside if that goes on
                logger().exception("move_failed")
            finally:
                if trial is not None:
                    trial.cancel()
                # The job may have been claimed anew as soon as it had moved.
                if (held := self._held.get(job.id)) and held.claim is claim:
                    del self._held[job.id]
        if kept is not None:
            if control.cancelled.is_set():  # asked for since it was moved
                kept = replace(kept, job=replace(kept.job, cancel_requested=True))
            self._begin([kept], goes_on=True)
        elif job.state is State.LAUNCHING:
            self._wake_for_books()  # it may run, which takes no place of its own
        else:
            self.wake()

    async def _trial(self, claim: Claim, control: Control) -> None:
        """Let others go on beside a suspect that has not ended the process for a while."""
        seconds = probation_seconds(claim.job, self._limits)
        if seconds is None:
            return
        await asyncio.sleep(seconds)
        with contextlib.suppress(DatabaseError):
            await self._context.jobs.trust(claim)
        control.alone = False
        self.wake()

    async def _work(self, claim: Claim, control: Control) -> Claim | None:
        """Do a step and move the job; return it where the lease was kept, for the step that comes next."""
        began = time.monotonic()
        outcome: Outcome | None = set_aside(claim.job, self._limits)
        if outcome is None:
            outcome = await perform(self._context, claim, control, self._teller.database, self._lease_seconds)
        control.is_over = True
        job = claim.job
        if job.cancel_requested != control.cancelled.is_set():  # somebody asked meanwhile
            job = replace(job, cancel_requested=control.cancelled.is_set())
        move = decide(job, outcome, self._limits, jitter=random.random())  # noqa: S311 no secret
        note = outcome.note if isinstance(outcome, Done) else None
        if isinstance(outcome, Lost) and move.launch > claim.job.launch:
            note = f"{outcome.fault.message} It is run again."
        progress = control.progress.document()
        keep = None
        if self._goes_on(job, outcome, move, control):
            keep = self._lease_seconds
            self._held[job.id].goes_to = move.state
        else:
            self._places.arrives(move.state)  # whoever comes next does not go past this one
        kept = await within_lease(
            lambda: self._context.jobs.move(claim, move, note=note, done=progress or None, keep_seconds=keep)
        )
        if keep is None:
            self._places.arrives(move.state)  # a claim may have been under way that did not see it yet
            if move.wait_seconds > 0:
                self._falls_due_in(move.wait_seconds)
        if isinstance(outcome, Outage) and self._back_at.get(outcome.party, float("-inf")) > began:
            self._back.add(outcome.party)  # it came back before this job was among those that wait
        seconds = time.monotonic() - began
        self._teller.step(claim, outcome, move, seconds)
        self._context.metrics.step(claim.job, outcome, move, seconds)
        return kept

    def _goes_on(self, job: Job, outcome: Outcome, move: Move, control: Control) -> bool:
        """Say whether a job is worked at on under the same lease, where nothing stands out of line."""
        if not isinstance(outcome, Done) or job.cancel_requested:
            return False
        if control.alone or self._suspects or self._stopping:
            return False
        return self._places.goes_on(job.state, move.state, self._states())

    async def _give_back(self) -> None:
        self._stopping = True
        held = list(self._held.values())
        for each in held:
            each.task.cancel()
        await asyncio.gather(*(each.task for each in held), return_exceptions=True)
        self._lost += [each.claim for each in held]
        with contextlib.suppress(DatabaseError, TimeoutError):
            async with asyncio.timeout(_RELEASE_SECONDS):
                await self._release_lost()
                await self._context.jobs.agent_stopped(self._place)

    async def _release_lost(self) -> None:
        """Give back what is not worked at any more; what another has by now, or what has moved, stays as it is."""
        while self._lost:
            claim = self._lost[0]
            await self._context.jobs.release(claim)
            self._places.anybody_may_wait()
            self._lost.remove(claim)  # others may have come meanwhile


async def _ended(earlier: _Held) -> None:
    """Wait until a step is over whose lease was lost without its noticing: two at once would make everything twice."""
    if not earlier.control.is_over:
        logger().warning("lease_lost", error="it was taken anew while its former step was still under way")
        earlier.task.cancel()
    await asyncio.gather(earlier.task, return_exceptions=True)
