"""Ovation and the object store do wrong, in every way that there is: no run fails for it.

The proxy in front of them is the sandbox itself: its faults (`agent.sandbox.faults`) make its own answers late, short,
wrong or missing, each for as many requests as a test says. A server cannot feign its own absence, though: for that
there is a real one (`tests.chaos.proxy`).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.sandbox.faults import Fault, FaultKind
from agent.sandbox.settings import BUCKET
from tests.agents import until
from tests.chaos import harness
from tests.chaos.harness import Chaos
from tests.chaos.play import at_once
from tests.chaos.proxy import Proxy
from tests.chaos.told import attempts, parties, reaches, warnings
from tests.chaos.work import LARGE, Work
from tests.chaos.zygote import Zygote

_MET_SECONDS = 60.0
_TOGETHER = 4
_LONGEST_WAIT_SECONDS = 60.0


class _Short(Work):
    """Has one output: each costs a dozen requests, and here there are many scenarios."""

    def script(self, name: str) -> str:
        """Return the script of the Activity of that name."""
        return f"echo {name}; mkdir /outputs/tables; cp /inputs/script.sh /outputs/tables/copy"

    def files(self, name: str) -> dict[str, bytes]:
        """Return the files that are to be on that Activity, by path."""
        return {"stdout.log": f"{name}\n".encode(), "stderr.log": b"", "tables/copy": self.script(name).encode()}


@dataclass(frozen=True, slots=True)
class Wrong:
    """What goes wrong, where (`api` or `store`), in answer to which requests, and the rest as the sandbox takes it."""

    kind: FaultKind
    target: str
    path: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trouble:
    """One scenario. Bytes that are not what they should be are tried again as attempts of the step: so many at most."""

    wrongs: Sequence[Wrong]
    works: Sequence[Work] = (_Short(), _Short())
    attempts: int = 0


def _reads(kind: FaultKind, **options: Any) -> Wrong:
    return Wrong(kind, "api", "^GET ", options)


def _addresses(kind: FaultKind, **options: Any) -> Wrong:
    """Return a fault of what says where a Revision's bytes are."""
    return Wrong(kind, "api", "^GET .*/resources/", options)


def _creates(kind: FaultKind, **options: Any) -> Wrong:
    return Wrong(kind, "api", "^POST ", options)


def _completes(kind: FaultKind, **options: Any) -> Wrong:
    return Wrong(kind, "api", "^PUT .*upload-complete", options)


def _downloads(kind: FaultKind, **options: Any) -> Wrong:
    return Wrong(kind, "store", "^GET /[^?]*/(script.sh|image.sif)", options)


def _uploads(kind: FaultKind, **options: Any) -> Wrong:
    return Wrong(kind, "store", "^PUT ", options)


def _begins_and_ends_parts(kind: FaultKind, **options: Any) -> Wrong:
    return Wrong(kind, "store", "^POST ", options)


def _everywhere(kind: FaultKind, **options: Any) -> tuple[Wrong, ...]:
    return tuple(each(kind, **options) for each in (_reads, _creates, _completes, _downloads, _uploads))


