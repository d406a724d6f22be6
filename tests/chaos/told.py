"""What agents told, in their logs and in the database, of what befell them."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from typing import Any

from tests.agents import until
from tests.chaos.harness import Chaos


def lines(chaos: Chaos, event: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of all logs, of one event if named; those of one life are in order."""
    written = [line for log in chaos.logs for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in map(json.loads, written) if event is None or line["event"] == event]


def warnings(chaos: Chaos) -> list[dict[str, Any]]:
    """Return what an operator is to read: warnings, and worse."""
    return [line for line in lines(chaos) if line["level"] not in {"debug", "info"}]


def parties(chaos: Chaos) -> list[tuple[str, str]]:
    """Return which outside parties were told to be away and back, in order."""
    told = [*lines(chaos, "party_away"), *lines(chaos, "party_back")]
    return [(line["event"], line["party"]) for line in sorted(told, key=lambda line: str(line["timestamp"]))]


async def attempts(chaos: Chaos) -> int:
    """Return the most attempts that any step of any job has used."""
    async with chaos.database() as connection:
        return int(await connection.fetchval("SELECT coalesce(max(attempt), 0) FROM job_events"))


async def reaches(chaos: Chaos, activity_id: str, states: AbstractSet[str]) -> None:
    """Wait until an Activity's run is in one of these states."""
    async with chaos.database() as connection:

        async def look() -> bool | None:
            query = "SELECT true FROM jobs WHERE activity_id = $1 AND state = ANY($2::text[])"
            found: bool | None = await connection.fetchval(query, activity_id, list(states))
            return found

        await until(look, f"a run in {', '.join(sorted(states))}", chaos.logs[-1])
