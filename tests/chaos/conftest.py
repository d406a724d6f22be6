"""What the tests of the chaos suite share, and the table of how long recovery took."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.chaos import harness
from tests.chaos.harness import PROMISED_SECONDS, RECOVERIES, Chaos
from tests.chaos.zygote import Zygote

LONG = os.environ.get("CHAOS") == "long"
SEED = int(os.environ.get("CHAOS_SEED") or (secrets.randbelow(1_000_000) if LONG else 1))


@pytest.fixture(scope="session")
def long_form() -> bool:
    """Whether this is `make chaos`, which takes the time that it takes."""
    return LONG


@pytest.fixture(scope="session")
def seed() -> int:
    """What chance begins with: CHAOS_SEED, or always the same in the short form."""
    return SEED


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Where agents come from."""
    with Zygote() as started:
        yield started


@pytest.fixture
async def chaos(tmp_path: Path, zygote: Zygote, embedded_url: str) -> AsyncIterator[Chaos]:
    """The harness, with a database of the test's own."""
    async with harness.chaos(tmp_path, zygote, embedded_url) as opened:
        yield opened


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long it took to recover, against what is promised."""
    if not RECOVERIES:
        return
    terminalreporter.section(f"recovery after the last fault: {PROMISED_SECONDS:.0f} s are promised")
    terminalreporter.write_line(f"{'scenario':<48} {'faults':>6} {'jobs':>6} {'times':>6} {'slowest':>8}")
    for scenario in dict.fromkeys(each.scenario for each in RECOVERIES):
        found = [each for each in RECOVERIES if each.scenario == scenario]
        faults, jobs = max(each.faults for each in found), max(each.jobs for each in found)
        slowest = max(each.seconds for each in found)
        late = "" if slowest <= PROMISED_SECONDS else "  too late"
        terminalreporter.write_line(f"{scenario:<48} {faults:>6} {jobs:>6} {len(found):>6} {slowest:>6.1f} s{late}")
    terminalreporter.write_line(f"CHAOS_SEED={SEED}")