_PARTS = (LARGE,)
TROUBLES = {
    "latency": Trouble(_everywhere(FaultKind.LATENCY, times=4, seconds=1.0)),
    "black hole": Trouble(_everywhere(FaultKind.BLACK_HOLE, times=2, seconds=2.0)),
    "reset": Trouble(_everywhere(FaultKind.RESET, times=3, after_bytes=40)),
    "close": Trouble(_everywhere(FaultKind.CLOSE, times=3, after_bytes=40)),
    "truncate": Trouble(_everywhere(FaultKind.TRUNCATE, times=3, after_bytes=40), attempts=2),
    "corrupt": Trouble(_everywhere(FaultKind.CORRUPT, times=3, after_bytes=40), attempts=2),
    "drip": Trouble(
        (
            _reads(FaultKind.DRIP, times=4, bytes_per_second=4_000),
            _downloads(FaultKind.DRIP, times=3, bytes_per_second=600_000),
        )
    ),
    "429": Trouble(_everywhere(FaultKind.STATUS, times=3, status=429, headers={"Retry-After": "1"})),
    "503": Trouble(_everywhere(FaultKind.STATUS, times=9, status=503)),
    "500 and 502": Trouble(
        (*_everywhere(FaultKind.STATUS, times=2, status=500), *_everywhere(FaultKind.STATUS, times=2, status=502))
    ),
    "expired url": Trouble((_addresses(FaultKind.EXPIRED_URL, times=4), _downloads(FaultKind.EXPIRED_URL, times=3))),
    "reset request": Trouble(
        (
            _creates(FaultKind.RESET_REQUEST, times=3, after_bytes=20),
            _uploads(FaultKind.RESET_REQUEST, times=3, after_bytes=3),
        )
    ),
    "lost answer": Trouble(_everywhere(FaultKind.LOST_ANSWER, times=3)),
    "parts: lost answer": Trouble(
        (_begins_and_ends_parts(FaultKind.LOST_ANSWER, times=2), _uploads(FaultKind.LOST_ANSWER, times=2)), _PARTS
    ),
    "parts: truncate": Trouble(
        (_begins_and_ends_parts(FaultKind.TRUNCATE, times=2, after_bytes=40),), _PARTS, attempts=2
    ),
    "parts: 503": Trouble(
        (
            _begins_and_ends_parts(FaultKind.STATUS, times=9, status=503),
            _uploads(FaultKind.STATUS, times=9, status=503),
        ),
        _PARTS,
    ),
}


_MORE = frozenset({"close", "500 and 502", "parts: truncate", "parts: 503"})
"""Like others; only `make chaos` has the time."""


