"""An outside party's coming and going: told once, never asked too soon, noticed soon enough. No second is waited."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import structlog
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.testing import capture_logs

from agent.adapters import circuit as module
from agent.adapters.circuit import Circuit
from agent.errors import OvationNotFound, OvationRefused, OvationUnavailable, StorageUnavailable
from agent.logs import logger

HERE, THERE = "https://api.example", "https://files.example"


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        awake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # What is left of a long wait may be too little to change the clock's figure: some time passes all the same.
        at = max(self.now + seconds, math.nextafter(self.now, math.inf))
        heapq.heappush(self._sleepers, (at, next(self._order), awake))
        await awake

    async def go_on(self, seconds: float) -> None:
        """Let so much time pass, and everything happen that falls into it."""
        until = self.now + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= until:
            self.now, _, awake = heapq.heappop(self._sleepers)
            if not awake.done():
                awake.set_result(None)
            await self.settle()
        self.now = until

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


class Party:
    """An outside party that a test can send away; it keeps when it was asked."""

    def __init__(self, time: Time, jitter: Callable[[], float] = lambda: 1.0) -> None:
        self.time = time
        self.circuit = Circuit("Ovation", OvationUnavailable, clock=time.clock, sleep=time.sleep, jitter=jitter)
        self.circuit.on_back(self._back)
        self.there = True
        self.retry_after: float | None = None
        self.probed_at: list[float] = []
        self.called_at: list[float] = []
        self.backs = 0

    async def _back(self) -> None:
        self.backs += 1

    async def probe(self) -> None:
        self.probed_at.append(self.time.now)
        self._answer("nothing there")

    async def call(self, *, seconds: float = 0, origin: str = HERE, for_all: bool = True) -> None:
        async with self.circuit.guard(origin, self.probe, for_all=for_all):
            self.called_at.append(self.time.now)
            await self.time.sleep(seconds)
            self._answer("it answers 503")

    async def fails(self, **how: Any) -> OvationUnavailable:
        """Make a call that fails at once, and return its error."""
        with pytest.raises(OvationUnavailable) as caught:
            await self.call(**how)
        return caught.value

    def _answer(self, why: str) -> None:
        if not self.there:
            raise OvationUnavailable(why, retry_after_seconds=self.retry_after)


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party(Time())
    yield party
    await party.circuit.close()


@pytest.fixture
def lines() -> Any:
    with capture_logs(processors=[merge_contextvars]) as captured:
        yield captured


def told(lines: list[Any]) -> list[str]:
    return [line["event"] for line in lines]


async def test_a_call_that_fails_while_the_party_answers_is_no_outage(party: Party, lines: list[Any]) -> None:
    async def answers() -> None:
        party.probed_at.append(party.time.now)

    party.there = False
    with pytest.raises(OvationUnavailable) as caught:
        async with party.circuit.guard(HERE, answers):
            party._answer("this path answers 500")
    assert not caught.value.away
    assert len(party.probed_at) == 1
    assert not party.circuit.refuses(HERE)
    assert lines == []
    await party.time.go_on(600)
    assert len(party.probed_at) == 1
    assert party.backs == 0


@pytest.mark.parametrize("answer", [OvationRefused("401"), OvationNotFound("404")])
async def test_a_refusal_is_an_answer(party: Party, lines: list[Any], answer: Exception) -> None:
    async def refuses() -> None:
        raise answer

    with pytest.raises(OvationUnavailable):
        async with party.circuit.guard(HERE, refuses):
            raise OvationUnavailable("broke off")
    assert not party.circuit.refuses(HERE)
    assert lines == []


async def test_away_it_is_told_once_and_refused_at_once(party: Party, lines: list[Any]) -> None:
    party.there = False
    assert (await party.fails()).away
    calls = len(party.called_at)
    for _ in range(50):
        with pytest.raises(
            OvationUnavailable, match=r"^Ovation is away since \d\d:\d\d UTC: it answers 503$"
        ) as caught:
            await party.call()
        assert caught.value.away
        assert caught.value.retry_after_seconds is None
    assert len(party.called_at) == calls
    assert told(lines) == ["party_away"]
    assert lines[0]["log_level"] == "warning"
    assert (lines[0]["party"], lines[0]["address"], lines[0]["reason"]) == ("Ovation", HERE, "it answers 503")


async def test_many_calls_that_fail_at_once_ask_once_and_tell_once(party: Party, lines: list[Any]) -> None:
    party.there = False
    calls = [asyncio.create_task(party.call(seconds=10)) for _ in range(100)]
    await party.time.go_on(10)
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, OvationUnavailable) and error.away for error in errors)
    assert len(party.probed_at) == 1
    assert told(lines) == ["party_away"]


async def test_back_it_is_told_once_and_whoever_waits_is_told(party: Party, lines: list[Any]) -> None:
    party.there = False
    await party.fails()
    await party.time.go_on(3600)
    assert told(lines) == ["party_away"]
    party.there = True
    assert party.backs == 0
    await party.time.go_on(20)
    assert party.backs == 1
    assert told(lines) == ["party_away", "party_back"]
    assert (lines[1]["log_level"], lines[1]["party"]) == ("info", "Ovation")
    assert 3600 <= lines[1]["seconds"] <= 3620
    await party.call()
    await party.time.go_on(600)
    assert party.backs == 1
    assert len(lines) == 2


async def test_it_asks_less_and_less_often_but_often_enough(party: Party) -> None:
    party.there = False
    await party.fails()
    await party.time.go_on(70)
    assert [at - 1000 for at in party.probed_at] == [0, 2, 6, 14, 30, 50, 70]


async def test_the_waits_have_full_jitter() -> None:
    draws = iter([0.5, 0.0, 0.25, 1.0, 0.1] + [1.0] * 100)
    party = Party(Time(), lambda: next(draws))
    party.there = False
    await party.fails()
    await party.time.go_on(20)
    assert [round(at - 1000, 6) for at in party.probed_at] == [0, 1, 1, 3, 19]
    await party.circuit.close()


async def test_asked_to_be_left_alone_for_long_it_is_told_and_not_asked_before(party: Party, lines: list[Any]) -> None:
    party.there, party.retry_after = False, 120.0
    error = await party.fails()
    assert (error.away, error.retry_after_seconds) == (True, 120.0)
    assert told(lines) == ["party_away"]
    party.there = True
    await party.time.go_on(60)
    with pytest.raises(OvationUnavailable) as caught:
        await party.call()
    assert caught.value.retry_after_seconds == pytest.approx(60)
    await party.time.go_on(59.9)
    assert party.probed_at == []
    assert len(party.called_at) == 1
    await party.time.go_on(2.2)
    assert len(party.probed_at) == 1
    assert told(lines) == ["party_away", "party_back"]


async def test_asked_to_be_left_alone_for_a_year_it_is_asked_after_some_minutes(party: Party) -> None:
    party.there, party.retry_after = False, 86_400.0 * 365
    assert (await party.fails()).retry_after_seconds == 300
    await party.time.go_on(303)
    assert len(party.probed_at) == 1


async def test_asked_to_be_left_alone_for_a_moment_all_calls_wait_their_turn(party: Party, lines: list[Any]) -> None:
    party.there, party.retry_after = False, 5.0
    failing = asyncio.create_task(party.call())
    await party.time.settle()
    party.there = True
    others = [asyncio.create_task(party.call()) for _ in range(10)]
    await party.time.go_on(4.9)
    assert len(party.called_at) == 1
    assert party.probed_at == []
    await party.time.go_on(3)
    await asyncio.gather(*others)
    assert all(at >= 1005 for at in party.called_at[1:])
    assert all(at >= 1005 for at in party.probed_at)
    with pytest.raises(OvationUnavailable) as caught:
        await failing
    assert not caught.value.away
    assert lines == []


async def test_what_the_probe_is_asked_is_kept_too(party: Party) -> None:
    party.there = False
    await party.fails()
    party.retry_after = 100.0
    await party.time.go_on(2)
    assert len(party.probed_at) == 2
    party.there = True
    await party.time.go_on(99)
    assert len(party.probed_at) == 2
    await party.time.go_on(4)
    assert len(party.probed_at) == 3
    assert not party.circuit.refuses(HERE)


async def test_asked_to_be_left_alone_while_the_probe_is_answered_it_is_left_alone(party: Party) -> None:
    async def answered() -> None:
        if not party.probed_at:
            party.circuit.asked(HERE, 60)
        party.probed_at.append(party.time.now)

    with pytest.raises(OvationUnavailable) as caught:
        async with party.circuit.guard(HERE, answered):
            raise OvationUnavailable("broke off")
    assert caught.value.away
    await party.time.go_on(59)
    assert party.circuit.refuses(HERE)
    assert len(party.probed_at) == 1
    await party.time.go_on(4)
    assert not party.circuit.refuses(HERE)


async def test_what_is_asked_of_one_person_is_not_asked_of_all(party: Party, lines: list[Any]) -> None:
    party.there, party.retry_after = False, 120.0

    async def answers() -> None:
        party.probed_at.append(party.time.now)

    with pytest.raises(OvationUnavailable) as caught:
        async with party.circuit.guard(HERE, answers, for_all=False):
            party._answer("it answers 429")
    assert (caught.value.away, caught.value.retry_after_seconds) == (False, 120.0)
    party.there = True
    await party.call()
    assert lines == []


async def test_a_call_that_fails_after_another_was_answered_is_not_even_a_suspicion(party: Party) -> None:
    slow = asyncio.create_task(party.call(seconds=30))
    await party.time.go_on(1)
    await party.call()
    party.there = False
    await party.time.go_on(30)
    with pytest.raises(OvationUnavailable) as caught:
        await slow
    assert not caught.value.away
    assert party.probed_at == []


async def test_a_call_under_way_that_is_answered_ends_the_outage(party: Party, lines: list[Any]) -> None:
    slow = asyncio.create_task(party.call(seconds=1))
    await party.time.settle()
    party.there = False
    await party.fails()
    assert party.circuit.refuses(HERE)
    party.there = True
    await party.time.go_on(1.5)  # the next probe would come at 2
    await slow
    assert told(lines) == ["party_away", "party_back"]
    await party.time.go_on(600)
    assert party.backs == 1
    assert len(party.probed_at) == 1


async def test_an_answer_under_way_does_not_shorten_what_was_asked_for(party: Party) -> None:
    slow = asyncio.create_task(party.call(seconds=7))
    await party.time.settle()
    party.there, party.retry_after = False, 60.0
    await party.fails()
    party.there = True
    await party.time.go_on(8)
    await slow
    assert party.circuit.refuses(HERE)


async def test_a_probe_that_is_wrong_about_the_party_does_not_close_it_for_ever(party: Party, lines: list[Any]) -> None:
    async def wrong() -> None:
        party.probed_at.append(party.time.now)
        raise OvationUnavailable("this answers 500 and nobody cares")

    with pytest.raises(OvationUnavailable):
        async with party.circuit.guard(HERE, wrong):
            raise OvationUnavailable("broke off")
    await party.time.go_on(59)
    with pytest.raises(OvationUnavailable):
        await party.call()
    await party.time.go_on(2)
    await party.call()
    await party.time.settle()
    assert told(lines) == ["party_away", "party_back"]
    assert party.backs == 1


async def test_while_it_is_away_one_call_a_minute_is_let_through(party: Party) -> None:
    party.there = False
    await party.fails()
    for _ in range(3600):
        await party.time.go_on(1)
        for _ in range(3):
            with pytest.raises(OvationUnavailable):
                await party.call()
    assert 55 <= len(party.called_at) <= 62
    assert len(party.probed_at) < 200


async def test_each_address_is_judged_by_itself_and_the_party_is_told_of_once(party: Party, lines: list[Any]) -> None:
    away = {HERE, THERE}

    async def call(origin: str) -> None:
        async def probe() -> None:
            if origin in away:
                raise OvationUnavailable("nothing there")

        async with party.circuit.guard(origin, probe):
            await probe()

    for origin in (HERE, THERE):
        with pytest.raises(OvationUnavailable):
            await call(origin)
    away.remove(HERE)
    await party.time.go_on(20)
    await call(HERE)
    assert party.backs == 1
    assert party.circuit.refuses(THERE)
    assert told(lines) == ["party_away"]
    away.clear()
    await party.time.go_on(20)
    await call(THERE)
    assert party.backs == 2
    assert told(lines) == ["party_away", "party_back"]


@pytest.mark.parametrize("retry_after", [None, 60.0])
async def test_the_lines_are_no_jobs(party: Party, lines: list[Any], retry_after: float | None) -> None:
    async def tells() -> None:
        logger().info("told")

    party.circuit.on_back(tells)
    party.there, party.retry_after = False, retry_after
    with bound_contextvars(job_id="the job that happened to notice"):
        await party.fails()
    party.there = True
    await party.time.go_on(80)
    assert told(lines) == ["party_away", "party_back", "told"]
    assert all("job_id" not in line for line in lines)


async def test_a_probe_that_hangs_is_cut(party: Party, lines: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROBE_SECONDS", 0.01)

    async def hangs() -> None:
        await asyncio.Event().wait()

    with pytest.raises(OvationUnavailable) as caught:
        async with party.circuit.guard(HERE, hangs):
            raise OvationUnavailable("does not answer")
    assert caught.value.away
    assert told(lines) == ["party_away"]


async def test_a_bug_in_a_probe_is_loud_and_nobody_is_forgotten(party: Party, lines: list[Any]) -> None:
    bugs = [ZeroDivisionError(), ZeroDivisionError()]

    async def probe() -> None:
        if bugs:
            raise bugs.pop()

    with pytest.raises(OvationUnavailable):
        async with party.circuit.guard(HERE, probe):
            raise OvationUnavailable("broke off")
    await party.time.go_on(2)
    assert told(lines) == ["probe_failed", "party_away", "probe_failed"]
    await party.time.go_on(20)
    assert told(lines)[-1] == "party_back"


async def test_one_that_fails_to_be_told_does_not_keep_the_others_from_it(lines: list[Any]) -> None:
    party = Party(Time())

    async def bug() -> None:
        raise ZeroDivisionError

    party.circuit._callbacks.insert(0, bug)
    party.there = False
    await party.fails()
    party.there = True
    await party.time.go_on(20)
    assert party.backs == 1
    assert "party_back_failed" in told(lines)
    await party.circuit.close()


async def test_closing_ends_the_watch_and_leaves_nobody_waiting(party: Party, lines: list[Any]) -> None:
    party.there = False
    await party.fails()
    asked = len(party.probed_at)
    never = asyncio.Event()
    waiting = asyncio.create_task(_fails_with(party.circuit, never.wait))
    await party.time.settle()
    await party.circuit.close()
    await party.time.settle()
    assert waiting.done()
    await party.time.go_on(3600)
    assert len(party.probed_at) == asked
    assert told(lines) == ["party_away"]
    assert party.circuit._tasks == set()


async def _fails_with(circuit: Circuit, probe: Callable[[], Coroutine[Any, Any, object]]) -> None:
    with pytest.raises(OvationUnavailable):
        async with circuit.guard(THERE, probe):
            raise OvationUnavailable("broke off")


async def test_the_object_stores_errors_are_its_own(lines: list[Any]) -> None:
    time = Time()
    circuit = Circuit("the object store", StorageUnavailable, clock=time.clock, sleep=time.sleep)

    async def away() -> None:
        raise ConnectionRefusedError

    with pytest.raises(OvationUnavailable):
        async with circuit.guard(HERE, away):
            raise OvationUnavailable("another party's")
    assert lines == []
    with pytest.raises(StorageUnavailable):
        async with circuit.guard(HERE, away):
            raise StorageUnavailable("it answers 503")
    with pytest.raises(StorageUnavailable, match="the object store is away since"):
        circuit.check(HERE)
    await circuit.close()


class Outages(RuleBasedStateMachine):
    """Whatever happens in whatever order: what holds at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.captured = capture_logs()
        self.lines: Any = self.captured.__enter__()
        self.draws = [0.5]
        self.party = Party(Time(), lambda: self.draws[-1])
        self.left_alone_until = 0.0
        self.calls: list[asyncio.Task[None]] = []

    def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    @rule(draw=st.floats(0, 1))
    def draw(self, draw: float) -> None:
        self.draws.append(draw)

    @rule(retry_after=st.sampled_from([None, None, 1.0, 8.0, 30.0, 1e6]))
    def go(self, retry_after: float | None) -> None:
        self.party.there, self.party.retry_after = False, retry_after

    @rule()
    def come(self) -> None:
        self.party.there = True

    @rule(seconds=st.sampled_from([0.0, 3.0, 40.0]))
    def call(self, seconds: float) -> None:
        async def call() -> None:
            self.calls.append(asyncio.create_task(self.party.call(seconds=seconds)))
            await self.party.time.settle()

        self._run(call())

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self._run(self.party.time.go_on(seconds))

    @rule()
    def there_again_all_is_well_within_half_a_minute_of_what_it_asked_for(self) -> None:
        self.party.there = True
        self._run(self.party.time.go_on(40.0))  # the longest call that is under way, and what it may still ask for
        asked_for = max(0.0, self.party.circuit._not_before.get(HERE, 0.0) - self.party.time.now)
        assert asked_for <= 300
        self._run(self.party.time.go_on(asked_for + 2 + 20))
        assert not self.party.circuit.refuses(HERE)
        assert self.party.circuit._absences == {}
        assert all(call.done() for call in self.calls)
        assert self.lines == [] or self.lines[-1]["event"] == "party_back"

    @invariant()
    def the_lines_take_turns(self) -> None:
        turns = itertools.cycle(["party_away", "party_back"])
        assert told(self.lines) == list(itertools.islice(turns, len(self.lines)))

    @invariant()
    def whoever_is_refused_will_be_told(self) -> None:
        away = bool(self.lines) and self.lines[-1]["event"] == "party_away"
        assert self.party.circuit.refuses(HERE) <= away
        assert self.party.backs == told(self.lines).count("party_back")

    def teardown(self) -> None:
        async def end() -> None:
            await self.party.circuit.close()
            for call in self.calls:
                call.cancel()
            results = await asyncio.gather(*self.calls, return_exceptions=True)
            assert all(
                each is None or isinstance(each, OvationUnavailable | asyncio.CancelledError) for each in results
            )

        self._run(end())
        self.loop.close()
        self.captured.__exit__(None, None, None)
        structlog.reset_defaults()


TestOutages = Outages.TestCase
