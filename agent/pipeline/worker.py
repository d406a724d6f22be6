"""Claim due jobs, have their steps performed under a lease, and move them: claim, perform, decide, move."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import structlog

from agent import __version__
from agent.db.jobs import Claim, LeaseLost
from agent.domain.decide import Limits, decide, probation_seconds, set_aside
from agent.domain.job import Done, Failed, Lost, Move, NotYet, Outage, Outcome, SetAside, State
from agent.errors import DatabaseError
from agent.logs import logger
from agent.pipeline.context import Context, Control
from agent.pipeline.perform import HAVE_CIRCUITS, LEASE_SECONDS, perform, within_lease

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


class Worker:
    """Moves this agent's share of the jobs, so many at once a stage.

    `place` names the data directory whose files the jobs are; only one worker has it at a time. `lease_seconds` is for
    how long a job stays this worker's after it was last heard of.
    """

    def __init__(
        self, context: Context, place: str, limits: Limits | None = None, *, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self._context = context
        self._lease_seconds = lease_seconds
        self._limits = limits or Limits(node_retries=context.settings.node_retries)
        self._place = place
        self._held: dict[str, _Held] = {}
        self._lost: list[Claim] = []  # dropped while PostgreSQL was away; given back when it returns
        self._wake = asyncio.Event()
        self._stopping = False
        self._seen_at = float("-inf")
        self._suspects = True  # there may be some: the process before this one may have been killed
        self._database_away_since: float | None = None
        self._away: dict[str, float] = {}
        self._back = set(HAVE_CIRCUITS)  # what waits for these is to go on; they may have come back while no agent ran
        self._back_at: dict[str, float] = {}

    def wake(self) -> None:
        """Look for due work now."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Tell a step that this worker performs that the job's end was asked for."""
        if held := self._held.get(job_id):
            held.control.cancelled.set()
        self.wake()

    async def party_back(self, party: str) -> None:
        """Go on at once with what waits for an outside party that is back."""
        self._back_at[party] = time.monotonic()
        self._back.add(party)
        self.wake()

    async def run(self) -> None:
        """Work until cancelled; then every job is given back as it is."""
        try:
            while True:
                self._wake.clear()
                seconds = _IDLE_SECONDS
                try:
                    await self._tidy()
                    if not self._stopping:
                        await self._claim()
                    seconds = await self._context.jobs.seconds_to_next(self._place, _IDLE_SECONDS)
                    self._database(away=None)
                except DatabaseError as error:
                    self._database(away=error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._wake.wait()
        finally:
            await self._give_back()

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

    async def _claim(self) -> None:
        settings = self._context.settings
        # Those that run come first: watching costs nothing, and each one takes a place from those to be launched.
        await self._claim_some(_MANY, State.RUNNING)
        # Neither does it cost anything to end what has not run yet, however many places are taken.
        self._begin(
            await self._context.jobs.claim_cancelled(
                _MANY, self._lease_seconds, self._place, suspects_from=self._limits.suspects_from
            )
        )
        if await self._has_suspects():
            return
        running = self._count(State.RUNNING, State.LAUNCHING)
        await self._claim_some(settings.max_running - running, State.LAUNCHING)
        collecting = self._count(State.COLLECTING, State.REPORTING)
        await self._claim_some(settings.max_collecting - collecting, State.COLLECTING, State.REPORTING)
        staging = self._count(State.QUEUED, State.STAGING)
        await self._claim_some(settings.max_staging - staging, State.STAGING)
        free = settings.max_staging - self._count(State.QUEUED, State.STAGING)
        if free > 0:
            ahead = settings.max_staging + settings.max_running
            claims = await self._context.jobs.claim_queued(
                free, self._lease_seconds, self._place, ahead=ahead, suspects_from=self._limits.suspects_from
            )
            self._begin(claims)

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

    def _count(self, *states: State) -> int:
        return sum(held.claim.job.state in states for held in self._held.values())

    async def _claim_some(self, most: int, *states: State, alone: bool = False) -> None:
        if most > 0:
            suspects_from = self._limits.suspects_from
            self._begin(
                await self._context.jobs.claim(
                    states, most, self._lease_seconds, self._place, alone=alone, suspects_from=suspects_from
                ),
                alone=alone,
            )

    def _begin(self, claims: Collection[Claim], *, alone: bool = False) -> None:
        if self._stopping:  # the signal came while PostgreSQL looked for work
            self._lost += claims
            self.wake()
            return
        for claim in claims:
            control = Control(alone=alone)
            if claim.job.cancel_requested:
                control.cancelled.set()
            task = asyncio.create_task(self._hold(claim, control), name=f"{claim.job.state} {claim.job.id}")
            self._held[claim.job.id] = _Held(claim, control, task, time.monotonic())

    async def _hold(self, claim: Claim, control: Control) -> None:
        job = claim.job
        trial = asyncio.create_task(self._trial(claim, control)) if control.alone else None
        with structlog.contextvars.bound_contextvars(
            job_id=job.id, activity_id=job.activity_id, state=str(job.state), attempt=job.attempt
        ):
            try:
                await self._work(claim, control)
            except LeaseLost as error:
                self._lost.append(claim)
                logger().warning("lease_lost", error=str(error))
            except DatabaseError as error:
                self._lost.append(claim)
                self._database(away=error)
            except Exception:  # noqa: BLE001 a bug: its lease runs out, so that the job is set aside if that goes on
                logger().exception("move_failed")
            finally:
                if trial is not None:
                    trial.cancel()
                # The job may have been claimed anew as soon as it had moved.
                if (held := self._held.get(job.id)) and held.claim is claim:
                    del self._held[job.id]
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

    async def _work(self, claim: Claim, control: Control) -> None:
        began = time.monotonic()
        outcome: Outcome | None = set_aside(claim.job, self._limits)
        if outcome is None:
            outcome = await perform(
                self._context, claim, control, lambda error: self._database(away=error), self._lease_seconds
            )
        job = replace(claim.job, cancel_requested=control.cancelled.is_set())  # somebody may have asked meanwhile
        move = decide(job, outcome, self._limits, jitter=random.random())  # noqa: S311 no secret
        note = outcome.note if isinstance(outcome, Done) else None
        if isinstance(outcome, Lost) and move.launch > claim.job.launch:
            note = f"{outcome.fault.message} It is run again."
        progress = asdict(control.progress) if any(asdict(control.progress).values()) else None
        await within_lease(lambda: self._context.jobs.move(claim, move, note=note, done=progress))
        if isinstance(outcome, Outage) and self._back_at.get(outcome.party, float("-inf")) > began:
            self._back.add(outcome.party)  # it came back before this job was among those that wait
        self._tell(claim, outcome, move, time.monotonic() - began)

    def _tell(self, claim: Claim, outcome: Outcome, move: Move, seconds: float) -> None:
        """One line a step; an outage is told when it begins and when it ends, and not by every job that waits."""
        self._tell_of_parties(claim, outcome)
        if isinstance(outcome, NotYet):
            return
        line: dict[str, object] = {
            "outcome": type(outcome).__name__.lower(),
            "next": str(move.state),
            "seconds": round(seconds, 3),
            **({"verdict": str(move.verdict)} if move.verdict else {}),
            **({"waiting_for": move.waiting_for} if move.waiting_for else {}),
            **({"fault": str(move.fault.cls), "message": move.fault.message} if move.fault else {}),
        }
        if isinstance(outcome, SetAside):
            logger().error("step", **line)
        elif _is_told(claim, outcome, move) or (isinstance(outcome, Outage) and outcome.party in self._away):
            logger().debug("step", **line)
        else:
            logger().info("step", **line)

    def _tell_of_parties(self, claim: Claim, outcome: Outcome) -> None:
        if isinstance(outcome, Outage):
            if outcome.party not in HAVE_CIRCUITS and outcome.party not in self._away:
                self._away[outcome.party] = time.monotonic()
                logger().warning("party_away", party=outcome.party, reason=outcome.reason)
            return
        since = self._away.pop(claim.job.waiting_party or "", None)
        if since is not None:
            logger().info("party_back", party=claim.job.waiting_party, seconds=round(time.monotonic() - since, 1))

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
            self._lost.remove(claim)  # others may have come meanwhile

    def _database(self, *, away: DatabaseError | None) -> None:
        """Say once that PostgreSQL is away, and once that it is back."""
        if away is not None and self._database_away_since is None:
            logger().warning("database_away", error=str(away))
            self._database_away_since = time.monotonic()
        elif away is None and self._database_away_since is not None:
            logger().info("database_back", seconds=round(time.monotonic() - self._database_away_since, 1))
            self._database_away_since = None


def _is_told(claim: Claim, outcome: Outcome, move: Move) -> bool:
    """Say whether the log has had this: an outage that was told, or the same trouble of the same job as before."""
    if isinstance(outcome, Outage):
        return outcome.is_told or claim.job.waiting_party == outcome.party
    return isinstance(outcome, Failed) and outcome.final and claim.job.waiting_for == move.waiting_for
