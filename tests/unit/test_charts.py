"""What the page draws."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.db.jobs import Event
from agent.db.work import Day
from agent.domain.job import TRANSITIONS, State
from agent.web.charts import WIDTH, columns, stages
from tests.unit.test_metrics import JOB

T0 = JOB.created_at


@given(st.lists(st.tuples(st.sampled_from(list(State)), st.floats(0, 1e6)), max_size=20), st.floats(-10, 1e7))
def test_stages_lie_side_by_side_and_fill_the_whole(moves: list[tuple[State, float]], now: float) -> None:
    at, events = T0, []
    for number, (state, seconds) in enumerate(moves):
        at += timedelta(seconds=seconds)
        events.append(Event(number, at, state, 0, None, None))
    found = stages(JOB, events, T0 + timedelta(seconds=now))
    x = 0.0
    for stage in found:
        assert stage.x == pytest.approx(x, abs=0.1)
        assert stage.width > 0
        assert stage.seconds >= 0
        x += stage.width
    if any(stage.seconds for stage in found):
        assert x == pytest.approx(WIDTH, abs=1)
    assert not any(not TRANSITIONS[stage.state] for stage in found)


def test_each_stage_goes_on_until_the_next() -> None:
    events = [
        Event(1, T0, State.QUEUED, 0, None, None),
        Event(2, T0 + timedelta(seconds=10), State.STAGING, 0, None, None),
        Event(3, T0 + timedelta(seconds=20), State.STAGING, 1, "tried again", None),
        Event(4, T0 + timedelta(seconds=40), State.LAUNCHING, 0, None, None),
    ]
    found = stages(JOB, events, T0 + timedelta(seconds=45))
    assert [(each.state, each.seconds) for each in found] == [("queued", 10), ("staging", 30), ("launching", 5)]


def test_bars_stand_on_each_other_and_the_largest_day_fills_the_height() -> None:
    days = [Day(datetime(2026, 1, 1, tzinfo=UTC), 3, 1, 0, 0, 0), Day(datetime(2026, 1, 2, tzinfo=UTC), 0, 2, 0, 0, 0)]
    one, two = columns(days, ("succeeded", lambda day: day.succeeded), ("failed", lambda day: day.failed))
    assert [(bar.kind, bar.y, bar.height) for bar in one.bars] == [("succeeded", 25, 75), ("failed", 0, 25)]
    assert [(bar.kind, bar.y, bar.height) for bar in two.bars] == [("failed", 50, 50)]
    assert columns([], ("x", lambda day: day.failed)) == []
