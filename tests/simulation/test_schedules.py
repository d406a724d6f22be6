"""Schedules by the hundred: whatever happens, the promise holds.

`SIM_SEED=123 pytest tests/simulation` replays one. With `CHAOS=long` there are a thousand, other ones each time.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from tests.simulation.database import Server
from tests.simulation.schedule import Result, simulate

_BATCH = 10
_LONG = os.environ.get("CHAOS") == "long"
_FIRST = secrets.randbelow(10**9) if _LONG else 1
_SCHEDULES = 1000 if _LONG else 100
_REPLAYED = [int(seed) for seed in os.environ.get("SIM_SEED", "").split(",") if seed]


def _batches() -> list[list[int]]:
    seeds = _REPLAYED or list(range(_FIRST, _FIRST + _SCHEDULES))
    return [seeds[start : start + _BATCH] for start in range(0, len(seeds), _BATCH)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seeds", _batches(), ids=lambda seeds: f"seeds {seeds[0]} to {seeds[-1]}")
def test_the_promise_holds(seeds: list[int], server: Server, memory: Path) -> None:
    broken = [result for seed in seeds if (result := simulate(seed, server, memory)).broken]
    if broken:
        pytest.fail(_report(broken), pytrace=False)


def _report(broken: list[Result]) -> str:
    others = "\n".join(f"seed {result.seed}: {result.broken[0]}" for result in broken[1:])
    return f"{broken[0].report()}\n{others}"
