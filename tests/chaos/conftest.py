"""What the tests of the chaos suite share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.chaos import harness, recovery
from tests.chaos.harness import Chaos
from tests.chaos.zygote import Zygote


@pytest.fixture(autouse=True)
def _tell_recoveries(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the table tell how long recovery took in this test."""
    yield
    recovery.tell(request.node)


@pytest.fixture(scope="session")
def long_form() -> bool:
    """Whether this is `make chaos`, which takes the time that it takes."""
    return os.environ.get("CHAOS") == "long"


@pytest.fixture(scope="session")
def seed() -> int:
    """What chance begins with: CHAOS_SEED, which `tests/conftest.py` chooses."""
    return int(os.environ["CHAOS_SEED"])


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
