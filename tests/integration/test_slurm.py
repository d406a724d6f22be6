"""No run twice, none lost, no false verdict: runs on a real Slurm whose parts fail, and that others meddle with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import structlog

from agent.adapters import runner
from agent.adapters.executor import Ended, Ending, NotStarted, Running, RunRequest
from agent.adapters.slurm import SlurmExecutor
from agent.adapters.slurm_records import SUBMITTED, SUBMITTING
from agent.domain.resources import Resources
from agent.domain.slurm import Site, script, submission
from agent.errors import ExecutorUnavailable
from tests.containers import container_pid, make_request, processes_with, runner_pid, until
from tests.slurm import Cluster, cluster, quick


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@dataclass
class Run:
    """A run whose script says `begun`, and adds a line to `times` when it goes on to its end."""

    request: RunRequest
    executor: SlurmExecutor
    mark: str

    async def begin(self) -> str:
        """Start it, and return its Slurm job once its script has begun."""
        await self.executor.start(self.request)
        await until(lambda: "begun" in self.said())
        status = await self.executor.status(self.request)
        assert isinstance(status, Running)
        return status.native_id

    def said(self) -> str:
        return self.request.stdout.read_text() if self.request.stdout.exists() else ""

    async def end(self, seconds: float = 60) -> Ended:
        status = await self.executor.wait(self.request, seconds)
        assert isinstance(status, Ended), status
        return status

    def go_on(self) -> None:
        """Let the script come to its end."""
        (self.request.inputs / "go").touch()

    def times(self) -> int:
        """Return how often the script has come to its end."""
        path = self.request.outputs / "times"
        return path.read_text().count("x") if path.exists() else 0

    async def is_over(self) -> None:
        await until(lambda: not processes_with(self.mark))

    def kill_all(self) -> None:
        """Kill every process of it on its node, as when the power fails."""
        runner_ = runner_pid(self.request)
        for pid in [_parent(runner_), runner_, *runner.session_members(container_pid(self.request))]:
            runner.send(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def a_run(place: Path, slurm: Cluster, **changes: Any) -> Run:
    mark = f"{uuid.uuid4().int % 900_000 + 100_000}.25"
    script = (
        f"echo begun; sleep {mark} & while [ ! -e /inputs/go ]; do sleep 0.05; done; echo x >> /outputs/times; exit 3"
    )
    request = replace(make_request(place, script), name=f"ovation-{uuid.uuid4()}-1", time_limit_seconds=3600)
    return Run(request, SlurmExecutor(quick(**changes), slurm.environment), mark)


@asynccontextmanager
async def killed_at_the_end(run: Run) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await run.executor.cancel(run.request)
        run.go_on()


async def test_that_there_is_no_accounting_is_no_trouble(slurm: Cluster, tmp_path: Path) -> None:
    client = a_run(tmp_path, slurm).executor.client
    assert (await client.accounting()).startswith("there is none")


async def test_what_slurm_rejects_is_refused_with_its_words(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm, site=Site(partition="nowhere"))
    assert isinstance(end := await run.executor.start(run.request), Ended)
    assert end.ending is Ending.REFUSED
    assert "invalid partition" in (end.detail or "").lower()
    assert await a_run(tmp_path / "x", slurm).executor.start(run.request) == end
    assert run.request.name not in slurm.jobs()


async def test_a_job_that_would_never_run_is_taken_back(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm, site=Site(partition="short"))
    await run.executor.start(run.request)
    end = await run.end()
    assert end.ending is Ending.REFUSED
    assert "Slurm would never run it: " in (end.detail or "")
    await until(lambda: slurm.jobs()[run.request.name] == "CANCELLED")


async def test_more_than_any_node_has_is_refused(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm)
    request = replace(run.request, resources=Resources(cpus=10_000))
    end = await run.executor.start(request)
    if isinstance(end, Running):
        end = await run.executor.wait(request, 30)  # type: ignore[assignment]
    assert isinstance(end, Ended)
    assert end.ending is Ending.REFUSED


async def test_a_job_has_the_environment_that_it_is_given_and_nobodys_login(tmp_path: Path, slurm: Cluster) -> None:
    """Slurm makes it by a login on the node otherwise, which takes seconds, and puts a job on hold where that fails."""
    run = a_run(tmp_path, slurm)
    path = f"{slurm.environment['PATH']}:/what/is/given"
    run.executor = SlurmExecutor(quick(), slurm.environment | {"PATH": path, "OVATION_TOKEN": "a-token", "MAIL": "me"})
    async with killed_at_the_end(run):
        await run.begin()
        lines = Path(f"/proc/{runner_pid(run.request)}/environ").read_text().split("\0")
        found = dict(line.split("=", 1) for line in lines if line)
        assert found["PATH"] == path
        assert found["SLURM_JOB_NAME"] == run.request.name
        assert found.keys().isdisjoint({"OVATION_TOKEN", "MAIL", "SHELL", "SLURM_GET_USER_ENV"})


async def test_a_preamble_is_read_by_a_login_shell(tmp_path: Path, slurm: Cluster) -> None:
    """What a site's `module` needs is in its profile."""
    run = a_run(tmp_path, slurm, site=Site(preamble="shopt -q login_shell || exit 1"))
    run.go_on()
    await run.executor.start(run.request)
    assert (await run.end()).exit_code == 3


