"""`cancel` works in every state, delivers what there is, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio

from agent.adapters.executor import ImageFacts, NotStarted
from agent.domain.job import Done, Verdict
from agent.pipeline.context import Control
from agent.pipeline.launch import launch
from agent.sandbox.faults import FaultKind
from agent.settings import AgentSettings
from tests.agents import until
from tests.lab import Lab, laboratory
from tests.workers import PLAN

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAITS = (
    "trap 'exit 143' TERM; echo begun; echo begun >&2; echo part > /outputs/part;"
    " i=0; while [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done"
)
GRACE_SECONDS = 10.0  # between SIGTERM and the end of the container


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A laboratory in which one job at a time stages, one runs and one delivers."""
    ones = {"AGENT_MAX_STAGING": "1", "AGENT_MAX_RUNNING": "1", "AGENT_MAX_COLLECTING": "1"}
    async with laboratory(tmp_path_factory.mktemp("lab"), **ones) as opened:
        yield opened


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _faults_end(lab: Lab) -> AsyncIterator[None]:
    yield
    lab.sandbox.faults.remove()


async def cancel(lab: Lab, job: dict[str, Any]) -> tuple[int, Any]:
    """Ask for a job's end."""
    return await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")


async def ends_cancelled(lab: Lab, activity_id: str, within_seconds: float) -> None:
    """Cancel an Activity's live run, which ends in so many seconds."""
    [job] = await lab.agent.jobs(activity_id)
    began = time.monotonic()
    status, answer = await cancel(lab, job)
    assert (status, answer["cancel_requested"]) == (202, True)
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["verdict"], job["fault"]) == ("cancelled", "cancelled", None)
    assert time.monotonic() - began < within_seconds


async def waiting(lab: Lab, activity_id: str, words: str) -> dict[str, Any]:
    """Wait until a run says that it waits for something."""

    async def look() -> dict[str, Any] | None:
        for job in await lab.agent.jobs(activity_id):
            if words in (job["waiting_for"] or ""):
                return job
        return None

    return await until(look, f"waiting for {words}", lab.agent.log)


async def stages_slowly(lab: Lab, name: str) -> str:
    """Begin a run whose input takes half a minute to come, and wait until it comes."""
    lab.sandbox.faults.add(FaultKind.DRIP, rf"GET .*{name}", target="store", bytes_per_second=20_000)
    activity_id = lab.activity("true", inputs=[lab.revision(name, b"s" * 600_000)])
    job = await lab.agent.job(activity_id, states={"staging"})

    async def comes() -> bool | None:
        return any((lab.data_dir / "jobs" / job["id"] / "inputs").glob(".*.part")) or None

    await until(comes, "it comes", lab.agent.log)
    return activity_id


async def runs(lab: Lab, script: str = WAITS) -> str:
    """Begin a run, and wait until its container has written to `/outputs`."""
    activity_id = lab.activity(script)
    job = await lab.agent.job(activity_id, states={"running"})
    outputs = lab.data_dir / "jobs" / job["id"] / "run-1" / "outputs"

    async def began() -> bool | None:
        return any(outputs.iterdir()) or None

    await until(began, "the container has begun", lab.agent.log)
    return activity_id


