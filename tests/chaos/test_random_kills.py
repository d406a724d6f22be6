"""The agent is killed at random moments while Activities keep coming."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from tests.chaos.harness import Chaos
from tests.chaos.work import FAILING, LARGE, SMALL

_LONGEST_LIFE_SECONDS = 2.5
_KILLS_IN_A_ROW = 4  # a job in whose step the process dies six times is set aside: that is another test's business


@pytest.mark.timeout(7200)
async def test_kills_at_random_moments(chaos: Chaos, seed: int, *, long_form: bool) -> None:
    chance = random.Random(seed)  # noqa: S311 repeatable, not secret
    rounds, recoveries = (26, 5) if long_form else (1, 3)
    for _ in range(rounds):
        for _ in range(recoveries):
            await _kill_often(chaos, chance)
            chaos.begin()
            await chaos.recovered("random kills")
            await chaos.kill()
        await chaos.start()
        await chaos.check()
        await chaos.stop()


async def _kill_often(chaos: Chaos, chance: random.Random) -> None:
    people = asyncio.create_task(_activities(chaos, chance))
    for _ in range(_KILLS_IN_A_ROW):
        chaos.begin()
        await asyncio.sleep(chance.uniform(0.05, _LONGEST_LIFE_SECONDS))
        await chaos.kill()
    people.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await people


async def _activities(chaos: Chaos, chance: random.Random) -> None:
    """Make Activities, one after the other, until cancelled."""
    while True:
        chaos.activity(chance.choices([SMALL, FAILING, LARGE], [12, 2, 1])[0])
        await asyncio.sleep(chance.expovariate(1))
