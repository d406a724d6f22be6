"""The database of the simulations, one for the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.database import Server
from tests.simulation.place import in_memory


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A directory in memory, where there is one."""
    with in_memory() as directory:
        yield directory


@pytest.fixture(scope="session")
def server(memory: Path) -> Iterator[Server]:
    """The database."""
    opened = Server(memory)
    try:
        yield opened
    finally:
        opened.close()
