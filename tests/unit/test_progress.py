"""How far a step is, how fast its bytes pass, and how long the rest will take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.pipeline.progress import Meter, Progress


def test_what_has_not_begun_tells_nothing() -> None:
    assert Meter(Progress()).read(1.0) == {}


def test_rate_and_time_left_are_those_of_the_last_ten_seconds() -> None:
    progress = Progress(files_total=2, bytes_total=10_000)
    meter = Meter(progress)
    assert "bytes_per_second" not in meter.read(0.0)
    for second in range(1, 21):
        progress.add_bytes(10 if second <= 10 else 100)
        told = meter.read(float(second))
    assert (told["bytes_done"], told["bytes_per_second"], told["seconds_left"]) == (1100, 100, 89)


def test_what_stands_still_has_no_time_left() -> None:
    progress = Progress(bytes_total=100, bytes_done=10)
    meter = Meter(progress)
    meter.read(0.0)
    assert meter.read(5.0) == {"files_total": 0, "bytes_total": 100, "files_done": 0, "bytes_done": 10}


@given(st.lists(st.tuples(st.floats(0.01, 30), st.integers(-1000, 1000)), max_size=30), st.integers(0, 5000))
def test_no_rate_and_no_time_is_ever_below_nothing(steps: list[tuple[float, int]], total: int) -> None:
    progress, now = Progress(bytes_total=total), 0.0
    meter = Meter(progress)
    for seconds, count in steps:
        now += seconds
        progress.add_bytes(count)
        told = meter.read(now)
        assert told.get("bytes_per_second", 1) >= 0
        assert told.get("seconds_left", 0) >= 0