async def test_a_preamble_that_fails_is_quoted(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm, site=Site(preamble="module load apptainer/9 || exit 1"))
    await run.executor.start(run.request)
    end = await run.end()
    assert end.ending is Ending.LOST
    assert "module: command not found" in (end.detail or "")


async def test_a_held_job_says_so_and_goes_on_when_released(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm, site=Site(arguments=("--hold",)))
    submitted = await run.executor.start(run.request)
    assert isinstance(submitted, Running)
    slurm_id = slurm.ids(run.request.name)[0]
    status = await run.executor.wait(run.request, 2)
    assert isinstance(status, Running)
    assert "scontrol release" in (status.waiting_for or "")
    assert await run.executor.wait(run.request, 60, submitted) == status  # at once
    slurm.run("scontrol", "update", f"jobid={slurm_id}", "partition=urgent")
    slurm.run("scontrol", "release", slurm_id)
    status = await run.executor.wait(run.request, 60, status)  # before its end, which waits for `go_on`
    assert isinstance(status, Running)
    assert "scontrol release" not in (status.waiting_for or "")
    run.go_on()
    assert (await run.end()).exit_code == 3
    assert run.times() == 1


@pytest.mark.parametrize("pending", [True, False])
async def test_cancelled_in_slurm_by_somebody(tmp_path: Path, slurm: Cluster, pending: bool) -> None:
    run = a_run(tmp_path, slurm, site=Site(arguments=("--hold",) if pending else ()))
    if pending:
        await run.executor.start(run.request)
        slurm.run("scancel", *slurm.ids(run.request.name))
    else:
        slurm.run("scancel", await run.begin())
    end = await run.end()
    assert end.ending is Ending.OUTSIDE
    assert "scancel" in (end.detail or "")
    await run.is_over()
    assert await SlurmExecutor(quick(), slurm.environment).status(run.request) == end


async def test_ended_at_slurms_time_limit(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm)
    slurm.run("scontrol", "update", f"jobid={await run.begin()}", "EndTime=now")
    end = await run.end()
    assert end.ending is Ending.TIME_LIMIT, end
    await run.is_over()


async def test_put_back_into_the_queue_it_is_lost_and_not_begun_again(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm, site=Site(arguments=("--requeue",)))
    slurm_id = await run.begin()
    slurm.run("scontrol", "requeue", slurm_id)
    end = await run.end()
    assert end.ending is Ending.LOST
    assert "queue" in (end.detail or "")
    run.go_on()
    await until(lambda: slurm.jobs()[run.request.name] not in {"PENDING", "RUNNING"}, 30)
    assert run.times() == 0
    assert run.said() == "begun\n"


async def test_it_makes_way_for_a_job_of_higher_priority(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm, site=Site(arguments=("--exclusive", "--nodelist=n1")))
    await run.begin()
    slurm.run(
        "sbatch", "--partition=urgent", "--exclusive", "--nodelist=n1", "--output=/dev/null", "--wrap", "sleep 0.1"
    )
    end = await run.end()
    assert end.ending is Ending.LOST
    assert "higher priority" in (end.detail or "")
    await run.is_over()


async def test_all_of_it_killed_at_once_is_lost_after_the_silence(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm)
    await run.begin()
    run.kill_all()
    assert isinstance(await run.executor.wait(run.request, 1), Running)  # one sign is not enough
    assert (await run.end()).ending is Ending.LOST


