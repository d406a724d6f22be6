"""What people are told that a job waits for."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from agent.domain.job import State
from agent.web.jobs import waits
from tests.unit.test_job import JOB

NOW = datetime(2026, 1, 2, tzinfo=UTC)
AWAY = "waiting for the object store: it is away"
PASSING = {"bytes_done": 5, "bytes_total": 9, "bytes_per_second": 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"waiting_for": AWAY}, AWAY),
        ({"waiting_for": AWAY, "held_until": NOW}, AWAY),  # it is tried again
        ({"waiting_for": AWAY, "held_until": NOW, "progress": PASSING}, None),  # and it works
        ({"waiting_for": AWAY, "progress": PASSING}, AWAY),  # that was before
        ({"held_until": NOW, "progress": {"waiting_for": "Slurm: resources"}}, "Slurm: resources"),
        ({"state": State.SUCCEEDED, "host": "a", "host_is_gone": True}, None),
    ],
)
def test_what_a_job_waits_for(changes: dict[str, Any], said: str | None) -> None:
    assert waits(replace(JOB, **changes)) == said


def test_a_job_whose_machine_is_gone_waits_for_its_agent() -> None:
    gone = replace(JOB, waiting_for=AWAY, host="n1", host_is_gone=True, host_seen_at=NOW)
    assert waits(gone) == "waiting for the agent on n1, which has the run's files (last seen 2026-01-02 00:00 UTC)"
