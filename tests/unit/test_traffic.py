"""Who gets a connection, in which order, and how fast bytes may pass."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.adapters.traffic import Traffic


class Street:
    """Jobs that use connections; the order in which they got one."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.order: list[str] = []
        self.open: list[tuple[str, asyncio.Event]] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def come(self, *jobs: str) -> None:
        self.tasks += [asyncio.create_task(self._use(job), name=job) for job in jobs]
        await self.rest()

    async def leave(self, job: str) -> None:
        found = next(each for each in self.open if each[0] == job)
        self.open.remove(found)
        found[1].set()
        await self.rest()

    async def cancel(self, number: int) -> None:
        self.tasks[number].cancel()
        await self.rest()

    async def rest(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def _use(self, job: str) -> None:
        async with self.traffic.connection(job):
            done = asyncio.Event()
            self.order.append(job)
            self.open.append((job, done))
            try:
                await done.wait()
            finally:
                self.open = [each for each in self.open if each[1] is not done]


async def test_a_job_with_a_few_small_files_is_not_stuck_behind_a_large_one() -> None:
    street = Street(Traffic(connections=3, job_connections=3))
    await street.come("large", "large", "large", "large", "large")
    await street.come("small", "small")
    await street.leave("large")
    assert street.order == ["large", "large", "large", "small"]
    await street.leave("large")
    assert street.order[-1] == "large", "they have as many as each other, and it came first"
    await street.leave("small")
    assert street.order[-1] == "small"


async def test_one_job_never_has_more_than_its_share_though_there_are_free_ones() -> None:
    street = Street(Traffic(connections=10, job_connections=2))
    await street.come(*["a"] * 5, "b")
    assert street.order == ["a", "a", "b"]
    await street.leave("b")
    assert street.order == ["a", "a", "b"]
    await street.leave("a")
    assert street.order == ["a", "a", "b", "a"]


async def test_who_waits_and_goes_away_costs_nobody_a_place() -> None:
    street = Street(Traffic(connections=1, job_connections=1))
    await street.come("a", "b", "c")
    await street.cancel(1)
    await street.leave("a")
    assert street.order == ["a", "c"]
    await street.cancel(2)
    await street.come("d")
    assert street.order == ["a", "c", "d"]


async def test_who_goes_away_in_the_moment_of_its_turn_gives_it_back() -> None:
    street = Street(Traffic(connections=1, job_connections=1))
    await street.come("a", "b", "c")
    street.open[0][1].set()
    while not street.tasks[0].done():  # noqa: ASYNC110 turn by turn
        await asyncio.sleep(0)
    street.tasks[1].cancel()  # it was b's turn, and b has not been told yet
    await street.rest()
    assert street.order[-1] == "c"


@settings(max_examples=50)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["come", "leave", "cancel"])), max_size=40),
)
def test_the_limits_hold_and_nobody_waits_for_a_free_place(
    connections: int, share: int, steps: list[tuple[str, str]]
) -> None:
    async def run() -> None:
        street = Street(Traffic(connections=connections, job_connections=share))
        share_ = min(connections, share)
        for job, step in steps:
            if step == "come":
                await street.come(job)
            elif step == "leave" and any(each[0] == job for each in street.open):
                await street.leave(job)
            elif step == "cancel" and street.tasks:
                await street.cancel(hash(job) % len(street.tasks))
            held = [each[0] for each in street.open]
            waiting = {task.get_name() for task in street.tasks if not task.done()} - set(held)
            assert len(held) <= connections
            assert all(held.count(each) <= share_ for each in "abc")
            assert not waiting or len(held) == connections
        for task in street.tasks:
            task.cancel()
        await asyncio.gather(*street.tasks, return_exceptions=True)

    asyncio.run(run())


def test_without_a_limit_bytes_pass_at_once() -> None:
    assert Traffic().delay_seconds(10**12, "down") == 0.0


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 3)), min_size=1))
def test_no_more_passes_than_is_allowed(moves: list[tuple[int, float]]) -> None:
    now = 100.0
    traffic = Traffic(bytes_per_second=1000, clock=lambda: now)
    began, passed = now, 0
    for count, idle in moves:
        now += traffic.delay_seconds(count, "down")
        passed += count
        assert passed <= 1000 * (now - began) + 250 + 1e-6, "a quarter of a second's worth may pass at once"
        now += idle


def test_who_paused_long_enough_goes_on_at_once() -> None:
    now = 0.0
    traffic = Traffic(bytes_per_second=1000, clock=lambda: now)
    assert traffic.delay_seconds(250, "down") == pytest.approx(0)
    assert traffic.delay_seconds(1000, "down") == pytest.approx(1)
    now = 10.0
    assert traffic.delay_seconds(200, "down") == pytest.approx(0)
