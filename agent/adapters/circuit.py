"""Whether an outside party is there: found out by one, told once, and waited for by nobody else.

A call that failed, its own repetitions used up, is only a suspicion: one file or one path may be at fault. So the
party is asked the cheapest thing there is, and only if that fails too it is away: one warning, calls are refused at
once, and one task asks again and again until there is an answer. Then there is one line, and what waits is told.

Where a party has several addresses, each is judged by itself: one that does not answer closes none of the others.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp

from agent import __version__
from agent.errors import AgentError, OvationUnavailable, StorageUnavailable
from agent.logs import logger

# Back after at most 20 + 10 s, so that what waited has half a minute left to end within one.
_FIRST_SECONDS = 2.0
_MOST_SECONDS = 20.0
_PROBE_SECONDS = 10.0
# Asked to be left alone for so long, calls wait their turn; for longer, they are refused and their steps wait.
PATIENCE_SECONDS = 10.0
_RETRY_AFTER_MAX_SECONDS = 300.0  # asked for longer, the party is asked once all the same
_TRIAL_SECONDS = 60.0
_DAY_SECONDS = 86_400.0

Probe = Callable[[], Awaitable[object]]
Unavailable = OvationUnavailable | StorageUnavailable


@dataclass(slots=True)
class _Absence:
    """One address from which no answer comes, from the first suspicion on."""

    reason: str
    since: float
    at: datetime
    confirmed: bool = False
    trial_at: float = 0.0
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # known to be away, or back
    task: asyncio.Task[None] | None = None


class Circuit:
    """One outside party, whose addresses are origins (scheme, host and port).

    Args:
        party: what people call it.
        error: what is raised while it is away, and what its calls raise when they fail.
        clock: seconds that only go forward.
        sleep: waits so many seconds.
        jitter: draws from 0…1.
    """

    def __init__(
        self,
        party: str,
        error: type[Unavailable],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.party = party
        self._error = error
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._absences: dict[str, _Absence] = {}
        self._answered_at: dict[str, float] = {}
        self._not_before: dict[str, float] = {}  # until when an address asked to be left alone
        self._away_since: float | None = None
        self._callbacks: list[Callable[[], Awaitable[object]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Look out no longer."""
        for absence in self._absences.values():
            absence.settled.set()
        self._absences.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def on_back(self, callback: Callable[[], Awaitable[object]]) -> None:
        """Have this called whenever an address at which calls were refused answers again."""
        self._callbacks.append(callback)

    @property
    def away(self) -> bool:
        """Whether any of its addresses is known to be away."""
        return self._away_since is not None

    def refuses(self, origin: str) -> bool:
        """Return whether a call would be refused now."""
        absence = self._absences.get(origin)
        if absence is None or not absence.confirmed:
            return False
        return self._left_alone(origin) > 0 or self._clock() < absence.trial_at

    def check(self, origin: str) -> None:
        """Refuse a call while the party is away.

        One call a minute is let through: should the probe be wrong about the party, its success puts that right.

        Raises:
            OvationUnavailable, StorageUnavailable: whichever this circuit was made with.
        """
        absence = self._absences.get(origin)
        if absence is None or not absence.confirmed:
            return
        if not self.refuses(origin):
            absence.trial_at = self._clock() + _TRIAL_SECONDS
            return
        error = self._error(f"{self.party} is away since {absence.at:%H:%M} UTC: {absence.reason}")
        error.retry_after_seconds = self._left_alone(origin) or None
        error.away = True
        raise error

    async def turn(self, origin: str) -> None:
        """Wait before a request, where the party asked to be left alone for a moment."""
        if seconds := min(self._left_alone(origin), PATIENCE_SECONDS):
            await self._sleep(seconds)

    def asked(self, origin: str, seconds: float | None) -> None:
        """Keep in mind that the party asked to be left alone for so long."""
        until = self._clock() + min(seconds or 0.0, _RETRY_AFTER_MAX_SECONDS)
        self._not_before[origin] = max(until, self._not_before.get(origin, until))

    @asynccontextmanager
    async def guard(self, origin: str, probe: Probe, *, for_all: bool = True) -> AsyncIterator[None]:
        """Make a call, its repetitions included, only while the party is there, and learn from how it ends.

        Args:
            origin: where it goes.
            probe: asks the party the cheapest thing; raises this circuit's error where it is away. Any other error
                of the party's is an answer.
            for_all: what the party asks of this caller (`Retry-After`) it asks of all.

        Raises:
            OvationUnavailable, StorageUnavailable: whichever this circuit was made with; `away` says how it stands.
        """
        self.check(origin)
        await self.turn(origin)
        began = self._clock()
        try:
            yield
        except (OvationUnavailable, StorageUnavailable) as error:
            if isinstance(error, self._error):
                await self._failed(origin, error, began, probe, for_all=for_all)
            raise
        self._answered(origin)

    async def _failed(self, origin: str, error: Unavailable, began: float, probe: Probe, *, for_all: bool) -> None:
        """Find out whether the party is away, and mark the error so."""
        seconds = error.retry_after_seconds
        if seconds is not None:
            seconds = error.retry_after_seconds = min(seconds, _RETRY_AFTER_MAX_SECONDS)
        told_to_wait = for_all and seconds is not None and seconds > PATIENCE_SECONDS
        if for_all:
            self.asked(origin, seconds)
        absence = self._absences.get(origin)
        if absence is None:
            if not told_to_wait and self._answered_at.get(origin, float("-inf")) > began:
                return  # somebody was answered meanwhile
            absence = _Absence(str(error), self._clock(), datetime.now(UTC))
            self._absences[origin] = absence
            absence.task = self._begin(self._look_out(origin, absence, probe))
        if told_to_wait:
            self._confirm(origin, absence)
        await absence.settled.wait()
        error.away = absence.confirmed

    def _answered(self, origin: str) -> None:
        self._answered_at[origin] = self._clock()
        absence = self._absences.get(origin)
        if absence is not None and not self._left_alone(origin):
            if absence.task is not None:
                absence.task.cancel()
            self._over(origin, absence)

    async def _look_out(self, origin: str, absence: _Absence, probe: Probe) -> None:
        """Ask until there is an answer: at once, then with full jitter; never before the time that it asked for."""
        wait, longest = 0.0, _FIRST_SECONDS
        while True:
            await self._sleep(wait)
            while seconds := self._left_alone(origin):
                await self._sleep(seconds + self._jitter() * _FIRST_SECONDS)
            if await self._is_there(origin, probe):
                self._over(origin, absence)
                return
            self._confirm(origin, absence)
            wait, longest = self._jitter() * longest, min(longest * 2, _MOST_SECONDS)

    async def _is_there(self, origin: str, probe: Probe) -> bool:
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                await probe()
        except (OvationUnavailable, StorageUnavailable) as error:
            self.asked(origin, error.retry_after_seconds)
            return False
        except AgentError:
            return not self._left_alone(origin)
        except (aiohttp.ClientError, OSError):  # TimeoutError among them
            return False
        except Exception:  # noqa: BLE001 a bug: loud in the log, and whoever waits is not forgotten
            logger().exception("probe_failed", party=self.party)
            return False
        return not self._left_alone(origin)

    def _confirm(self, origin: str, absence: _Absence) -> None:
        if absence.confirmed:
            return
        absence.confirmed = True
        absence.trial_at = self._clock() + _TRIAL_SECONDS
        absence.settled.set()
        if self._away_since is None:
            self._away_since = absence.since
            away = {"party": self.party, "address": origin, "reason": absence.reason}
            _outside(lambda: logger().warning("party_away", **away))

    def _over(self, origin: str, absence: _Absence) -> None:
        del self._absences[origin]
        now = self._answered_at[origin] = self._clock()
        absence.settled.set()
        if not absence.confirmed:
            return
        if self._away_since is not None and not any(each.confirmed for each in self._absences.values()):
            back = {"party": self.party, "seconds": round(now - self._away_since, 1)}
            _outside(lambda: logger().info("party_back", **back))
            self._away_since = None
        self._begin(self._call_back())

    async def _call_back(self) -> None:
        for callback in self._callbacks:
            try:
                await callback()
            except Exception:  # noqa: BLE001 a bug: loud in the log, and the others are called
                logger().exception("party_back_failed", party=self.party)

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"circuit of {self.party}", context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _left_alone(self, origin: str) -> float:
        return max(0.0, self._not_before.get(origin, 0.0) - self._clock())


def _outside(tell: Callable[[], object]) -> None:
    """Write a line that is no job's: what is bound for the call that happened to notice stays out of it."""
    contextvars.Context().run(tell)


async def ask(origin: str, error: type[Unavailable]) -> None:
    """Ask an origin for its root page, with nothing that opens any door: whatever it answers, it is there.

    Raises:
        OvationUnavailable, StorageUnavailable: `error`, for 429 and from 500 on.
        aiohttp.ClientError, OSError: no answer.
    """
    agent = {"User-Agent": f"ovation-agent/{__version__}"}
    async with aiohttp.ClientSession(headers=agent) as http, http.get(origin, allow_redirects=False) as response:
        if response.status == 429 or response.status >= 500:  # noqa: PLR2004 HTTP's own numbers
            seconds = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
            raise error(f"{origin} answers {response.status}", retry_after_seconds=seconds)


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """Return what `Retry-After` asks for, seconds or a date, as seconds up to a day; None for what is neither."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _DAY_SECONDS)
    with suppress(ValueError, OverflowError):
        date = parsedate_to_datetime(value)
        aware = date if date.tzinfo else date.replace(tzinfo=UTC)
        return min(max(0.0, (aware - now).total_seconds()), _DAY_SECONDS)
    return None
