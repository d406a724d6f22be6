"""Launching: an image is inspected once, however many jobs run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from agent.adapters.executor import ImageFacts, NotStarted, Running, RunRequest
from agent.db.jobs import Claim
from agent.domain.job import Done, Failed, Job, State
from agent.domain.resources import Resources
from agent.domain.workdir import Layout
from agent.errors import ImageError
from agent.pipeline.context import Context, Control
from agent.pipeline.launch import launch
from agent.pipeline.staged import Staged, append, prepare
from agent.settings import AgentSettings
from tests.workers import PLAN

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_JOB = Job("", 0, "activity-1", "An Activity", "project-1", 1, PLAN, State.LAUNCHING, 0, "webhook", None, _NOW)


class _Executor:
    """Starts nothing, and notes what it is asked to inspect."""

    def __init__(self, bad: Mapping[bytes, str], labels: Mapping[str, str] | None = None) -> None:
        self.inspected: list[Path] = []
        self.started: list[RunRequest] = []
        self._bad = bad
        self._labels = dict(labels or {})

    async def status(self, _: object) -> NotStarted:
        return NotStarted()

    async def inspect(self, image: Path) -> ImageFacts:
        self.inspected.append(image)
        if complaint := self._bad.get(image.read_bytes()):
            raise ImageError(complaint)
        return ImageFacts(self._labels, "", "apptainer version 1")

    async def cannot_keep(self, resources: Resources) -> list[str]:
        return ["There is no GPU here."] if resources.gpus else []

    async def start(self, request: RunRequest) -> Running:
        self.started.append(request)
        return Running("1", _NOW)


def _context(data_dir: Path, executor: _Executor) -> Context:
    nothing = cast("Any", None)
    values = dict.fromkeys(Context.__dataclass_fields__, nothing)
    return Context(**{**values, "settings": AgentSettings(data_dir=data_dir), "executor": cast("Any", executor)})


def _claim(data_dir: Path, job_id: str, image: bytes, sha256: str | None) -> Claim:
    root = Path(Layout(data_dir.absolute(), job_id).root)
    prepare(root)
    (root / "related" / PLAN.image.file_name).write_bytes(image)
    if sha256 is not None:
        name, kind = PLAN.image.file_name, PLAN.image.type
        append(root, [Staged("related", name, name, kind, PLAN.image.entity_id, len(image), sha256)])
    return Claim(replace(_JOB, id=job_id), 1)


async def test_the_same_bytes_are_inspected_once(tmp_path: Path) -> None:
    executor = _Executor({})
    context = _context(tmp_path, executor)
    for number, sha256 in enumerate(["one", "one", "another", "one"]):
        claim = _claim(tmp_path, f"job-{number}", b"image", sha256)
        outcome = await launch(context, claim, Control())
        assert isinstance(outcome, Done)
        assert (outcome.native_id, outcome.started_at) == ("1", _NOW)
    assert [path.parent.parent.name for path in executor.inspected] == ["job-0", "job-2"]
    other = _Executor({})
    await launch(_context(tmp_path, other), _claim(tmp_path, "job-9", b"image", "one"), Control())
    assert len(other.inspected) == 1  # another runtime may think otherwise


@pytest.mark.parametrize("sha256", ["one", None])
async def test_a_bad_image_is_inspected_each_time(tmp_path: Path, sha256: str | None) -> None:
    executor = _Executor({b"bad": "There is no default command."})
    context = _context(tmp_path, executor)
    for number in range(2):
        outcome = await launch(context, _claim(tmp_path, f"job-{number}", b"bad", sha256), Control())
        assert isinstance(outcome, Failed)
        assert outcome.final
        assert "There is no default command." in outcome.fault.message
    assert len(executor.inspected) == 2


async def test_bytes_that_nobody_has_hashed_are_inspected_each_time(tmp_path: Path) -> None:
    executor = _Executor({})
    context = _context(tmp_path, executor)
    for number in range(2):
        await launch(context, _claim(tmp_path, f"job-{number}", b"image", None), Control())
    assert len(executor.inspected) == 2


async def test_a_run_gets_what_its_activity_and_its_image_wish_for_within_the_limits(tmp_path: Path) -> None:
    executor = _Executor({}, {"compute.cpus": "64", "compute.memory": "2G"})
    context = _context(tmp_path, executor)
    settings = AgentSettings(data_dir=tmp_path, max_cpus=8, gpus=1, time_limit_seconds=7200)
    context = replace(context, settings=settings)
    for number in range(2):  # the second time the image's labels are known
        claim = _claim(tmp_path, f"job-{number}", b"image", "wishes")
        plan = replace(PLAN, wishes={"compute.time": "1h"})
        outcome = await launch(context, Claim(replace(claim.job, plan=plan), 1), Control())
        assert isinstance(outcome, Done)
        given = {"cpus": 8, "memory_bytes": 2 << 30, "gpus": 1, "time_seconds": 3600}
        assert outcome.resources == {
            "asked": {"cpus": 64, "memory_bytes": 2 << 30, "time_seconds": 3600},
            "granted": given,
            "notes": [
                "compute.cpus: 64 CPUs were asked for, 8 CPUs are allowed here",
                "There is no GPU here.",
            ],
        }
        assert executor.started[-1].resources == Resources(**given)
        assert executor.started[-1].time_limit_seconds == 3600
        kept = replace(claim.job, resources=outcome.resources)
        assert context.run_request(kept) == executor.started[-1]  # as whoever watches it sees it
    assert len(executor.inspected) == 1
