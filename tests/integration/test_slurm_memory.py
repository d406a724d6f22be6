"""Runs on a Slurm that keeps its jobs to their memory: what takes more is ended, and said to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.adapters.executor import Ending
from agent.domain.container import judge
from agent.domain.job import FaultClass
from agent.domain.resources import Resources
from tests.containers import make_request, until
from tests.integration.test_slurm import a_run, killed_at_the_end
from tests.slurm import Cluster, can_keep_memory, cluster


@pytest.fixture(scope="module")
def thrifty() -> Iterator[Cluster]:
    with cluster(keeps_memory=True) as made:
        yield made


_TAKES_MEMORY = "x=$(head -c 200000000 /dev/zero | tr '\\0' a); echo ${#x}"


@pytest.mark.skipif(not can_keep_memory(), reason="Slurm cannot keep jobs to their memory on this machine")
async def test_a_run_that_takes_more_memory_than_it_was_given(tmp_path: Path, thrifty: Cluster) -> None:
    run = a_run(tmp_path, thrifty)
    request = make_request(tmp_path / "takes", _TAKES_MEMORY)
    run.request = replace(
        request, name=run.request.name, time_limit_seconds=600, resources=Resources(memory_bytes=64 << 20)
    )
    await run.executor.start(run.request)
    end = await run.end()
    judgement = judge(end.ending, end.exit_code, run.request.stderr.read_text(), detail=end.detail)
    assert judgement.fault is not None
    assert judgement.fault.cls is FaultClass.MEMORY
    await until(lambda: thrifty.jobs()[run.request.name] == "OUT_OF_MEMORY")


@pytest.mark.skipif(not can_keep_memory(), reason="Slurm cannot keep jobs to their memory on this machine")
async def test_a_run_whose_runner_memory_took_along(tmp_path: Path, thrifty: Cluster) -> None:
    run = a_run(tmp_path, thrifty)
    script = f"( {_TAKES_MEMORY} ); echo begun; while [ ! -e /inputs/go ]; do sleep 0.05; done"
    request = make_request(tmp_path / "takes", script)
    run.request = replace(
        request, name=run.request.name, time_limit_seconds=600, resources=Resources(memory_bytes=64 << 20)
    )
    async with killed_at_the_end(run):
        await run.begin()  # by now something of it was killed
        run.kill_all()
        end = await run.end()
    assert end.ending is Ending.MEMORY
    assert "more memory" in (end.detail or "")
