"""Walking through an agent's failpoints: find out which there are, then let agents die at each, one life after another.

Each life has a new Activity before it, so that it comes past every point; what earlier lives left undone is done on
the way.
"""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum

from agent.sandbox.faults import FaultKind
from tests.agents import until
from tests.chaos.harness import Agent, Chaos
from tests.chaos.points import is_by_the_clock
from tests.chaos.work import LARGE, LONG, SMALL, Work

_DIES_SECONDS = 60.0
_SLOW_SECONDS = 7.0  # longer than a lease goes without being renewed
_NEED_TIME = ("renew_", "set_progress")  # met on other ways too, but only where the machine is slow
_GOLDEN = 0.6180339887498949


class Way(Enum):
    """How a life is led, so that it comes past a point. The first that leads there is taken, but `FRESH` at last."""

    FRESH = "with an empty data directory"
    IDLE = "with nothing new to do"
    QUIT = "asked to stop while it has nothing to do"
    SMALL = "with a new Activity"
    LARGE = "with an output in parts"
    SLOW = "with an image that comes slowly"
    STOP = "asked to stop while a container runs"

    @property
    def work(self) -> Work | None:
        """What the life's Activity does, if it has one."""
        return {Way.SMALL: SMALL, Way.LARGE: LARGE, Way.SLOW: SMALL, Way.STOP: LONG}.get(self)


@dataclass(frozen=True, slots=True)
class Death:
    """Where a life is to end: at the n-th time that a point is reached, on this way."""

    point: str
    way: Way
    occurrence: int = 1
    last: int = 1  # the occurrence that was the last one when it was recorded

    @property
    def both(self) -> list[Death]:
        """The first and the last time, if those differ; what happens by the clock has no last time."""
        return [self] if self.last == 1 or is_by_the_clock(self.point) else [self, replace(self, occurrence=self.last)]

    def __str__(self) -> str:
        clock = ", by the clock" if is_by_the_clock(self.point) else ""
        return f"{self.point} for the {self.occurrence}. time, {self.way.value}{clock}"


@dataclass(frozen=True, slots=True)
class Life:
    """The points that a life came past until it was asked to stop, and those after."""

    way: Way
    awake: list[str]
    stopping: list[str]


class NeverReached(AssertionError):
    """A life did not come to the point at which it was to end."""


async def live(chaos: Chaos, *ways: Way) -> list[Life]:
    """Lead a life each way to its good end, and note the points. A harness's first life is `FRESH`."""
    lives = []
    for way in ways:
        async with _led(chaos, way, Death("", way)) as agent:
            if way is not Way.STOP:
                await chaos.recovered(f"no fault, {way.value}")
            awake = len(agent.points)
            assert await agent.stop() == 0
        lives.append(Life(way, agent.points[:awake], agent.points[awake:]))
    return lives


def deaths(lives: Sequence[Life]) -> list[Death]:
    """Return each point that lives came past, with the first way that leads there, in order."""
    found: dict[str, Death] = {}
    for life in sorted(lives, key=lambda each: list(Way).index(each.way)):
        quits = Way.QUIT if life.way in {Way.FRESH, Way.IDLE} else life.way
        for points, way in ((life.awake, life.way), (life.stopping, quits)):
            for point, times in Counter(points).items():
                known = found.get(point)
                needs_time = way is Way.SLOW and any(word in point for word in _NEED_TIME)
                if known is None or known.way is Way.FRESH or needs_time:
                    found[point] = Death(point, way, last=times)
    return list(found.values())


def spread(chosen: Sequence[Death]) -> list[Death]:
    """Return deaths in an order in which neighbours are far apart, and those that cost the most come last.

    A job that dies again and again in one state is set aside: that is not what this is about.
    """
    mixed = [death for _, death in sorted(enumerate(chosen), key=lambda each: each[0] * _GOLDEN % 1)]
    return sorted(mixed, key=lambda death: death.way is Way.LARGE)


async def die(chaos: Chaos, death: Death) -> Agent:
    """Lead a life until it dies where it should, and return it.

    Raises:
        NeverReached: it did not come there.
    """
    async with _led(chaos, death.way, death) as agent:
        if death.way in {Way.STOP, Way.QUIT} and agent.process.returncode is None:
            agent.process.send_signal(signal.SIGTERM)
        await agent.died(_DIES_SECONDS)
    code = agent.process.returncode
    if code != -signal.SIGKILL:
        await agent.kill()
        ended = "did not end" if code is None else f"ended with {code}: {agent.log.read_text()[-500:]}"
        raise NeverReached(f"{death}: it {ended}")
    chaos.faults += 1
    return agent


@asynccontextmanager
async def _led(chaos: Chaos, way: Way, death: Death) -> AsyncIterator[Agent]:
    """Begin a life and bring it on its way."""
    faults = chaos.lab.sandbox.faults
    activity_id = chaos.activity(way.work) if way.work else ""
    name = f"fresh-{chaos.faults}" if way is Way.FRESH and death.point else "a"
    shutil.rmtree(chaos.data_dir(name) / "cache", ignore_errors=True)  # or nothing would be fetched any more
    delay = None
    if way is Way.SLOW:
        delay = faults.add(FaultKind.LATENCY, r"GET .*image\.sif", target="store", seconds=_SLOW_SECONDS)
    agent = chaos.begin(name, record=True, kill=death.point, occurrence=death.occurrence)
    try:
        if way is Way.STOP:
            await _runs(chaos, agent, activity_id)
        elif way is Way.QUIT or not (death.point or way.work):
            await _did(agent, "reconciled")  # the last thing that happens at a start
        yield agent
    finally:
        if delay is not None:
            faults.remove(delay.id)


async def _runs(chaos: Chaos, agent: Agent, activity_id: str) -> None:
    """Wait until an Activity's container is being watched, or the agent has died on the way."""
    async with chaos.database() as connection:

        async def runs() -> bool | None:
            if agent.process.returncode is not None:
                return True
            query = "SELECT true FROM jobs WHERE activity_id = $1 AND state = 'running' AND lease_until IS NOT NULL"
            watched: bool | None = await connection.fetchval(query, activity_id)
            return watched

        await until(runs, "a container that is watched", agent.log)


async def _did(agent: Agent, event: str) -> None:
    """Wait until an agent has told of an event, or has died on the way."""

    async def told() -> bool | None:
        return agent.process.returncode is not None or bool(agent.events(event)) or None

    await until(told, event, agent.log)
