"""Launching: an image is inspected once, however many jobs run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from agent.adapters.executor import NotStarted, Running
from agent.db.jobs import Claim
from agent.domain.job import Done, Failed, Job, State
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

    def __init__(self, bad: Mapping[bytes, str]) -> None:
        self.inspected: list[Path] = []
        self._bad = bad

    async def status(self, _: object) -> NotStarted:
        return NotStarted()

    async def inspect(self, image: Path) -> None:
        self.inspected.append(image)
        if complaint := self._bad.get(image.read_bytes()):
            raise ImageError(complaint)

    async def start(self, _: object) -> Running:
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
        assert await launch(context, claim, Control()) == Done(native_id="1", started_at=_NOW)
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
