"""Somebody fills the disk while runs are in all states: nothing is half written, and what can leave it leaves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.sandbox.faults import FaultKind
from tests.agents import until
from tests.chaos.harness import Chaos
from tests.chaos.told import attempts, parties, reaches
from tests.chaos.work import LARGE, Work
from tests.integration.test_room import MB, SmallDisk, small_disk

_LARGE_INPUT_BYTES = 12 * MB
_COUNTS = Work(
    commands="wc -c < /inputs/large.bin > /outputs/size", outputs={"size": f"{_LARGE_INPUT_BYTES}\n".encode()}
)
_WAITS_FOR_A_SIGN = Work(commands="while [ ! -e /inputs/sign ]; do sleep 0.1; done")


@pytest.mark.timeout(600)
async def test_a_disk_that_somebody_fills(chaos: Chaos, *, long_form: bool) -> None:
    chaos.settings["AGENT_MIN_FREE_BYTES"] = "1"
    if not long_form:
        chaos.settings["CHAOS_ROOM_SECONDS"] = "2"  # instead of 30
    with small_disk(chaos.data_dir(), 64 * MB) as disk:
        if disk.environment:  # none may be mounted here
            chaos.settings["CHAOS_SITE"] = str(chaos.data_dir().parent / "site" / "sitecustomize.py")
        await chaos.start()
        for _ in range(5 if long_form else 1):
            await _fill(chaos, disk)
        await chaos.stop()


async def _fill(chaos: Chaos, disk: SmallDisk) -> None:
    """One run is being staged, one runs and ends on the full disk, one is being delivered and need not wait."""
    faults = chaos.lab.sandbox.faults
    faults.add(FaultKind.LATENCY, "^PUT .*/large", target="store", seconds=4, times=2)
    drip = faults.add(FaultKind.DRIP, "^GET .*large.bin", target="store", bytes_per_second=MB)
    delivered = chaos.activity(LARGE)
    runs = chaos.activity(_WAITS_FOR_A_SIGN)
    await reaches(chaos, delivered, {"collecting"})
    await reaches(chaos, runs, {"running"})
    staged = chaos.activity(_COUNTS, inputs=[chaos.lab.revision("large.bin", b"l" * _LARGE_INPUT_BYTES)])
    inputs = await _half_staged(chaos, staged)
    filler = await asyncio.to_thread(disk.fill)
    faults.remove(drip.id)
    (await _job(chaos, runs) / "inputs" / "sign").touch()
    await _waits_for_room(chaos, staged)
    assert sorted(path.name for path in inputs.iterdir()) in (["script.sh"], [])
    await reaches(chaos, delivered, {"succeeded"})
    await asyncio.sleep(1)
    filler.unlink()
    chaos.fault_cleared()
    await chaos.recovered("the disk is full")
    assert await attempts(chaos) == 0
    told = [event for event, party in parties(chaos) if party == "disk space"]
    assert told == ["party_away", "party_back"] * (len(told) // 2)
    await chaos.check()


async def _job(chaos: Chaos, activity_id: str) -> Path:
    """Return the directory of an Activity's run."""
    async with chaos.database() as connection:
        job_id = await connection.fetchval("SELECT id FROM jobs WHERE activity_id = $1", activity_id)
    return chaos.data_dir() / "jobs" / str(job_id)


async def _half_staged(chaos: Chaos, activity_id: str) -> Path:
    """Wait until half of a large input is there, and return its directory."""
    await reaches(chaos, activity_id, {"staging"})
    inputs = await _job(chaos, activity_id) / "inputs"

    async def look() -> bool | None:
        return any(part.stat().st_size >= _LARGE_INPUT_BYTES // 2 for part in chaos.data_dir().rglob(".*.part")) or None

    await until(look, "half of a large input", chaos.logs[-1])
    return inputs


async def _waits_for_room(chaos: Chaos, activity_id: str) -> None:
    async with chaos.database() as connection:

        async def look() -> bool | None:
            found: bool | None = await connection.fetchval(
                "SELECT true FROM jobs WHERE activity_id = $1 AND waiting_for LIKE '%disk%'", activity_id
            )
            return found

        await until(look, "a run that waits for room on the disk", chaos.logs[-1])
