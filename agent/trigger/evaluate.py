"""Look at what may have changed: read it from Ovation, judge it, make a job or keep the reason why not."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from agent.adapters.ovation import Ovation
from agent.db.watched import Watched, WatchList
from agent.domain.activity import Activity, NotReady, history, readiness
from agent.domain.webhook import Hint
from agent.errors import DatabaseError, OvationError, OvationNotFound, OvationUnavailable
from agent.logs import logger
from agent.settings import Settings

_AT_ONCE = 8
_LEASE_SECONDS = 60.0
_LEAVE_SECONDS = 5.0
_IDLE_SECONDS = 2.0
_UPLOAD_LOOK_SECONDS = 15.0
_OUTAGE_LOOK_MAX_SECONDS = 60.0
# Where Ovation is there and this one look fails, nobody calls when it would succeed.
_TROUBLE_LOOK_SECONDS = 4.0
_TROUBLE_LOOK_MAX_SECONDS = 20.0


class Evaluator:
    """Looks at due entities, several at once; at none while Ovation is away."""

    def __init__(
        self,
        settings: Settings,
        watch_list: WatchList,
        ovation: Ovation,
        holder: str,
        on_job: Callable[[], None] = lambda: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._beat = beat
        self._holder = holder
        self._settings = settings
        self._watch_list = watch_list
        self._ovation = ovation
        self._on_job = on_job
        self._wake = asyncio.Event()
        self._looks: dict[asyncio.Task[None], str] = {}  # and at which entity
        self._ovation_is_back = True  # it may have come back while no agent ran
        ovation.on_back(self.ovation_is_back)

    def wake(self) -> None:
        """Look for due entities now."""
        self._wake.set()

    async def ovation_is_back(self) -> None:
        """Look at once at what waits for Ovation."""
        self._ovation_is_back = True
        self.wake()

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                self._beat()
                self._wake.clear()
                seconds = _IDLE_SECONDS
                with contextlib.suppress(DatabaseError):  # the worker tells of it, once
                    if not self._ovation.away:
                        seconds = await self._look_around()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(seconds, 0.01)):
                        await self._wake.wait()
        finally:
            for look in self._looks:
                look.cancel()
            await asyncio.gather(*self._looks, return_exceptions=True)
            with contextlib.suppress(DatabaseError, TimeoutError):
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await self._watch_list.leave(self._holder)

    async def _look_around(self) -> float:
        """Begin what is due, as far as there is room, and return how long nothing more will be, in seconds."""
        if self._ovation_is_back:
            self._ovation_is_back = False
            try:
                await self._watch_list.looks_waiting_due()
            except DatabaseError:
                self._ovation_is_back = True
                raise
        free = _AT_ONCE - len(self._looks)
        held = self._looks.values()
        for watched in await self._watch_list.claim(free, _LEASE_SECONDS, self._holder, held) if free else []:
            self._begin(watched)
        return await self._watch_list.seconds_to_next(_IDLE_SECONDS) if len(self._looks) < _AT_ONCE else _IDLE_SECONDS

    def _begin(self, watched: Watched) -> None:
        look = asyncio.create_task(self._look(watched), name=f"look at {watched.entity_id}")
        self._looks[look] = watched.entity_id
        look.add_done_callback(self._looks.pop)
        look.add_done_callback(lambda _: self.wake())

    async def _look(self, watched: Watched) -> None:
        try:
            if watched.entity_type == "Revision":
                await self._look_at_revision(watched)
            else:
                await self._look_at_activity(watched)
        except OvationUnavailable as error:
            await self._wait_for_ovation(watched, error)
        except OvationError as error:
            await self._later(watched, str(error), None)
        except DatabaseError:
            return  # it is claimed again, as what this agent no longer holds
        except Exception:  # noqa: BLE001 a bug: loud in the log, and the other Activities go on
            logger().exception("look_failed", entity_id=watched.entity_id)
            await self._later(watched, "the agent failed while it looked at this", _OUTAGE_LOOK_MAX_SECONDS)

    async def _wait_for_ovation(self, watched: Watched, error: OvationUnavailable) -> None:
        """Look again with full jitter; an outage of all of Ovation is told once, and not by every look."""
        most = min(_TROUBLE_LOOK_MAX_SECONDS, _TROUBLE_LOOK_SECONDS * 2 ** min(watched.attempt, 8))
        most = _OUTAGE_LOOK_MAX_SECONDS if error.away else most
        wait = max(most * random.random(), error.retry_after_seconds or 0.0)  # noqa: S311 no secret
        first = not error.away and watched.attempt == 0
        await self._later(watched, f"waiting for Ovation: {error}", wait, tell=first)
        if error.away and not self._ovation.away:
            await self.ovation_is_back()  # it came back before this look was among those that wait

    async def _later(self, watched: Watched, reason: str, seconds: float | None, *, tell: bool = True) -> None:
        due_at = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        if tell:
            logger().warning("not_judged", entity_id=watched.entity_id, reason=reason)
        with contextlib.suppress(DatabaseError):
            await self._watch_list.judged(watched, reasons=(reason,), due_at=due_at, attempt=watched.attempt + 1)

    async def _look_at_revision(self, watched: Watched) -> None:
        """A Revision changed: have the Activities that use it looked at."""
        for organization in self._organizations(watched):
            with contextlib.suppress(OvationNotFound):
                activities = await self._ovation.activities_of(organization, watched.entity_id)
                hints = [Hint(activity_id, "Activity", organization) for activity_id in activities]
                await self._watch_list.judged(watched, organization=organization, more=hints)
                return
        await self._watch_list.judged(watched, reasons=(_nowhere(self._organizations(watched)),))

    async def _look_at_activity(self, watched: Watched) -> None:
        activity = await self._read(watched)
        if activity is None:
            await self._watch_list.judged(watched, reasons=(_nowhere(self._organizations(watched)),))
            return
        before = watched.history
        if before is None:
            before = history(activity, await self._watch_list.installed_at())
        before -= watched.gained  # somebody told of these: they are a change, however old they are
        live = await self._watch_list.live(activity.id)
        if live is not None:
            reason = f"run {live.run} is under way; what changed is judged when it has ended"
            await self._judged(watched, activity, (reason,), before)
            return
        ran = await self._watch_list.ran(activity.id)
        suffixes = self._settings.agent.image_suffixes
        judgement = readiness(activity, suffixes, ran, history=before)
        if isinstance(judgement, NotReady):
            logger().info("activity_not_ready", activity_id=activity.id, reasons=list(judgement.reasons))
            again = _UPLOAD_LOOK_SECONDS if judgement.waiting else None
            await self._judged(watched, activity, judgement.reasons, before, again)
            return
        job, made = await self._watch_list.start(activity, judgement.plan, watched.trigger)
        if made:
            logger().info("job_made", job_id=job.id, activity_id=activity.id, run=job.run, image=job.plan.image.name)
            self._on_job()
        await self._judged(watched, activity, (), before)

    async def _judged(
        self,
        watched: Watched,
        activity: Activity,
        reasons: Sequence[str],
        before: frozenset[str],
        again_seconds: float | None = None,
    ) -> None:
        due_at = None if again_seconds is None else datetime.now(UTC) + timedelta(seconds=again_seconds)
        await self._watch_list.judged(
            watched,
            reasons=reasons,
            due_at=due_at,
            organization=activity.organization,
            history=before,
        )

    async def _read(self, watched: Watched) -> Activity | None:
        for organization in self._organizations(watched):
            with contextlib.suppress(OvationNotFound):
                return await self._ovation.activity(organization, watched.entity_id)
        return None

    def _organizations(self, watched: Watched) -> Sequence[int]:
        return self._settings.ovation.organizations if watched.organization is None else (watched.organization,)


def _nowhere(organizations: Sequence[int]) -> str:
    listed = ", ".join(map(str, organizations))
    return f"not found in organization {listed}, or not for the agent's account"
