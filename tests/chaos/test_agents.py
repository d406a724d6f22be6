"""Several agents on one database: they race, one is killed and comes back, one sleeps past its lease and wakes."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import asyncpg
import pytest

from agent.sandbox.faults import FaultKind
from tests.agents import until
from tests.chaos import harness
from tests.chaos.harness import Chaos
from tests.chaos.play import at_once
from tests.chaos.told import attempts, lines, reaches
from tests.chaos.work import SMALL, Work
from tests.chaos.zygote import Zygote

_QUICK = {"CHAOS_LEASE_SECONDS": "3"}
_QUICKLY_GONE = {**_QUICK, "CHAOS_GONE_SECONDS": "6"}
"""Instead of 15 s and 60 s, which `make chaos` waits for."""

_TRIES = 50
_SLOW_BYTES = 2_000_000
_SLOW_SECONDS = 4
_COUNTS = Work(commands="wc -c < /inputs/slow.bin > /outputs/size", outputs={"size": f"{_SLOW_BYTES}\n".encode()})


@pytest.mark.timeout(1800)
async def test_agents_come_and_go(
    tmp_path: Path, zygote: Zygote, embedded_url: str, seed: int, *, long_form: bool
) -> None:
    chance = random.Random(seed)  # noqa: S311 repeatable, not secret

    async def race(names: str) -> None:
        settings = {} if long_form else _QUICK
        async with harness.chaos(tmp_path / names, zygote, embedded_url, **settings) as one:
            for _ in range(5 if long_form else 1):
                await _race(one, names, chance)

    async def take_over() -> None:
        settings = {} if long_form else _QUICKLY_GONE
        keep = {"AGENT_KEEP_FAILED_SECONDS": "1"}  # so that what belongs to nobody any more is soon removed
        async with harness.chaos(tmp_path / "gone", zygote, embedded_url, **keep, **settings) as one:
            await _take_over(one)

    await at_once({"two": race("ab"), "three": race("abc"), "taken over": take_over()})


async def _race(one: Chaos, names: str, chance: random.Random) -> None:
    """One agent is killed and comes back, another is stopped until its leases have run out; Activities keep coming."""
    await asyncio.gather(*(one.start(name) for name in names))
    for _ in names:
        one.activity(chance.choice([SMALL, Work(commands="sleep 1")]))
        one.activity()
    async with one.database() as connection:
        stopped = await _busy(one, connection)
        killed = chance.choice([name for name in names if name != stopped])
        await _stop_in_a_transaction(one, connection, stopped)
        await _let_go(one, connection, stopped)
        waiting = await _waiting(one, connection, stopped)
        await asyncio.sleep(chance.uniform(0, 1))
        await one.kill(killed)
        for _ in names:
            one.activity()
        await asyncio.sleep(chance.uniform(0.5, 1.5))
        await one.start(killed)
        assert await _waiting(one, connection, stopped) >= waiting, "its files are with an agent that is stopped"
    one.agents[stopped].process.send_signal(signal.SIGCONT)
    one.fault_cleared()
    await one.recovered(f"{len(names)} agents, one stopped, one killed")
    assert await attempts(one) == 0
    await _at_rest(one)


async def _take_over(one: Chaos) -> None:
    """What an agent was staging when it was stopped is done by another; then it wakes up, and is done first."""
    await one.start("a")
    rate = _SLOW_BYTES // _SLOW_SECONDS
    one.lab.sandbox.faults.add(FaultKind.DRIP, "^GET .*slow.bin", target="store", bytes_per_second=rate)
    activity_id = one.activity(_COUNTS, inputs=[one.lab.revision("slow.bin", b"s" * _SLOW_BYTES)])
    sleeper = one.agents["a"].process
    await _fetches(one, "a", _SLOW_BYTES // 2)
    sleeper.send_signal(signal.SIGSTOP)
    await one.start("b")
    await _fetches(one, "b", 1)
    sleeper.send_signal(signal.SIGCONT)
    one.fault_cleared()
    await reaches(one, activity_id, {"succeeded"})
    await one.recovered("taken over while it was stopped")
    assert any(line["pid"] == sleeper.pid for line in lines(one, "agent_started"))
    assert len(lines(one, "lease_lost")) == 1
    async with one.database() as connection:
        place = await connection.fetchval("SELECT place FROM jobs")
    assert place == _place(one, "b")
    await _at_rest(one)


async def _at_rest(one: Chaos) -> None:
    """See that all is done; that the agents stop in good order, and that nothing of them is left either."""

    async def looked() -> bool | None:
        if one.lab.sandbox.admin.pending_deliveries():
            return None
        async with one.database() as connection:
            return await connection.fetchval("SELECT count(*) = 0 FROM watched WHERE due_at IS NOT NULL") or None

    # What a webhook told of a moment ago is due when the quiet time is over, and then nobody is there to look at it.
    await until(looked, "what webhooks told is looked at", next(iter(one.agents.values())).log)
    await one.check()
    assert {name: await agent.stop() for name, agent in one.agents.items()} == dict.fromkeys(one.agents, 0)
    await one.check()


async def _fetches(one: Chaos, name: str, size: int) -> None:
    """Wait until an agent has so many bytes of what comes slowly."""

    async def look() -> bool | None:
        parts = one.data_dir(name).rglob(".*.part")
        return any(part.stat().st_size >= size for part in parts) or None

    await until(look, f"{name} has {size} bytes of slow.bin", one.agents[name].log, 120)


def _place(one: Chaos, name: str) -> str:
    return (one.data_dir(name) / "place").read_text().strip()


async def _busy(one: Chaos, connection: asyncpg.Connection) -> str:
    """Wait until agents work on jobs, and return which has the most."""
    names = {_place(one, name): name for name in one.agents}

    async def look() -> str | None:
        holder: str | None = await connection.fetchval(
            "SELECT lease_holder FROM jobs WHERE lease_until > now() AND state <> 'queued'"
            " GROUP BY lease_holder ORDER BY count(*) DESC LIMIT 1"
        )
        return names.get(holder or "")

    return await until(look, "an agent that works", one.logs[-1])


async def _stop_in_a_transaction(one: Chaos, connection: asyncpg.Connection, name: str) -> None:
    """Stop an agent in the middle of a transaction, whose locks it keeps; or anywhere, where that does not come off."""
    process = one.agents[name].process
    for _ in range(_TRIES):
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.04)
        if await connection.fetchval(
            "SELECT true FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
            " AND state_change < clock_timestamp() - interval '30 ms' LIMIT 1"
        ):
            return
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGSTOP)


async def _let_go(one: Chaos, connection: asyncpg.Connection, name: str) -> None:
    """Wait until an agent that is stopped holds no lease any more, because another has seen that it ran out."""

    async def look() -> bool | None:
        query = "SELECT count(*) = 0 FROM jobs WHERE lease_holder = $1"
        free: bool = await connection.fetchval(query, _place(one, name))
        return free or None

    await until(look, f"the leases of {name} run out", one.agents[name].log)


async def _waiting(one: Chaos, connection: asyncpg.Connection, name: str) -> int:
    """Return how many jobs have their files with an agent, and have not ended."""
    query = "SELECT count(*) FROM jobs WHERE place = $1 AND finished_at IS NULL"
    return int(await connection.fetchval(query, _place(one, name)))
