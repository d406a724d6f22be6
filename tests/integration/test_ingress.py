"""The way in: signed webhooks, group commit, refusals; on real databases, and real agents where that matters."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import aiohttp
import asyncpg
import pytest
import structlog
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from agent.db import watched as watched_module
from agent.db.database import Database
from agent.db.watched import Watched, WatchList
from agent.domain.delivery import Delivery, Receipt
from agent.domain.webhook import Hint
from agent.errors import DatabaseError
from agent.settings import Settings
from agent.trigger import inbox as inbox_module
from agent.trigger.inbox import Inbox
from agent.web import refusals as refusals_module
from agent.web.application import application
from agent.web.state import Services
from tests.agents import WEBHOOK_KEY, AgentProcess, agent_environment, running_agent, until
from tests.conftest import fresh_database

KEY, NEWER_KEY = b"a key for webhooks, of 24 bytes or more", b"the key that takes its place one day"
SECRET, NEWER_SECRET = (f"whsec_{base64.b64encode(key).decode()}" for key in (KEY, NEWER_KEY))
NOWHERE = {"OVATION_API_URL": "http://127.0.0.1:9", "OVATION_TOKEN": "nothing", "OVATION_HOSTS": "127.0.0.1"}
RESTING = {"AGENT_SETTLE_SECONDS": "3600", "AGENT_SETTLE_MAX_SECONDS": "3600", "AGENT_RECONCILE_SECONDS": "86400"}


def notice(entity_id: str = "activity-1", kind: str = "Activity") -> bytes:
    return json.dumps({"id": entity_id, "type": kind, "organization": 3}).encode()


def signed(body: bytes, message_id: str, *keys: bytes, ago_seconds: float = 0) -> dict[str, str]:
    timestamp = str(int(time.time() - ago_seconds))
    digests = [hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, "sha256") for key in keys or (KEY,)]
    signatures = " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
    return {"webhook-id": message_id, "webhook-timestamp": timestamp, "webhook-signature": signatures}


def basic() -> dict[str, str]:
    return {"Authorization": aiohttp.encode_basic_auth(WEBHOOK_KEY, WEBHOOK_KEY)}


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = await Database.open(url, "the test database")
    try:
        await database.migrate()
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def front(inbox: Inbox, **agent: object) -> AsyncIterator[tuple[TestClient[Any, Any], Services]]:
    """Serve webhooks with this inbox; nothing else of the agent is there."""
    nothing = cast("Any", None)
    services = Services(
        settings=Settings.model_validate({"agent": agent}),
        database=nothing,
        watch_list=nothing,
        jobs=nothing,
        outputs=nothing,
        ovation=nothing,
        data_dir=Path(),
        admin_token="",
        inbox=inbox,
        on_job=nothing,
        on_cancel=nothing,
        work=nothing,
        worker=nothing,
        log_questions=nothing,
    )
    async with TestClient(TestServer(application(services))) as client:
        yield client, services
        services.refusals.close()
        await inbox.close()


def inbox_on(watch_list: WatchList, settle_seconds: float = 60) -> Inbox:
    return Inbox(watch_list, settle_seconds, 300, on_hint=lambda: None)


async def post(
    client: TestClient[Any, Any], body: bytes, headers: dict[str, str], path: str = "", method: str = "POST"
) -> tuple[int, Any]:
    async with client.request(method, f"/webhooks/ovation{path}", data=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def rows(database: Database, query: str = "SELECT * FROM deliveries ORDER BY id") -> list[Any]:
    async with database.connection() as connection:
        found: list[Any] = await connection.fetch(query)
        return found


async def test_a_signature_lets_a_webhook_in(database: Database) -> None:
    async with front(inbox_on(WatchList(database)), webhook_secret=f"{SECRET},{NEWER_SECRET}") as (client, _):
        for number, keys in enumerate([(KEY,), (NEWER_KEY,), (b"another", KEY), (KEY, NEWER_KEY)]):
            body = notice(f"activity-{number}")
            assert await post(client, body, signed(body, f"message-{number}", *keys)) == (202, {"accepted": 1})
        body = notice("activity-4")
        assert (await post(client, body, signed(body, "message-4"), "/7", "DELETE"))[0] == 202
    stored = [(row["entity_id"], row["organization"], row["message_id"]) for row in await rows(database)]
    assert stored == [(f"activity-{n}", 3 if n < 4 else 7, f"message-{n}") for n in range(5)]


BODY = notice()


def forged() -> dict[str, tuple[bytes, dict[str, str], str]]:
    """Return what nobody signed, and what is said of it; signed now, because a signature is only good for minutes."""
    body, good = BODY, signed(BODY, "message-1")
    return {
        "nothing": (body, {}, "does not carry a signature"),
        "basic auth": (body, basic(), "does not carry a signature"),
        "another key": (body, signed(body, "message-1", b"another"), "no signature is made with"),
        "another body": (notice("activity-2"), good, "no signature is made with"),
        "another id": (body, {**good, "webhook-id": "message-2"}, "no signature is made with"),
        "no JSON": (b"{", good, "no signature is made with"),
        "old": (body, signed(body, "message-1", ago_seconds=400), "five minutes"),
        "from the future": (body, signed(body, "message-1", ago_seconds=-400), "five minutes"),
        "no id": (body, {key: value for key, value in good.items() if key != "webhook-id"}, "needed together"),
        "no time": (body, {**good, "webhook-timestamp": "soon"}, "number of seconds"),
        "malformed": (body, {**good, "webhook-signature": "v1 v1, v2,AAAA v1,AAAA"}, "no signature of version"),
    }


@pytest.mark.parametrize("case", forged())
async def test_what_nobody_signed_is_refused(database_url: str, case: str) -> None:
    body, headers, detail = forged()[case]
    async with (
        opened(database_url) as database,
        front(inbox_on(WatchList(database)), webhook_secret=SECRET) as (client, services),
    ):
        async with client.post("/webhooks/ovation", data=body, headers=headers) as answer:
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (
                401,
                'StandardWebhooks realm="ovation-agent"',
            )
            assert detail in (await answer.json())["errors"]["detail"]
        assert (services.refusals.total, dict(services.refusals.by_status)) == (1, {401: 1})
        assert await rows(database) == []


async def test_a_signed_body_that_cannot_be_read_says_where(database_url: str) -> None:
    async with (
        opened(database_url) as database,
        front(inbox_on(WatchList(database)), webhook_secret=SECRET) as (client, _),
    ):
        status, answer = await post(client, b"{", signed(b"{", "message-1"))
        assert (status, "line 1, column 2" in answer["errors"]["detail"]) == (400, True)
        large = b" " * (64 * 1024 + 1)
        assert (await post(client, large, signed(large, "message-2")))[0] == 413
        irrelevant = notice(kind="Project")
        assert await post(client, irrelevant, signed(irrelevant, "message-3")) == (202, {"accepted": 0})
        assert await rows(database) == []


async def test_either_credential_suffices(database_url: str) -> None:
    both = {"webhook_secret": SECRET, "webhook_username": WEBHOOK_KEY, "webhook_password": WEBHOOK_KEY}
    wrong = {"Authorization": aiohttp.encode_basic_auth("nobody", "nothing")}
    forged = signed(BODY, "message-9", b"another")
    async with opened(database_url) as database, front(inbox_on(WatchList(database)), **both) as (client, _):
        for headers in (basic(), signed(BODY, "message-1"), wrong | signed(BODY, "message-2"), basic() | forged):
            assert (await post(client, BODY, headers))[0] == 202
        for headers in ({}, wrong, forged, wrong | forged):
            async with client.post("/webhooks/ovation", data=BODY, headers=headers) as answer:
                assert answer.status == 401
                assert answer.headers["WWW-Authenticate"].startswith(
                    'Basic realm="ovation-agent", charset="UTF-8", Sta'
                )
        # An id that no signature vouches for is anybody's: it must not make a later message a repeated one.
        assert [row["message_id"] for row in await rows(database)] == [None, "message-1", "message-2", None]


async def test_a_repeated_message_changes_nothing(database: Database) -> None:
    async with front(inbox_on(WatchList(database)), webhook_secret=SECRET) as (client, _):
        headers = signed(BODY, "message-1")
        answers = await asyncio.gather(*(post(client, BODY, headers) for _ in range(20)))
        assert sorted(answer["accepted"] for _, answer in answers) == [0] * 19 + [1]
        before = await rows(database, "SELECT * FROM watched")
        for path, method in (("", "POST"), ("/9", "DELETE"), ("/9", "POST")):  # neither is under the signature
            assert await post(client, BODY, headers, path, method) == (202, {"accepted": 0})
        assert await rows(database, "SELECT * FROM watched") == before
        assert len(await rows(database)) == 1
        assert await post(client, BODY, signed(BODY, "message-2")) == (202, {"accepted": 1})


async def test_agents_that_share_a_database_store_a_message_once(database: Database) -> None:
    inboxes = [inbox_on(WatchList(database)) for _ in range(3)]
    deliveries = [Delivery((Hint(f"activity-{n % 7}", "Activity", 0),), f"message-{n}") for n in range(200)]
    chance = random.Random(5)  # noqa: S311 repeatable
    orders = [chance.sample(deliveries, len(deliveries)) for _ in inboxes]
    receipts = await asyncio.gather(
        *(inbox.store(each) for inbox, order in zip(inboxes, orders, strict=True) for each in order)
    )
    assert sorted(receipts) == [Receipt.REPEATED] * 400 + [Receipt.STORED] * 200
    assert len(await rows(database)) == 200
    for inbox in inboxes:
        await inbox.close()


async def test_many_that_wait_are_committed_together(database: Database) -> None:
    inbox = inbox_on(WatchList(database))
    deliveries = [Delivery((Hint(f"activity-{number % 50}", "Activity", 0),)) for number in range(1200)]
    assert set(await asyncio.gather(*map(inbox.store, deliveries))) == {Receipt.STORED}
    groups = await rows(database, "SELECT received_at, count(*) AS size FROM deliveries GROUP BY received_at")
    assert sum(group["size"] for group in groups) == 1200
    assert max(group["size"] for group in groups) == 500
    assert len(groups) <= 4
    generations = await rows(database, "SELECT generation FROM watched")
    assert [row["generation"] for row in generations] == [24] * 50
    await inbox.close()


class Blocked(WatchList):
    """A watch list whose database can be told to hang or to fail."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.error: Exception | None = None
        self.batches: list[list[str]] = []

    async def take(self, deliveries: Sequence[Delivery], *_: float) -> list[Receipt]:
        self.batches.append([hint.entity_id for delivery in deliveries for hint in delivery.hints])
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return [Receipt.STORED] * len(deliveries)


