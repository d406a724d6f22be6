"""What people are told that a job waits for."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.adapters.executor import Ended, Ending, Running, Status
from agent.db.jobs import Claim
from agent.domain.job import Done, State
from agent.pipeline.context import Context, Control
from agent.pipeline.watch import watch
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


async def test_a_run_that_has_ended_waits_for_nothing(tmp_path: Path) -> None:
    """It may have waited until a moment ago, and run for less than one look."""
    (tmp_path / "stderr.log").touch()
    answers: list[Status] = [Running("7", None, "Slurm: resources"), Ended(Ending.EXITED, 0, NOW, NOW, None)]
    seen = []

    async def wait(_request: object, _seconds: float, told: Running) -> Status:
        seen.append((told.waiting_for, control.progress.waiting_for))
        return answers.pop(0)

    request = SimpleNamespace(stderr=tmp_path / "stderr.log", time_limit_seconds=60, max_log_bytes=1000)
    context = SimpleNamespace(run_request=lambda _job: request, executor=SimpleNamespace(wait=wait))
    control = Control()
    outcome = await watch(cast("Context", context), Claim(JOB, 1), control)
    assert isinstance(outcome, Done)
    assert seen == [(None, None), ("Slurm: resources", "Slurm: resources")]
    assert control.progress.waiting_for is None
