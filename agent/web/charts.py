"""What the page draws, as numbers for SVG: a job's stages over time, and the last days as bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from agent.db.jobs import Event
from agent.db.work import Day
from agent.domain.job import TERMINAL, Job, State

WIDTH = 1000.0
HEIGHT = 100.0
_LEAST_WIDTH = 4.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of a job's life, in thousandths of the whole."""

    state: State
    begin: datetime
    seconds: float
    x: float
    width: float


def stages(job: Job, events: Sequence[Event], now: datetime) -> list[Stage]:
    """Return the stages that a job went through, each from its first move to the next one's; all wide enough to see."""
    begins: list[tuple[State, datetime]] = [(State.QUEUED, job.created_at)]
    for event in events:
        if event.state != begins[-1][0]:
            begins.append((event.state, event.at))
    end = job.finished_at or max(now, begins[-1][1])
    ends = [*(at for _, at in begins[1:]), end]
    found = [(state, at, max(timedelta(), until - at)) for (state, at), until in zip(begins, ends, strict=True)]
    found = [(state, at, lasted) for state, at, lasted in found if state not in TERMINAL]
    whole = sum((lasted for _, _, lasted in found), timedelta()) or timedelta(seconds=1)
    scale = WIDTH - _LEAST_WIDTH * len(found)
    drawn, x = [], 0.0
    for state, at, lasted in found:
        width = _LEAST_WIDTH + scale * (lasted / whole)
        drawn.append(Stage(state, at, lasted.total_seconds(), round(x, 2), round(width, 2)))
        x += width
    return drawn


@dataclass(frozen=True, slots=True)
class Bar:
    """One part of a day's bar: `y` and `height` are hundredths of the largest day's."""

    kind: str
    value: float
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Column:
    """One day."""

    day: datetime
    total: float
    bars: Sequence[Bar]


def columns(days: Sequence[Day], *parts: tuple[str, Callable[[Day], float]]) -> list[Column]:
    """Return one bar a day, of these parts one above the other."""
    largest = max((sum(value(day) for _, value in parts) for day in days), default=0) or 1
    found = []
    for day in days:
        bars, top = [], HEIGHT
        for kind, value in parts:
            if height := HEIGHT * value(day) / largest:
                top -= height
                bars.append(Bar(kind, value(day), round(top, 2), round(height, 2)))
        found.append(Column(day.day, sum(value(day) for _, value in parts), bars))
    return found
