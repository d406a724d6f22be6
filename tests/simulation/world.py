"""What all parts of a simulation share: the clock, the seed, the log of what happened, and the weather on the wires."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from tests.simulation.chance import Chance
from tests.simulation.loop import EPOCH, VirtualLoop


class Party(StrEnum):
    """Who is at the other end of a wire."""

    OVATION = "ovation"
    STORE = "store"
    DATABASE = "database"
    RUNTIME = "runtime"


class Fate(StrEnum):
    """What becomes of a request."""

    SERVED = "served"
    REFUSED = "refused"  # no connection: certainly not done
    BUSY = "busy"  # an error that the party answers with: not done
    CUT_BEFORE = "cut before"  # the connection broke; it was not done
    CUT_AFTER = "cut after"  # the connection broke; it was done
    SILENT_BEFORE = "silent before"  # no answer; it was not done
    SILENT_AFTER = "silent after"  # no answer; it was done

    @property
    def is_done(self) -> bool:
        """Whether the party does what it is asked for."""
        return self in {Fate.SERVED, Fate.CUT_AFTER, Fate.SILENT_AFTER}


@dataclass(slots=True)
class Weather:
    """What the wires to a party are like. Probabilities are of one request, until all is calm."""

    fates: dict[Fate, float] = field(default_factory=dict)
    outages: list[tuple[float, float, Fate]] = field(default_factory=list)  # (from, until, what becomes of requests)
    slow: float = 0.0  # how probable it is that a request takes seconds

    def fate(self, now: float, drawn: float) -> Fate:
        """Return what becomes of a request that arrives now."""
        for begin, end, fate in self.outages:
            if begin <= now < end:
                return fate
        for fate, probability in self.fates.items():
            if drawn < probability:
                return fate
            drawn -= probability
        return Fate.SERVED


class World:
    """The part of a simulation that no agent's death or freeze touches."""

    def __init__(self, seed: int, chance: Chance, loop: VirtualLoop, root: Path) -> None:
        self.seed = seed
        self.chance = chance
        self.loop = loop
        self.root = root
        self.log: list[str] = []
        self.weather = {party: Weather() for party in Party}
        self.is_calm = False
        self.problems: list[str] = []
        self.context = contextvars.copy_context()

    @property
    def now(self) -> float:
        """Seconds since the simulation's start."""
        return self.loop.time()

    @property
    def wall(self) -> float:
        """What clocks on the wall say, in seconds since 1970, whole microseconds."""
        return round(EPOCH + self.loop.time(), 6)

    def moment(self) -> datetime:
        """Return the same as a time."""
        return datetime.fromtimestamp(self.wall, UTC)

    def note(self, who: str, what: str) -> None:
        """Write down that something happened."""
        self.log.append(f"{self.now:12.6f}  {who:<8} {what}".replace(str(self.root), "~"))

    def problem(self, what: str) -> None:
        """Write down that something happened which never may."""
        self.note("PROBLEM", what)
        self.problems.append(what)

    def later(self, seconds: float, function: Callable[..., object], *arguments: object) -> asyncio.TimerHandle:
        """Have something happen in the world, whatever becomes of the process that asks for it."""
        return self.loop.call_at(self.now + seconds, function, *arguments, context=self.context)

    def fate(self, party: Party, what: str) -> Fate:
        """Return what becomes of a request that arrives at a party now."""
        if self.is_calm:
            return Fate.SERVED
        weather = self.weather[party]
        return weather.fate(self.now, self.chance.draw(f"fate {what}") if weather.fates else 1.0)

    def is_sound(self, party: Party) -> bool:
        """Return whether requests to a party are served, and at once, as long as this schedule lasts."""
        weather = self.weather[party]
        return self.is_calm or not (weather.fates or weather.outages or weather.slow)

    def latency(self, party: Party, what: str) -> float:
        """Return how many seconds a request to a party, or its answer, is on its way."""
        drawn = self.chance.draw(f"latency {what}")
        slow = self.weather[party].slow
        if not self.is_calm and slow and self.chance.happens(slow, f"slow {what}"):
            return 0.5 + 7 * drawn
        return (0.0001 + 0.002 * drawn) if party is Party.DATABASE else (0.002 + 0.08 * drawn)

    def digest(self) -> str:
        """Return what tells this simulation's course from every other."""
        return hashlib.sha256("\n".join(self.log).encode()).hexdigest()
