"""The simulation itself: a seed says all that happens, and what is broken in the agent is found."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.chance import Chance
from tests.simulation.database import Server
from tests.simulation.planted import PLANTS, Plant
from tests.simulation.schedule import simulate
from tests.simulation.trouble import kinds

_SEEDS_TO_FIND_IT = 60


@pytest.mark.parametrize("seed", [7, 42])
def test_a_seed_says_all_that_happens(seed: int, server: Server, memory: Path) -> None:
    first = simulate(seed, server, memory)
    other = simulate(seed + 1000, server, memory)
    second = simulate(seed, server, memory)
    assert len(first.log) > 20
    assert first.log == second.log
    assert first.digest == second.digest != other.digest


def test_another_process_does_the_same(server: Server, memory: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "12345"}
    seed = 3
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--digest", str(seed)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.stdout.split() == [simulate(seed, server, memory).digest], done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_is_found(plant: Plant, server: Server, memory: Path) -> None:
    fitting = (seed for seed in itertools.count(1) if plant.needs <= set(kinds(Chance(seed))))
    for seed in itertools.islice(fitting, _SEEDS_TO_FIND_IT):
        with plant.planted():
            result = simulate(seed, server, memory)
        if any(plant.sign in each for each in result.broken):
            return
    pytest.fail(f"none of {_SEEDS_TO_FIND_IT} seeds finds it")