@pytest.mark.parametrize("when", ["before the submission", "after the submission"])
async def test_an_agent_killed_while_it_submits(tmp_path: Path, slurm: Cluster, when: str) -> None:
    run = a_run(tmp_path, slurm)
    submit = run.executor.client.submit

    async def killed(arguments: Any, script: str) -> str:
        if when == "after the submission":
            await submit(arguments, script)
        raise KeyboardInterrupt

    run.executor.client.submit = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        await run.executor.start(run.request)
    assert (run.request.directory / SUBMITTING).exists()
    assert not (run.request.directory / SUBMITTED).exists()
    run.executor = SlurmExecutor(quick(), slurm.environment)
    await run.begin()
    assert len(slurm.ids(run.request.name)) == 1
    run.go_on()
    assert (await run.end()).exit_code == 3
    assert run.times() == 1


async def test_a_second_job_of_the_same_run_does_nothing(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm)
    await run.begin()
    directory = PurePosixPath(run.request.directory)
    arguments = submission(run.request.name, directory, 3600, Site(), run.request.resources)
    second = await run.executor.client.submit(arguments, script(directory, sys.executable, Site()))
    (run.request.directory / SUBMITTED).write_text(json.dumps({"job_id": second}))
    await until(lambda: slurm.run("squeue", "-h", "-t", "all", "-j", second, "-o", "%T").strip() == "FAILED")
    again = SlurmExecutor(quick(), slurm.environment)
    assert isinstance(await again.wait(run.request, 5), Running)  # the second one is over, and the run goes on
    run.go_on()
    assert (await run.end()).exit_code == 3
    assert run.times() == 1
    assert run.said() == "begun\n"


async def test_cancelled_before_it_begins_it_never_does(tmp_path: Path, slurm: Cluster) -> None:
    run = a_run(tmp_path, slurm, site=Site(arguments=("--hold",)))
    await run.executor.start(run.request)
    await run.executor.cancel(run.request)
    assert (await run.end()).ending is Ending.CANCELLED
    assert slurm.jobs()[run.request.name] == "CANCELLED"
    await SlurmExecutor(quick(), slurm.environment).start(run.request)
    assert run.said() == ""


async def test_two_hundred_at_once_are_two_hundred_runs(tmp_path: Path, slurm: Cluster) -> None:
    executor = SlurmExecutor(quick(), slurm.environment)
    requests = []
    for number in range(200):
        made = make_request(tmp_path / str(number), f"echo {number}; echo x >> /outputs/times")
        requests.append(replace(made, name=f"ovation-{uuid.uuid4()}-1"))
    calls = executor.client.calls
    began = time.monotonic()
    await asyncio.gather(*(executor.start(request) for request in requests))
    await asyncio.gather(*(executor.start(request) for request in requests))
    ends = await asyncio.gather(*(executor.wait(request, 100) for request in requests))
    ticks = (time.monotonic() - began) / executor._settings.tick_seconds
    assert [end for end in ends if not isinstance(end, Ended) or end.exit_code != 0] == []
    assert [(request.outputs / "times").read_text() for request in requests] == ["x\n"] * 200
    assert [request.stdout.read_text() for request in requests] == [f"{number}\n" for number in range(200)]
    names = slurm.run("squeue", "-h", "-a", "-t", "all", "-o", "%j").split()
    assert all(names.count(request.name) == 1 for request in requests)
    assert executor.client.calls - calls <= 200 + 2 * ticks + 2  # one a tick beside the submissions


@pytest.fixture
def failing() -> Iterator[Cluster]:
    """A cluster whose parts a test may break; a node is given up after 5 s, and an ended job is forgotten after 2."""
    with cluster(node_timeout=5, min_job_age=2, extra="MessageTimeout=3") as made:
        yield made