def delivery(entity_id: str) -> Delivery:
    return Delivery((Hint(entity_id, "Activity", 0),))


async def turns(count: int = 20) -> None:
    """Let every task go as far as it can without time passing."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_an_idle_inbox_writes_at_once() -> None:
    watch_list = Blocked()
    inbox = inbox_on(watch_list)
    watch_list.open.set()
    for number in range(3):
        storing = asyncio.create_task(inbox.store(delivery(f"activity-{number}")))
        await turns()
        assert storing.done()
    assert watch_list.batches == [["activity-0"], ["activity-1"], ["activity-2"]]
    await inbox.close()


async def test_a_full_inbox_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_MOST_WAITING", 3)
    watch_list = Blocked()
    async with front(inbox_on(watch_list), webhook_anonymous=True) as (client, services):
        storing = [asyncio.create_task(services.inbox.store(delivery("first")))]
        await turns()
        storing += [asyncio.create_task(services.inbox.store(delivery(f"waiting-{number}"))) for number in range(3)]
        await turns()
        async with client.post("/webhooks/ovation", data=BODY) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
            assert "more webhooks wait" in (await answer.json())["errors"]["detail"]
        watch_list.open.set()
        assert await asyncio.gather(*storing) == [Receipt.STORED] * 4
        assert (await post(client, BODY, {}))[0] == 202


async def test_a_bad_delivery_fails_alone(database: Database) -> None:
    inbox = inbox_on(WatchList(database))
    bad = Delivery((Hint("bad", "Activity", 2**40),))  # no integer of PostgreSQL's
    deliveries = [delivery(f"activity-{number}") for number in range(60)]
    deliveries[17:17] = [bad]
    deliveries[40:40] = [bad]
    receipts = await asyncio.gather(*map(inbox.store, deliveries), return_exceptions=True)
    assert [type(receipt) for receipt in receipts].count(Receipt) == 60
    assert [number for number, receipt in enumerate(receipts) if isinstance(receipt, asyncpg.DataError)] == [17, 40]
    assert sorted(row["entity_id"] for row in await rows(database)) == sorted(f"activity-{n}" for n in range(60))
    await inbox.close()


async def test_a_database_that_is_away_fails_all_and_is_asked_again() -> None:
    watch_list = Blocked()
    watch_list.open.set()
    watch_list.error = DatabaseError("PostgreSQL cannot be reached")
    inbox = inbox_on(watch_list)
    receipts = await asyncio.gather(*(inbox.store(delivery(f"a-{n}")) for n in range(9)), return_exceptions=True)
    assert [str(receipt) for receipt in receipts] == ["PostgreSQL cannot be reached"] * 9
    assert len(watch_list.batches) == 1
    watch_list.error = None
    assert await inbox.store(delivery("again")) is Receipt.STORED
    await inbox.close()


async def test_who_gives_up_is_answered_and_not_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_list = Blocked()
    inbox = inbox_on(watch_list)
    first, second = (asyncio.create_task(inbox.store(delivery(name))) for name in ("first", "second"))
    await turns()
    monkeypatch.setattr(inbox_module, "_ANSWER_SECONDS", 0.05)
    third = asyncio.create_task(inbox.store(delivery("third")))
    with pytest.raises(DatabaseError, match="in time"):
        await third
    fourth = asyncio.create_task(inbox.store(delivery("fourth")))
    await turns()
    fourth.cancel()
    await turns()
    watch_list.open.set()
    assert [await first, await second] == [Receipt.STORED] * 2
    assert watch_list.batches == [["first", "second"]]
    await inbox.close()


async def test_a_database_that_hangs_does_not_hang_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_ANSWER_SECONDS", 0.05)
    watch_list = Blocked()
    inbox = inbox_on(watch_list)
    for number in range(2):
        with pytest.raises(DatabaseError, match="in time"):
            await inbox.store(delivery(f"activity-{number}"))
    watch_list.open.set()
    assert await inbox.store(delivery("activity-2")) is Receipt.STORED
    assert len(watch_list.batches) >= 2
    await inbox.close()


async def test_stopping_answers_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_DRAIN_SECONDS", 0.05)
    watch_list = Blocked()
    inbox = inbox_on(watch_list)
    storing = [asyncio.create_task(inbox.store(delivery("written")))]
    await turns()
    storing += [asyncio.create_task(inbox.store(delivery(f"waiting-{number}"))) for number in range(3)]
    await turns()
    await inbox.close()
    assert await asyncio.gather(*storing) == [Receipt.STOPPING] * 4
    assert await inbox.store(delivery("late")) is Receipt.STOPPING
    assert watch_list.batches == [["written"]]


async def test_stopping_writes_what_waits() -> None:
    watch_list = Blocked()
    inbox = inbox_on(watch_list)
    storing = [asyncio.create_task(inbox.store(delivery(f"activity-{number}"))) for number in range(2)]
    await turns()
    asyncio.get_running_loop().call_later(0.05, watch_list.open.set)
    await inbox.close()
    assert await asyncio.gather(*storing) == [Receipt.STORED] * 2


hints = st.builds(
    Hint,
    entity_id=st.sampled_from(["a", "b", "c"]),
    type=st.sampled_from(["Activity", "Revision"]),
    organization=st.sampled_from([None, 1, 2]),
    gained=st.none() | st.sampled_from(["input-1", "input-2", "image-1"]),
)
lots = st.lists(st.lists(hints, min_size=1, max_size=8), min_size=1, max_size=4)


@given(lots=lots, settle_seconds=st.sampled_from([0, 20, 60, 200]), rested=st.lists(st.booleans(), max_size=4))
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_group_means_what_its_deliveries_mean_one_by_one(
    lots: list[list[Hint]], settle_seconds: float, rested: list[bool], server_url: str
) -> None:
    async def watched(one_by_one: bool) -> list[tuple[object, ...]]:
        async with fresh_database(server_url) as url, opened(url) as database:
            watch_list = WatchList(database)
            for number, lot in enumerate(lots):
                deliveries = [Delivery((hint,)) for hint in lot]
                for group in [[each] for each in deliveries] if one_by_one else [deliveries]:
                    await watch_list.take(group, settle_seconds, 100)
                async with database.connection() as connection:  # time passes, and some are looked at
                    past = "UPDATE watched SET unquiet_since = unquiet_since - interval '30 seconds'"
                    await connection.execute(past)
                    if rested[number : number + 1] == [True]:
                        await connection.execute(
                            "UPDATE watched SET unquiet_since = NULL, gained = '{}', attempt = 3, cause = 'reconcile'"
                        )
            query = (
                "SELECT entity_id, entity_type, organization, ARRAY(SELECT unnest(gained) ORDER BY 1), generation,"
                " attempt, cause,"
                " round(extract(epoch FROM unquiet_since - now())) AS since,"
                " round(extract(epoch FROM due_at - now()) / 10) AS due FROM watched ORDER BY entity_id"
            )
            counted = "SELECT entity_id, organization, count(*) FROM deliveries GROUP BY 1, 2 ORDER BY 1, 2"
            return [tuple(row) for query in (query, counted) for row in await rows(database, query)]

    assert asyncio.run(watched(one_by_one=False)) == asyncio.run(watched(one_by_one=True))


async def test_groups_and_looks_do_not_wait_for_each_other_in_a_ring(database: Database) -> None:
    """Everything that writes several rows of `watched` at once, at the same time, on the same rows."""
    watch_list = WatchList(database)
    names = [f"entity-{number}" for number in range(12)]
    chance = random.Random(3)  # noqa: S311 repeatable
    await watch_list.hint([Hint(name, "Revision", 0) for name in names], 0)
    looks = await watch_list.claim(len(names), 60, "tests")
    end = time.monotonic() + 2

    async def groups() -> None:
        while time.monotonic() < end:
            await watch_list.take([delivery(name) for name in chance.sample(names, 8)], 60, 300)

    async def judge(watched: Watched) -> None:
        while time.monotonic() < end:
            more = [Hint(name, "Activity", 0) for name in chance.sample(names, 8)]
            await watch_list.judged(watched, more=more)

    async def walk() -> None:
        while time.monotonic() < end:
            some = chance.sample(names, 8)
            async with database.queries() as queries:
                stamps = [str(time.monotonic_ns())] * len(some)
                await queries.value(
                    "note_listed", ids=some, listed_at=stamps, recent=[True] * len(some), organization=0
                )
                await queries.value("look_again_slowly", organization=0, age=timedelta(0), most=10)

    async def claim() -> None:
        while time.monotonic() < end:
            for watched in await watch_list.claim(4, 0, "others"):
                await watch_list.judged(watched)

    await asyncio.gather(groups(), groups(), judge(looks[0]), judge(looks[1]), walk(), walk(), claim())


async def test_old_deliveries_are_swept(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_module, "_SWEEP_AT_ONCE", 4)
    watch_list = WatchList(database)
    assert await watch_list.sweep() == 0
    deliveries = [Delivery((Hint(f"activity-{n}", "Activity", 0),), f"message-{n:02}") for n in range(11)]
    await watch_list.take(deliveries, 60, 300)
    assert await watch_list.sweep() == 0
    async with database.connection() as connection:
        old = "UPDATE deliveries SET received_at = now() - $1::interval WHERE id <= $2"
        await connection.execute(old, timedelta(days=8), 11)
        assert await watch_list.sweep() == 0
        assert set(await watch_list.take(deliveries, 60, 300)) == {Receipt.REPEATED}
        await connection.execute(old, timedelta(days=31), 9)
    assert await watch_list.sweep() == 9
    assert [row["entity_id"] for row in await rows(database)] == ["activity-9", "activity-10"]


async def test_refusals_leave_a_number_and_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals_module, "_QUIET_SECONDS", 0.3)
    with structlog.testing.capture_logs() as lines:
        async with front(inbox_on(Blocked()), webhook_secret=SECRET) as (client, services):
            for _ in range(30):
                assert (await post(client, BODY, {}))[0] == 401
            assert len(lines) == 1
            deadline = time.monotonic() + 10
            while len(lines) < 2:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            body = b"{"
            assert (await post(client, body, signed(body, "message-1")))[0] == 400
            assert services.refusals.total == 31
            assert dict(services.refusals.by_status) == {401: 30, 400: 1}
    told = [(line["event"], line["refused"], line["total"]) for line in lines]
    assert told == [("webhooks_refused", 1, 1), ("webhooks_refused", 29, 30), ("webhooks_refused", 1, 31)]
    assert lines[0]["last"] == "401 to 127.0.0.1: the webhook does not carry a signature"


@asynccontextmanager
async def agent_on(url: str, directory: Path, **settings: str) -> AsyncIterator[AgentProcess]:
    async with opened(url):
        pass
    async with running_agent(NOWHERE, directory, AGENT_DATABASE_URL=url, **RESTING, **settings) as agent:
        yield agent


async def test_a_secret_is_credential_enough_to_serve(tmp_path: Path, database_url: str) -> None:
    nobody = {"AGENT_WEBHOOK_USERNAME": "", "AGENT_WEBHOOK_PASSWORD": ""}
    async with (
        agent_on(database_url, tmp_path, AGENT_WEBHOOK_SECRET=f"{SECRET}, {NEWER_SECRET}", **nobody) as agent,
        aiohttp.ClientSession(agent.address) as http,
    ):
        for headers, status in ((signed(BODY, "message-1", NEWER_KEY), 202), (basic(), 401), ({}, 401)):
            async with http.post("/webhooks/ovation/4", data=BODY, headers=headers) as answer:
                assert answer.status == status

        async def told() -> bool | None:
            return True if agent.events("webhooks_refused") else None

        await until(told, "the line about refusals", agent.log)
        await agent.stop()
        assert [line["refused"] for line in agent.events("webhooks_refused")] == [1, 1]
        log = agent.log.read_text()
    for secret in (SECRET, NEWER_SECRET, "message-1"):
        assert secret not in log
    environment = agent_environment(NOWHERE, tmp_path, AGENT_DATABASE_URL=database_url, **nobody)
    with pytest.raises(AssertionError, match="or AGENT_WEBHOOK_SECRET"):
        await AgentProcess.start(environment, tmp_path / "refused.log")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_202_was_committed_whatever_ends_the_agent(
    tmp_path: Path, database_url: str, end: signal.Signals
) -> None:
    accepted: set[str] = set()
    answers: dict[int, int] = {}
    async with agent_on(database_url, tmp_path) as agent:

        async def send(sender: int) -> None:
            async with aiohttp.ClientSession(agent.address) as http:
                number = 0
                while agent.process.returncode is None:
                    number += 1
                    entity_id = f"activity-{sender}-{number}"
                    try:
                        async with http.post("/webhooks/ovation", data=notice(entity_id), headers=basic()) as answer:
                            answers[answer.status] = answers.get(answer.status, 0) + 1
                            if answer.status == 202:
                                accepted.add(entity_id)
                    except aiohttp.ClientError:
                        return  # the connection went with the agent

        sending = [asyncio.create_task(send(sender)) for sender in range(24)]

        async def busy() -> bool | None:
            return True if len(accepted) >= 500 else None

        await until(busy, "500 deliveries", agent.log)
        os.kill(agent.process.pid, end)
        await asyncio.gather(*sending)
        await asyncio.wait_for(agent.process.wait(), 30)
        assert not [line for line in agent.events() if line["level"] == "error"]
    assert set(answers) <= {202, 503}
    async with opened(database_url) as database:
        stored = {row["entity_id"] for row in await rows(database)}
        assert accepted <= stored
        assert len(stored - accepted) <= 24
        assert {row["entity_id"] for row in await rows(database, "SELECT entity_id FROM watched")} == stored
