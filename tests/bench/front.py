"""The agent's front door alone, in a process of its own, with one of several inboxes behind it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

from aiohttp import web

from agent.db.database import Database
from agent.db.watched import WatchList
from agent.domain.delivery import Delivery, Receipt
from agent.settings import Settings
from agent.trigger.inbox import Inbox
from agent.web.application import runner as runner_of
from agent.web.state import Services
from tests.agents import WEBHOOK_KEY

SETTLE_SECONDS, LONGEST_SECONDS = 10.0, 300.0


class NoDatabase:
    """Takes everything and keeps nothing: what the handler alone costs."""

    async def store(self, _: Delivery) -> Receipt:
        return Receipt.STORED

    async def close(self) -> None: ...


class OneByOne:
    """Commits each delivery by itself."""

    def __init__(self, watch_list: WatchList) -> None:
        self._watch_list = watch_list

    async def store(self, delivery: Delivery) -> Receipt:
        [receipt] = await self._watch_list.take([delivery], SETTLE_SECONDS, LONGEST_SECONDS)
        return receipt

    async def close(self) -> None: ...


async def serve(kind: str, dsn: str) -> None:
    """Serve webhooks until SIGTERM; print the address first."""
    settings = Settings.model_validate({"agent": {"webhook_username": WEBHOOK_KEY, "webhook_password": WEBHOOK_KEY}})
    async with AsyncExitStack() as stack:
        inbox: NoDatabase | OneByOne | Inbox = NoDatabase()
        if kind != "none":
            database = await Database.open(dsn, "the bench's database")
            stack.push_async_callback(database.close)
            watch_list = WatchList(database)
            grouped = Inbox(watch_list, SETTLE_SECONDS, LONGEST_SECONDS, on_hint=lambda: None)
            inbox = grouped if kind == "group" else OneByOne(watch_list)
        nothing = cast("Any", None)  # webhooks meet nothing else of the agent
        services = Services(
            settings=settings,
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
        runner = runner_of(services)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        sys.stdout.write(json.dumps(f"http://127.0.0.1:{runner.addresses[0][1]}") + "\n")
        sys.stdout.flush()
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
