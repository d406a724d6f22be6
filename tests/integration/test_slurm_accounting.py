"""What became of a run that the controller has forgotten: with Slurm's accounting, and when that dies half-way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapters.executor import Ending, Running
from agent.errors import ExecutorUnavailable
from tests.integration.test_slurm import Run, a_run, killed_at_the_end
from tests.slurm import Cluster, cluster
from tests.slurm import until as until_sync

FORGETS_SECONDS = 2


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster(accounting=True, min_job_age=FORGETS_SECONDS) as made:
        yield made


def state(slurm: Cluster, job_id: str) -> str:
    return slurm.run("sacct", "-nXP", f"--jobs={job_id}", "--format=State").strip()


async def forgotten(slurm: Cluster, run: Run) -> None:
    """Wait until the controller does not know the run's job any more; it forgets when it looks, twice a minute."""
    await asyncio.to_thread(until_sync, lambda: run.request.name not in slurm.jobs(), "forgotten", 90)


async def test_why_a_forgotten_run_ended_is_asked_of_the_accounting(tmp_path: Path, slurm: Cluster) -> None:
    cancelled, killed = a_run(tmp_path / "cancelled", slurm), a_run(tmp_path / "killed", slurm)
    async with killed_at_the_end(cancelled), killed_at_the_end(killed):
        job_id = await cancelled.begin()
        await killed.begin()
        slurm.run("scancel", job_id)
        killed.kill_all()
        for run in (cancelled, killed):
            await forgotten(slurm, run)
        assert "CANCELLED" in state(slurm, job_id)
        # Nobody has looked meanwhile: these have seen nothing of it.
        ends = [await a_look(run, slurm).end() for run in (cancelled, killed)]
    assert ends[0].ending is Ending.OUTSIDE
    assert "scancel" in (ends[0].detail or "")
    assert ends[1].ending is Ending.LOST


async def test_a_run_goes_on_and_is_judged_although_the_accounting_dies(tmp_path: Path, slurm: Cluster) -> None:
    run, lost = a_run(tmp_path / "goes-on", slurm), a_run(tmp_path / "lost", slurm)
    async with killed_at_the_end(run), killed_at_the_end(lost):
        await run.begin()
        await lost.begin()
        assert "answers" in await run.executor.client.accounting()
        slurm.kill("slurmdbd")
        try:
            with pytest.raises(ExecutorUnavailable, match="sacct: "):
                await run.executor.client.accounting()
            begun_without = a_run(tmp_path / "begun-without", slurm)
            await begun_without.begin()
            begun_without.go_on()
            assert (await begun_without.end()).exit_code == 3
            lost.kill_all()
            await forgotten(slurm, lost)
            end = await a_look(lost, slurm).end()
            assert end.ending is Ending.LOST  # by its silence, and by the controller that does not know it
            assert isinstance(await run.executor.status(run.request), Running)
        finally:
            slurm.start_accounting()
        run.go_on()
        assert (await run.end()).exit_code == 3
    assert run.times() == begun_without.times() == 1


async def test_an_accounting_that_hangs_holds_up_nobody(tmp_path: Path, slurm: Cluster) -> None:
    lost, run = a_run(tmp_path / "lost", slurm), a_run(tmp_path / "run", slurm)
    async with killed_at_the_end(lost), killed_at_the_end(run):
        await lost.begin()
        await run.begin()
        lost.kill_all()
        await forgotten(slurm, lost)
        slurm.freeze("slurmdbd")
        try:
            looks = asyncio.create_task(lost.executor.status(lost.request))
            began = time.monotonic()
            run.go_on()
            assert (await run.end()).exit_code == 3
            assert time.monotonic() - began < 20
            assert not looks.done() or not isinstance(looks.result(), Exception)
        finally:
            slurm.thaw("slurmdbd")
        await looks
        assert (await lost.end()).ending is Ending.LOST


def a_look(run: Run, slurm: Cluster) -> Run:
    """Return the same run as an agent that has just started sees it."""
    fresh = a_run(run.request.directory / "unused", slurm)
    return Run(run.request, fresh.executor, run.mark)