def _batches() -> list[list[str]]:
    names = [name for name in TROUBLES if os.environ.get("CHAOS") == "long" or name not in _MORE]
    return [names[start : start + _TOGETHER] for start in range(0, len(names), _TOGETHER)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", _batches(), ids="+".join)
async def test_no_run_fails_for_a_fault(
    names: list[str], tmp_path: Path, zygote: Zygote, embedded_url: str, *, long_form: bool
) -> None:
    """Each of these has a sandbox, an agent and Activities of its own; they wait at the same time."""
    rounds = 5 if long_form else 1

    async def lead(name: str) -> None:
        async with harness.chaos(tmp_path / str(names.index(name)), zygote, embedded_url) as one:
            await one.start()
            for _ in range(rounds):
                await _meet(one, name, TROUBLES[name])

    await at_once({name: lead(name) for name in names})


async def _meet(one: Chaos, name: str, trouble: Trouble) -> None:
    """Have Activities run into a trouble until each of its faults was met, and go on without it."""
    book = one.lab.sandbox.faults
    faults = [book.add(each.kind, each.path, target=each.target, **each.options) for each in trouble.wrongs]
    for work in trouble.works:
        one.activity(work)
    await until(lambda: _all_met(faults), f"{name}, every fault", one.agents["a"].log, _MET_SECONDS)
    book.remove()
    one.fault_cleared()
    await one.recovered(f"fault: {name}")
    assert await attempts(one) <= trouble.attempts
    told = [event for event, _ in parties(one)]
    assert told.count("party_away") == told.count("party_back")
    _clear_unknown_uploads(one)
    await one.check()


async def _all_met(faults: Sequence[Fault]) -> bool | None:
    return all(fault.hits for fault in faults) or None


def _clear_unknown_uploads(one: Chaos) -> None:
    """Do what the bucket's own rule does: an upload whose id was lost with an answer, nobody can throw away.

    It has no parts: none is sent before the id is known.
    """
    store = one.lab.sandbox.store
    for upload in store.uploads(BUCKET, ""):
        if not store.parts(upload.id):
            store.abort_upload(upload)


async def test_a_party_that_is_away_is_waited_for(tmp_path: Path, zygote: Zygote, embedded_url: str) -> None:
    async def lead(party: str, target: str) -> None:
        async with harness.chaos(tmp_path / target, zygote, embedded_url) as one:
            await _wait_out(one, party, target)

    away = {"Ovation": "api", "the object store": "store"}
    await at_once({party: lead(party, target) for party, target in away.items()})


async def _wait_out(one: Chaos, party: str, target: str) -> None:
    """One run is to be delivered to who is away, others come meanwhile; it seems to last for an hour."""
    await one.start()
    runs = one.activity(Work(commands="sleep 2"))
    await reaches(one, runs, {"running"})
    faults = one.lab.sandbox.faults
    away = faults.add(FaultKind.STATUS, target=target, status=503)
    for _ in range(3):
        one.activity()
    async with one.database() as connection:

        async def waits() -> bool | None:
            query = "SELECT true FROM jobs WHERE activity_id = $1 AND state = 'collecting' AND waiting_party = $2"
            found: bool | None = await connection.fetchval(query, runs, party)
            return found

        await until(waits, f"a run that waits for {party}", one.agents["a"].log)
        await connection.execute(
            "UPDATE jobs SET waiting_since = waiting_since - interval '1 hour', due_at = now()"
            " WHERE waiting_party = $1 AND lease_until IS NULL",
            party,
        )

        async def looked_again() -> float | None:
            seconds: float | None = await connection.fetchval(
                "SELECT extract(epoch FROM max(due_at) - now())::float8 FROM jobs WHERE waiting_party = $1"
                " AND waiting_since < now() - interval '1 hour'"
                " HAVING bool_and(lease_until IS NULL AND due_at > now())",
                party,
            )
            return seconds

        longest = await until(looked_again, f"another try after an hour without {party}", one.agents["a"].log)
    assert longest <= _LONGEST_WAIT_SECONDS
    asked = away.hits
    await asyncio.sleep(2)
    assert away.hits - asked <= 5, "only one may ask whether it is back"
    faults.remove()
    one.fault_cleared()
    await one.recovered(f"{party} is away")
    assert parties(one) == [("party_away", party), ("party_back", party)]
    assert [line["event"] for line in warnings(one)] == ["party_away"]
    assert await attempts(one) == 0
    await one.check()


@asynccontextmanager
async def _behind_proxies(one: Chaos) -> AsyncIterator[list[Proxy]]:
    """Put a proxy in front of each of Ovation's servers and of the object store."""
    sandbox = one.lab.sandbox
    async with Proxy(sandbox.api_url) as api, Proxy(sandbox.services_url) as files, Proxy(sandbox.s3_url) as store:
        sandbox.model.services_url = files.address
        sandbox.uploads.s3_url = store.address
        one.environment |= {
            "OVATION_API_URL": api.address,
            "OVATION_HOSTS": files.address,
            "AWS_ENDPOINT_URL_S3": store.address,
        }
        yield [api, files, store]


@pytest.mark.timeout(1800)
async def test_servers_that_are_gone(chaos: Chaos, seed: int, *, long_form: bool) -> None:
    chance = random.Random(seed)  # noqa: S311 repeatable, not secret
    if not long_form:
        chaos.settings["CHAOS_STALL_SECONDS"] = "4"  # instead of 30
    async with _behind_proxies(chaos) as servers:
        await chaos.start()
        for way in ("close", "hush", "cut", "forget") * (5 if long_form else 1):
            for _ in range(2):
                chaos.activity()
            await asyncio.sleep(chance.uniform(0.2, 1.5))
            await _be_gone(servers, way, chance)
            chaos.fault_cleared()
        await chaos.recovered("servers that are gone")
        told = parties(chaos)
        assert told.count(("party_away", "Ovation")) == told.count(("party_back", "Ovation")) > 0
        assert await attempts(chaos) == 0
        await chaos.check()
        await chaos.stop()


async def _be_gone(servers: Sequence[Proxy], way: str, chance: random.Random) -> None:
    """Refuse connections for a while, say nothing for a while or never again, or cut what is under way some times."""
    if way == "close":
        await asyncio.gather(*(server.close() for server in servers))
        await asyncio.sleep(2)
        await asyncio.gather(*(server.open() for server in servers))
    elif way in {"hush", "forget"}:
        for server in servers:
            server.hush()
        await asyncio.sleep(2)
        for server in servers:
            (server.speak if way == "hush" else server.speak_to_new_ones)()
    else:
        for _ in range(8):
            await asyncio.sleep(chance.uniform(0.02, 0.3))
            for server in servers:
                server.cut()
