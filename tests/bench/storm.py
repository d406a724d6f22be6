"""100,000 deliveries for 1,000 Activities, doubled, shuffled, late, with removals: one run a real change.

    python -m tests.bench.storm

The full size of tests/integration/test_storm.py, on Debian's PostgreSQL and the sandbox. Exits with 1 when some
Activity had another number of runs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import structlog

from agent.db.database import Database
from tests.integration.test_storm import storm
from tests.postgres import debian_server

PHASES = 5


async def bench(activities: int, deliveries: int) -> int:
    """Run the storm and say what came of it."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    with debian_server() as url, tempfile.TemporaryDirectory() as directory:
        database = await Database.open(url, "the bench database")
        await database.migrate()
        began = time.monotonic()
        changes, runs = await storm(
            Path(directory), database, activities=activities, phases=PHASES, deliveries=deliveries
        )
        seconds = time.monotonic() - began
        await database.close()
    wrong = [activity for activity in changes if runs.get(activity) != changes[activity]]
    print(  # noqa: T201 a bench prints
        f"{deliveries} deliveries for {activities} Activities in {seconds:.0f} s:"
        f" {sum(changes.values())} real changes, {sum(runs.values())} runs, {len(wrong)} Activities with another number"
    )
    return 1 if wrong else 0


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activities", type=int, default=1_000)
    parser.add_argument("--deliveries", type=int, default=100_000)
    options = parser.parse_args()
    sys.exit(asyncio.run(bench(options.activities, options.deliveries)))


if __name__ == "__main__":
    main()