async def test_without_a_controller_nothing_is_started_and_the_end_is_seen(tmp_path: Path, failing: Cluster) -> None:
    first = a_run(tmp_path / "1", failing)
    second = replace(a_run(tmp_path / "2", failing), executor=first.executor)
    await first.begin()
    failing.kill("slurmctld")
    with structlog.testing.capture_logs() as lines:
        with pytest.raises(ExecutorUnavailable):
            await second.executor.start(second.request)
        first.go_on()
        assert (await first.end()).exit_code == 3
        assert isinstance(await second.executor.status(second.request), NotStarted)
        with pytest.raises(ExecutorUnavailable):
            await second.executor.client.snapshot()
        with pytest.raises(ExecutorUnavailable):
            await second.executor.client.snapshot()
        failing.start_controller()
        await second.begin()
    second.go_on()
    assert (await second.end()).exit_code == 3
    assert (first.times(), second.times()) == (1, 1)
    told = [line["event"] for line in lines if line.get("party") == "Slurm"]
    assert told == ["party_away", "party_back"]


async def test_a_controller_frozen_during_the_submission(tmp_path: Path, failing: Cluster) -> None:
    run = a_run(tmp_path, failing)
    failing.freeze("slurmctld")
    submitting = asyncio.create_task(run.executor.start(run.request))
    try:
        with pytest.raises(ExecutorUnavailable):
            await submitting
    finally:
        failing.thaw("slurmctld")
    run.executor = SlurmExecutor(quick(), failing.environment)
    await run.begin()
    run.go_on()
    assert (await run.end()).exit_code == 3
    await until(lambda: set(failing.jobs().values()) <= {"COMPLETED", "FAILED", "CANCELLED"})
    assert run.times() == 1
    assert run.said() == "begun\n"


async def test_a_controller_killed_in_the_middle_changes_nothing(tmp_path: Path, failing: Cluster) -> None:
    run = a_run(tmp_path, failing)
    await run.begin()
    state = failing.place / "state/job_state"
    saved_at = time.time()
    failing.run("scontrol", "update", f"jobid={failing.ids(run.request.name)[0]}", "comment=saved")
    await until(lambda: state.exists() and state.stat().st_mtime > saved_at, 60)  # else Slurm ends what it forgot
    failing.kill("slurmctld")
    failing.start_controller()
    assert isinstance(await run.executor.wait(run.request, 5), Running)
    run.go_on()
    assert (await run.end()).exit_code == 3
    assert run.times() == 1


async def test_a_node_that_slurm_gives_up_and_that_goes_on(tmp_path: Path, failing: Cluster) -> None:
    run = a_run(tmp_path, failing, site=Site(arguments=("--nodelist=n1",)))
    await run.begin()
    failing.kill("n1")
    await until(lambda: failing.jobs().get(run.request.name) in {"NODE_FAIL", None}, 60)
    assert isinstance(await run.executor.wait(run.request, 6), Running)
    run.go_on()
    assert (await run.end()).exit_code == 3
    assert run.times() == 1


async def test_a_node_that_dies(tmp_path: Path, failing: Cluster) -> None:
    run = a_run(tmp_path, failing, site=Site(arguments=("--nodelist=n1",)))
    await run.begin()
    failing.kill("n1")
    run.kill_all()
    end = await run.end(90)
    assert end.ending is Ending.LOST
    assert end.detail
    assert run.times() == 0


async def test_a_run_that_slurm_has_forgotten(tmp_path: Path, failing: Cluster) -> None:
    done, gone = a_run(tmp_path / "1", failing), a_run(tmp_path / "2", failing)
    await done.begin()
    await gone.begin()
    done.go_on()
    gone.kill_all()
    await until(lambda: done.request.directory.joinpath(runner.EXIT).exists())
    await until(lambda: not failing.jobs(), 60)
    later = SlurmExecutor(quick(), failing.environment)
    assert (await later.wait(done.request, 1)).exit_code == 3  # type: ignore[union-attr]
    end = await later.wait(gone.request, 30)
    assert isinstance(end, Ended)
    assert end.ending is Ending.LOST


async def test_nothing_secret_is_in_the_jobs_record(
    tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVATION_TOKEN", "very-secret")
    run = a_run(tmp_path, slurm)
    run.executor = SlurmExecutor(quick(), os.environ | slurm.environment)
    slurm_id = await run.begin()
    seen = slurm.run("scontrol", "show", "job", "-dd", slurm_id) + slurm.run(
        "scontrol", "write", "batch_script", slurm_id, "-"
    )
    environ = Path(f"/proc/{runner_pid(run.request)}/environ").read_bytes().decode()
    run.go_on()
    await run.end()
    assert "--in-place" in seen
    assert "very-secret" not in seen + environ
