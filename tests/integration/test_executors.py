"""What is promised of every executor, on each of them: containers on this machine, and batch jobs of a real Slurm."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.adapters import runner
from agent.adapters.executor import Ended, Ending, Executor, NotStarted, Running, RunRequest
from agent.adapters.local import LocalExecutor
from agent.adapters.slurm import SlurmExecutor
from agent.domain.container import judge
from agent.domain.job import FaultClass
from agent.errors import ImageError
from tests.containers import QUICK, container_pid, make_request, processes_with, runner_pid, until
from tests.images import images
from tests.slurm import Cluster, cluster, quick

Make = Callable[[], Executor]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest.fixture(params=["local", "slurm"])
def make(request: pytest.FixtureRequest) -> Make:
    """Make an executor, as each agent that starts makes one."""
    if request.param == "local":
        return lambda: LocalExecutor(QUICK)
    made: Cluster = request.getfixturevalue("slurm")
    return lambda: SlurmExecutor(quick(), made.environment)


def a_run(place: Path, script: str, **settings: float) -> RunRequest:
    request = make_request(place, script, **settings)  # type: ignore[arg-type]
    return replace(request, name=f"ovation-{uuid.uuid4()}-1")


async def ended(executor: Executor, request: RunRequest) -> Ended:
    status = await executor.wait(request, 60)
    assert isinstance(status, Ended), status
    return status


async def begun(executor: Executor, request: RunRequest) -> None:
    """Start a run, and wait until its script has begun."""
    await executor.start(request)
    await until(lambda: request.stdout.exists() and "begun" in request.stdout.read_text())


async def test_it_checks_itself(make: Make) -> None:
    assert "apptainer version" in await make().check()


async def test_the_default_command_runs_once_with_its_inputs(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "cat /inputs/word; echo error >&2; pwd > /outputs/where; exit 3")
    (tmp_path / "inputs/word").write_text("hello\n")
    executor = make()
    assert isinstance(await executor.status(request), NotStarted)
    started = await executor.start(request)
    end = await ended(executor, request)
    assert (end.ending, end.exit_code) == (Ending.EXITED, 3)
    assert (request.stdout.read_text(), request.stderr.read_text()) == ("hello\n", "error\n")
    assert (request.outputs / "where").read_text() == "/outputs\n"
    assert isinstance(started, Running)
    assert started.native_id
    assert await executor.start(request) == end == await executor.status(request)


async def test_usage_and_times_are_recorded(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; sleep 0.3")
    executor = make()
    await executor.start(request)
    end = await ended(executor, request)
    assert end.usage is not None
    assert end.usage.wall_seconds > 0.3
    assert end.usage.user_seconds > 0.01
    assert end.usage.peak_memory_bytes > 100_000
    assert end.started_at is not None
    assert end.finished_at is not None
    assert (end.finished_at - end.started_at).total_seconds() == pytest.approx(end.usage.wall_seconds, abs=1)


async def test_starts_at_the_same_time_make_one_run(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "echo begun; sleep 1; echo x >> /outputs/times")
    await asyncio.gather(*(make().start(request) for _ in range(4)))
    assert (await ended(make(), request)).exit_code == 0
    assert (request.outputs / "times").read_text() == "x\n"
    assert request.stdout.read_text() == "begun\n"


async def test_the_next_agent_finds_it(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "echo begun; sleep 1.5; echo x >> /outputs/times")
    await begun(make(), request)
    again = make()
    assert isinstance(await again.status(request), Running)
    assert isinstance(await again.start(request), Running)
    assert (await ended(again, request)).exit_code == 0
    assert (request.outputs / "times").read_text() == "x\n"
    assert (await ended(make(), request)).exit_code == 0


async def test_waiting_ends_at_its_timeout(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "echo begun; sleep 30")
    executor = make()
    await begun(executor, request)
    assert isinstance(await executor.wait(request, 0.3), Running)
    await executor.cancel(request)
    await ended(executor, request)


async def test_cancelled_it_ends_with_all_inside_and_keeps_its_logs(tmp_path: Path, make: Make) -> None:
    mark = f"{uuid.uuid4().int % 900_000 + 100_000}.25"
    request = a_run(tmp_path, f"sleep {mark} & setsid sleep {mark} & echo begun; sleep {mark}")
    executor = make()
    await begun(executor, request)
    await until(lambda: len(processes_with(mark)) == 3)
    await executor.cancel(request)
    end = await ended(executor, request)
    assert end.ending is Ending.CANCELLED
    assert request.stdout.read_text() == "begun\n"
    await until(lambda: not processes_with(mark))
    await executor.cancel(request)  # harmless
    assert await executor.status(request) == end


async def test_cancelled_at_once_it_is_cancelled(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "sleep 30")
    executor = make()
    await executor.start(request)
    await executor.cancel(request)
    assert (await ended(executor, request)).ending is Ending.CANCELLED


async def test_what_never_was_can_be_cancelled(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "true")
    await make().cancel(request)
    assert isinstance(await make().status(request), NotStarted)


async def test_the_time_limit_ends_it(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "trap '' TERM; echo begun; while :; do sleep 0.1; done", time_limit_seconds=1)
    executor = make()
    await executor.start(request)
    assert (await ended(executor, request)).ending is Ending.TIME_LIMIT


async def test_a_log_without_end_ends_it(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "exec yes", max_log_bytes=100_000)
    executor = make()
    await executor.start(request)
    assert (await ended(executor, request)).ending is Ending.LOG_LIMIT


async def test_a_killed_program_is_128_and_the_signal(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "sh -c 'kill -9 $$'; exit $?")
    executor = make()
    await executor.start(request)
    assert (await ended(executor, request)).exit_code == 137


async def test_a_killed_runner_means_lost_and_nothing_goes_on(tmp_path: Path, make: Make) -> None:
    mark = f"{uuid.uuid4().int % 900_000 + 100_000}.75"
    request = a_run(tmp_path, f"echo begun; sleep {mark}")
    executor = make()
    await begun(executor, request)
    os.kill(runner_pid(request), signal.SIGKILL)
    end = await ended(executor, request)
    assert (end.ending, end.exit_code) == (Ending.LOST, None)
    await until(lambda: not processes_with(mark))
    assert judge(end.ending, end.exit_code, "", detail=end.detail).fault.cls is FaultClass.NODE  # type: ignore[union-attr]
    assert await make().status(request) == end


async def test_a_killed_container_is_told_apart_from_a_lost_one(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "echo begun; sleep 60")
    executor = make()
    await begun(executor, request)
    for child in runner.children(container_pid(request)):
        os.kill(child, signal.SIGKILL)
    end = await ended(executor, request)
    assert (end.ending, end.exit_code) == (Ending.EXITED, 137)


async def test_it_says_what_an_image_is(make: Make) -> None:
    facts = await make().inspect(images().scripted)
    assert facts.runtime.startswith("apptainer version")
    assert facts.runscript


async def test_what_is_no_image_is_refused(tmp_path: Path, make: Make) -> None:
    (tmp_path / "x.sif").write_text("nothing")
    with pytest.raises(ImageError):
        await make().inspect(tmp_path / "x.sif")


async def test_an_environment_of_the_agents_does_not_come_in(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPTAINERENV_OVATION_TOKEN", "very-secret")
    monkeypatch.setenv("OVATION_TOKEN", "very-secret")
    request = a_run(tmp_path, "env")
    executor = make()
    await executor.start(request)
    assert (await ended(executor, request)).exit_code == 0
    assert "PATH=" in request.stdout.read_text()
    assert "very-secret" not in request.stdout.read_text()


async def test_a_lost_directory_is_not_started_once_it_has_ended(tmp_path: Path, make: Make) -> None:
    request = a_run(tmp_path, "echo begun; sleep 60")
    executor = make()
    started = await executor.start(request)
    assert isinstance(started, Running)
    await begun(executor, request)
    seen = await executor.status(request)
    assert isinstance(seen, Running)
    found = replace(request, native_id=seen.native_id)
    (request.directory).rename(tmp_path / "moved")
    try:
        assert isinstance(await make().status(found), Running)
    finally:
        (tmp_path / "moved").rename(request.directory)
    await executor.cancel(request)
    await ended(executor, request)
