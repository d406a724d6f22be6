"""The promise, checked by one function.

Every accepted trigger ends in exactly one terminal run, with its logs and its verified outputs on the Activity once
each; no container starts twice for one attempt; nothing of a run is left behind. That it takes no more than 60 seconds
after the last fault is measured where the fault is cleared: `tests.chaos.harness`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from tests import promise_database
from tests.chaos import delivered, remains
from tests.lab import Lab
from tests.promise_database import Row, named

QUIET_SECONDS = 15.0
"""How long what is under way may take to come to rest before it counts as left behind."""

_START = re.compile(r'source=[^"]*/jobs/([^/"]+)/run-(\d+)/outputs"')


@dataclass(frozen=True, slots=True)
class Expected:
    """What an Activity is to come to: so many runs, each ended so, each with exactly these files, logs among them."""

    files: Mapping[str, bytes]
    runs: int = 1
    state: str = "succeeded"


@dataclass(frozen=True, slots=True)
class Scene:
    """Where to look: Ovation's side, the database, the machine.

    `starts` has a line for each container that was started (`tests.chaos.harness` writes it), `agents` are the
    processes that may be alive, `logs` are what agents wrote.
    """

    lab: Lab
    database_url: str
    directory: Path
    data_dirs: Sequence[Path]
    temporary: Sequence[Path]
    starts: Path
    agents: frozenset[int] = frozenset()
    logs: Sequence[Path] = ()


async def check_promise(scene: Scene, expected: Mapping[str, Expected], quiet_seconds: float = QUIET_SECONDS) -> None:
    """Check everything, by Activity id; what is under way gets a moment to come to rest.

    Raises:
        AssertionError: it names each violation.
    """
    deadline = time.monotonic() + quiet_seconds
    while found := await violations(scene, expected):
        if time.monotonic() > deadline:
            listed = "\n  ".join(found)
            raise AssertionError(f"the promise is broken, {len(found)} times:\n  {listed}")
        await asyncio.sleep(0.25)


async def violations(scene: Scene, expected: Mapping[str, Expected]) -> list[str]:
    """Return each violation as it is at this moment."""
    connection = await asyncpg.connect(scene.database_url)
    try:
        jobs = await connection.fetch("SELECT * FROM jobs ORDER BY created_at")
        found = [*_runs(jobs, expected), *await promise_database.violations(connection.fetch)]
    finally:
        await connection.close()
    found += _starts(jobs, scene.starts)
    found += delivered.violations(scene.lab, jobs, {key: each.files for key, each in expected.items()})
    found += remains.on_disk(scene.data_dirs, scene.temporary)
    found += remains.processes(scene.directory, scene.agents)
    found += _complaints(scene.logs)
    return found


def _runs(jobs: Sequence[Row], expected: Mapping[str, Expected]) -> Iterator[str]:
    """One terminal run for each trigger, ended as it should."""
    of_activity = defaultdict(list)
    for job in jobs:
        of_activity[job["activity_id"]].append(job)
    for activity_id in of_activity.keys() - expected.keys():
        yield f"Activity {activity_id}: nobody asked for its runs"
    for activity_id, wanted in expected.items():
        runs = of_activity[activity_id]
        if len(runs) != wanted.runs:
            yield f"Activity {activity_id}: {len(runs)} runs, {wanted.runs} expected"
        for job in runs:
            if job["state"] != wanted.state:
                reason = job["fault_message"] or job["waiting_for"] or "no reason"
                yield f"{named(job)}: {job['state']}, {wanted.state} expected ({reason})"


def _starts(jobs: Sequence[Row], record: Path) -> Iterator[str]:
    """Each launch of each job started its container once; what succeeded was started at all."""
    lines = record.read_text().splitlines() if record.exists() else []
    started = Counter(match.groups() for line in lines if (match := _START.search(line)))
    known = {str(job["id"]) for job in jobs}
    for (job_id, launch), times in sorted(started.items()):
        if times > 1:
            yield f"job {job_id}: the container of run-{launch} was started {times} times"
        if job_id not in known:
            yield f"job {job_id}: a container was started, and there is no such job"
    for job in jobs:
        launch = str(job["launch"])
        if job["exit_code"] is not None and started[str(job["id"]), launch] == 0:
            yield f"{named(job)}: {job['state']}, but the container of run-{launch} was never started"


def _complaints(logs: Iterable[Path]) -> Iterator[str]:
    """No agent met a bug of its own: those are told with a traceback."""
    for log in logs:
        text = log.read_text()
        for line in text.splitlines():
            if "step_failed" in line or "look_failed" in line:
                yield f"{log.name}: {line}"
        if "Traceback" in (plain := "\n".join(line for line in text.splitlines() if not line.startswith("{"))):
            yield f"{log.name}: {plain}"
