"""Find what no webhook told: walk the watched organizations' Activities now and then.

A walk is one call an organization: the list of its Activities with the time of each one's last change. What is new or
changed since the last walk is looked at, as after a webhook. Ovation does not promise that a new link changes that
time, so each walk also has some Activities looked at that nobody has looked at for long: half of them among those that
changed within a week, half of all. Several agents on one database share the walks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from agent.adapters.ovation import Ovation
from agent.db.reconciliations import Reconciliations, Seen, Walk
from agent.db.watched import WatchList
from agent.domain.activity import is_recent
from agent.errors import DatabaseError, OvationError, OvationUnavailable
from agent.logs import logger
from agent.settings import Settings

_LEASE_SECONDS = 120.0
_BATCH = 1000
_RETRY_SECONDS = 30.0
_LEAVE_SECONDS = 5.0


class Reconciler:
    """Walks each watched organization when that is due."""

    def __init__(
        self,
        settings: Settings,
        reconciliations: Reconciliations,
        watch_list: WatchList,
        ovation: Ovation,
        on_due: Callable[[], None] = lambda: None,
        holder: str | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._beat = beat
        self._settings = settings
        self._reconciliations = reconciliations
        self._watch_list = watch_list
        self._ovation = ovation
        self._holder = holder
        self._on_due = on_due
        self._wake = asyncio.Event()
        ovation.on_back(self.ovation_is_back)

    async def ovation_is_back(self) -> None:
        """Walk at once where that fell due meanwhile."""
        self._wake.set()

    async def run(self) -> None:
        """Walk at start and then every `reconcile_seconds`, while Ovation is there, until cancelled."""
        every = self._settings.agent.reconcile_seconds
        with contextlib.suppress(DatabaseError):
            await self._reconciliations.make_due()
        try:
            while True:
                self._beat()
                self._wake.clear()
                for organization in self._settings.ovation.organizations:
                    with contextlib.suppress(DatabaseError):  # the worker tells of it, once
                        if not self._ovation.away and (
                            walk := await self._reconciliations.claim(organization, _LEASE_SECONDS, self._holder)
                        ):
                            await self._walk(walk)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(every, _RETRY_SECONDS)):
                        await self._wake.wait()
        finally:
            with contextlib.suppress(DatabaseError, TimeoutError):
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await self._reconciliations.leave(self._holder)

    async def _walk(self, walk: Walk) -> None:
        began = time.monotonic()
        settings = self._settings.agent
        try:
            activities, changed = await self._note(walk)
        except OvationError as error:
            if isinstance(error, OvationUnavailable) and error.away:
                await self._reconciliations.end(walk, 0, None, None)
                return
            logger().warning("reconcile_failed", organization=walk.organization, error=str(error))
            await self._reconciliations.end(walk, min(settings.reconcile_seconds, _RETRY_SECONDS), None, None)
            return
        again = await self._reconciliations.look_slowly(walk, settings.reconcile_looks, settings.reconcile_seconds)
        await self._reconciliations.end(walk, settings.reconcile_seconds, activities, changed)
        if changed or again:
            self._on_due()
        logger().info(
            "reconciled",
            organization=walk.organization,
            activities=activities,
            changed=changed,
            looked_at_again=again,
            seconds=round(time.monotonic() - began, 3),
        )

    async def _note(self, walk: Walk) -> tuple[int, int]:
        installed_at = await self._watch_list.installed_at()
        listed = await self._ovation.activities(walk.organization)
        seen = [Seen(each.id, each.updated_at, is_recent(each, installed_at)) for each in listed]
        changed = 0
        for start in range(0, len(seen), _BATCH):
            self._beat()
            changed += await self._reconciliations.note(walk, seen[start : start + _BATCH])
        return len(seen), changed
