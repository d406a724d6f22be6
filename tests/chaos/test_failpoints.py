"""The agent is killed before and after everything that it does for good, each time in a life of its own."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.chaos.harness import Chaos, chaos
from tests.chaos.play import at_once
from tests.chaos.walk import Death, NeverReached, Way, deaths, die, live, spread
from tests.chaos.zygote import Zygote

_CHAINS = 3  # side by side: most of a life is waiting
_FILES_SHARE = 8  # of the points of files, the short form takes one in so many

_DEATHS_IN_A_ROW = 4  # a job in whose step the process dies six times is set aside: that is another test's business

Walked = tuple[list[str], dict[str, tuple[Death, Death]]]


@pytest.mark.timeout(7200)
async def test_the_promise_at_every_failpoint(
    tmp_path: Path, zygote: Zygote, embedded_url: str, seed: int, *, long_form: bool
) -> None:
    async with AsyncExitStack() as stack:
        places = [tmp_path / f"chain-{number}" for number in range(1, _CHAINS + 1)]
        chains = [await stack.enter_async_context(chaos(place, zygote, embedded_url)) for place in places]
        lives = await asyncio.gather(
            live(chains[0], Way.FRESH, Way.IDLE, Way.SMALL, Way.LARGE),
            live(chains[1], Way.FRESH, Way.SLOW, Way.STOP),
        )
        known = deaths([life for some in lives for life in some])
        chosen = [each for death in known for each in death.both] if long_form else _some(known, seed)
        missed, further = await _walk_all(chains, spread(chosen), {death.point for death in known})
        if long_form:
            await _walk_further(chains[0], further)
        print(f"{len(chosen)} deaths at {len(known)} points")  # noqa: T201 for whoever looks at the test's output
        assert not missed, "never reached:\n  " + "\n  ".join(missed)
        await at_once({chain.directory.name: _end(chain) for chain in chains})


def _some(known: Sequence[Death], seed: int) -> list[Death]:
    """Choose all points of statements, requests and programs, and some of those of files."""
    chance = random.Random(seed)  # noqa: S311 repeatable, not secret
    files = [death for death in known if death.point.startswith("file:")]
    taken = set(chance.sample(files, len(files) // _FILES_SHARE))
    return [death for death in known if death in taken or death not in files]


async def _walk_all(chains: Sequence[Chaos], chosen: Sequence[Death], known: set[str]) -> Walked:
    """Deal the deaths to the chains; return those that did not come, and points that only lives after others meet."""
    walked = await asyncio.gather(
        *(_walk(chain, chosen[number :: len(chains)], known) for number, chain in enumerate(chains))
    )
    missed = [each for missed, _ in walked for each in missed]
    further: dict[str, tuple[Death, Death]] = {}
    for _, more in walked:
        further = {**more, **further}
    return missed, further


async def _walk(chain: Chaos, chosen: Sequence[Death], known: set[str]) -> Walked:
    missed = []
    further: dict[str, tuple[Death, Death]] = {}
    for number, death in enumerate(chosen):
        if number % _DEATHS_IN_A_ROW == 0:
            await _heal(chain)
        began = time.monotonic()
        try:
            agent = await die(chain, death)
        except NeverReached as error:
            missed.append(str(error))
            continue
        print(f"{time.monotonic() - began:6.2f} s  {death}")  # noqa: T201 for whoever looks at the test's output
        before = chosen[max(0, number - 1)]
        further |= {point: (before, death) for point in agent.points if point not in known | further.keys()}
    return missed, further


async def _walk_further(chain: Chaos, further: dict[str, tuple[Death, Death]]) -> None:
    """Die once more on the way back from a death: at the points that only a life after another one comes past.

    Whether it comes past them depends on where exactly the one before died, so that some may not be met again.
    """
    for point, (before, death) in further.items():
        await _heal(chain)
        await die(chain, before)
        try:
            await die(chain, Death(point, death.way))
        except NeverReached:
            print(f"not met again: {point} after {before}")  # noqa: T201 for whoever looks at the test's output


async def _heal(chain: Chaos) -> None:
    """Lead a life in which everything is done that others left."""
    chain.begin()
    await chain.recovered(f"failpoints, {chain.directory.name}")
    await chain.stop()


async def _end(chain: Chaos) -> None:
    """Let every agent come back, also those that died in their first life, and check what is promised."""
    await _heal(chain)
    await asyncio.gather(*(chain.start(name) for name in list(chain.agents)))
    await chain.check()
    await chain.stop()