def is_running(words: bytes) -> bool:
    """Say whether any process has these words on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in path.read_bytes():
                return True
        except OSError:
            continue
    return False


async def test_while_it_waits_for_a_place_to_stage(lab: Lab) -> None:
    first = await stages_slowly(lab, "first.bin")
    second = lab.activity("true")
    await lab.agent.job(second, states={"queued"})
    await ends_cancelled(lab, second, within_seconds=8)
    [job] = await lab.agent.jobs(first)
    assert job["state"] == "staging"
    assert await lab.outputs(second) == {}
    await ends_cancelled(lab, first, within_seconds=8)


async def test_while_it_stages(lab: Lab) -> None:
    activity_id = await stages_slowly(lab, "large.bin")
    await ends_cancelled(lab, activity_id, within_seconds=8)
    assert await lab.outputs(activity_id) == {}
    [job] = await lab.agent.jobs(activity_id)
    assert not list((lab.data_dir / "jobs" / job["id"]).rglob("*.bin*"))


async def test_while_it_waits_for_a_place_to_run(lab: Lab) -> None:
    first = await runs(lab)
    second = lab.activity("echo 1 > /outputs/one")
    await lab.agent.job(second, states={"launching"})
    await ends_cancelled(lab, second, within_seconds=8)
    [job] = await lab.agent.jobs(first)
    assert job["state"] == "running"
    await ends_cancelled(lab, first, within_seconds=GRACE_SECONDS + 8)
    assert await lab.outputs(second) == {}


async def test_while_it_runs(lab: Lab) -> None:
    activity_id = await runs(
        lab,
        "trap 'echo saved > /outputs/saved; exit 0' TERM; echo begun; echo begun >&2; echo part > /outputs/part;"
        " while :; do sleep 0.1; done",
    )
    await ends_cancelled(lab, activity_id, within_seconds=8)
    assert await lab.outputs(activity_id) == {
        "stdout.log": b"begun\n",
        "stderr.log": b"begun\n",
        "part": b"part\n",
        "saved": b"saved\n",
    }


async def test_a_container_that_does_not_want_to_end(lab: Lab) -> None:
    activity_id = await runs(
        lab,
        "trap '' TERM; echo begun; echo begun >&2; setsid sleep 8765 & setsid sh -c 'trap \"\" TERM; sleep 8766' &"
        " echo part > /outputs/part; while :; do sleep 1; done",
    )
    assert is_running(b"sleep\x008765")
    assert is_running(b"sleep\x008766")
    await ends_cancelled(lab, activity_id, within_seconds=GRACE_SECONDS + 10)
    found = await lab.outputs(activity_id)
    assert (found["part"], found["stdout.log"], found["stderr.log"]) == (b"part\n", b"begun\n", b"begun\n")
    [job] = await lab.agent.jobs(activity_id)
    assert not is_running(b"sleep\x00876")
    assert not is_running(job["id"].encode())


async def test_while_it_is_delivered(lab: Lab) -> None:
    lab.sandbox.faults.add(FaultKind.LATENCY, "^PUT", target="store", seconds=0.5)
    activity_id = lab.activity("for each in 1 2 3; do echo $each > /outputs/$each; done; exit 0")
    job = await lab.agent.job(activity_id, states={"collecting"})
    assert (await cancel(lab, job))[0] == 202
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["verdict"], job["exit_code"]) == ("succeeded", "succeeded", 0)
    found = await lab.outputs(activity_id)
    assert set(found) == {"stdout.log", "stderr.log", "1", "2", "3"}


async def test_while_it_waits_for_ovation_to_come_back(lab: Lab) -> None:
    slow = await stages_slowly(lab, "slow.bin")  # while Ovation is there; the other one is judged meanwhile
    activity_id = lab.activity("true")
    await lab.agent.job(activity_id, states={"queued"})
    lab.sandbox.faults.add(FaultKind.STATUS, target="api", status=503)
    await ends_cancelled(lab, slow, within_seconds=8)
    await waiting(lab, activity_id, "waiting for Ovation")
    await ends_cancelled(lab, activity_id, within_seconds=8)  # there is nothing to deliver


async def test_while_its_delivery_waits_for_ovation_to_come_back(lab: Lab) -> None:
    activity_id = await runs(lab)
    lab.sandbox.faults.add(FaultKind.STATUS, target="api", status=503)
    [job] = await lab.agent.jobs(activity_id)
    await cancel(lab, job)
    job = await waiting(lab, activity_id, "waiting for Ovation")
    assert (job["state"], job["verdict"]) == ("collecting", "cancelled")
    assert (await cancel(lab, job))[0] == 202
    lab.sandbox.faults.remove()
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["attempt"]) == ("cancelled", 0)
    assert set(await lab.outputs(activity_id)) == {"stdout.log", "stderr.log", "part"}


async def test_twice_and_after_the_end(lab: Lab) -> None:
    activity_id = await runs(lab)
    [job] = await lab.agent.jobs(activity_id)
    answers = await asyncio.gather(*(cancel(lab, job) for _ in range(3)))
    assert {status for status, _ in answers} == {202}
    await lab.agent.job(activity_id)
    status, answer = await cancel(lab, job)
    assert (status, answer["errors"]["detail"]) == (409, "the job has ended already: cancelled")
    assert (await lab.agent.call("POST", "/api/jobs/no-such-job/cancel"))[0] == 404
    assert len(await lab.outputs(activity_id)) == 3


@pytest.mark.parametrize("seconds", [0.0, 0.4, 0.9])
async def test_at_any_moment(lab: Lab, seconds: float) -> None:
    """Whenever it comes: there is one end, which the container's fits, and each file is there once."""
    activity_id = lab.activity("echo 1 > /outputs/one; sleep 0.5; echo 2 > /outputs/two")
    job = await lab.agent.job(activity_id, states={"queued", "staging", "launching", "running"})
    await asyncio.sleep(seconds)
    assert (await cancel(lab, job))[0] in {202, 409}
    job = await lab.agent.job(activity_id)
    found = await lab.outputs(activity_id)  # asserts that each is there once
    if job["state"] == "succeeded":
        assert found["two"] == b"2\n"
    else:
        assert (job["state"], job["fault"]) == ("cancelled", None)
        assert ("stdout.log" in found) == (job["started_at"] is not None)
    assert not is_running(job["id"].encode())


async def test_while_its_image_is_read(lab: Lab, tmp_path: Path) -> None:
    """The container is not started when its end was asked for by then."""
    control = Control()

    class Reading:
        """Stands for the container runtime."""

        async def status(self, _request: object) -> NotStarted:
            return NotStarted()

        async def inspect(self, _image: object) -> ImageFacts:
            control.cancelled.set()
            return ImageFacts({}, "", "")

        async def cannot_keep(self, _resources: object) -> list[str]:
            return []

    del lab
    job = SimpleNamespace(plan=PLAN, id="a-job")
    context = SimpleNamespace(
        executor=Reading(),
        run_request=lambda _job: SimpleNamespace(image=tmp_path / "related" / "a.sif"),
        settings=AgentSettings(),
        layout=lambda _job: SimpleNamespace(root=tmp_path),
    )
    ended = await launch(cast("Any", context), cast("Any", SimpleNamespace(job=job)), control)
    assert ended == Done(verdict=Verdict.CANCELLED)
