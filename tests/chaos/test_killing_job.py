"""A job whose work ends the agent's process every time: it is set aside, and the others are not kept by it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from agent.domain.decide import Limits
from agent.domain.job import FaultClass
from tests.chaos import harness
from tests.chaos.harness import Chaos
from tests.chaos.play import at_once
from tests.chaos.told import reaches
from tests.chaos.work import SMALL, Work
from tests.chaos.zygote import Zygote

_POISON = "poison"
_STARTS_AGAIN_SECONDS = 0.1


class _LeavesPoison(Work):
    """Its one output is what no agent survives."""

    def script(self, name: str) -> str:
        """Return the script of the Activity of that name."""
        return f"echo {name}; echo 1 > /outputs/{_POISON}"

    def files(self, name: str) -> dict[str, bytes]:
        """Return what can be delivered."""
        return {"stdout.log": f"{name}\n".encode(), "stderr.log": b""}


@pytest.mark.timeout(600)
async def test_a_job_that_kills_the_agent_is_set_aside(
    tmp_path: Path, zygote: Zygote, embedded_url: str, *, long_form: bool
) -> None:
    async def lead(moment: str) -> None:
        settings = {"CHAOS_POISON": _POISON}
        async with harness.chaos(tmp_path / moment, zygote, embedded_url, **settings) as one:
            for _ in range(3 if long_form else 1):
                await _set_aside(one, moment)

    await at_once({moment: lead(moment) for moment in ("staging", "collecting")})


async def _set_aside(one: Chaos, moment: str) -> None:
    """Have the killer come between others, one of which runs all the time."""
    await one.start()
    runs = one.activity(Work(commands="sleep 8"))
    await reaches(one, runs, {"running"})
    one.activity()
    killer = _killer(one, moment)
    one.activity()
    deaths = one.faults
    keeper = asyncio.create_task(_keep_alive(one))
    try:
        await reaches(one, killer, {"failed"})
        one.fault_cleared()
        deaths = one.faults - 1 - deaths
        one.expected[killer] = replace(one.expected[killer], state="failed", files=await _left(one, killer, moment))
        await one.recovered(f"a job that kills in {moment}")
    finally:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
    assert deaths == Limits().suspicion
    assert one.agents["a"].process.returncode is None
    await one.check()
    await one.stop()


def _killer(one: Chaos, moment: str) -> str:
    if moment == "collecting":
        return one.activity(_LeavesPoison())
    return one.activity(SMALL, inputs=[one.lab.revision(_POISON)])


async def _keep_alive(one: Chaos) -> None:
    """Start the agent again whenever it dies, as systemd does."""
    while True:
        if one.agents["a"].process.returncode is not None:
            one.faults += 1
            await asyncio.sleep(_STARTS_AGAIN_SECONDS)
            one.begin()
        await asyncio.sleep(0.02)


async def _left(one: Chaos, killer: str, moment: str) -> Mapping[str, bytes]:
    """Return what is to be on the killer's Activity, whose fault is the agent's."""
    async with one.database() as connection:
        job = await connection.fetchrow("SELECT * FROM jobs WHERE activity_id = $1", killer)
    assert (job["fault_class"], job["attempt"]) == (FaultClass.AGENT, 0)
    assert f"ended {Limits().suspicion} times" in job["fault_message"]
    if moment == "collecting":
        return one.expected[killer].files
    return {"stderr.log": f"ovation-agent: the image was not run: {job['fault_message']}\n".encode()}
