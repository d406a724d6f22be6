"""The webhook sender: gets what is in the outbox to its receivers (ovation-api.md section 7).

Two generations with rules of their own: *research* webhooks are sent until they succeed, *lab* subscriptions three
times at most. Sending goes on after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import structlog

from agent.sandbox.records import Records
from agent.sandbox.settings import Clock, WebhookSettings

log = structlog.get_logger(__name__)

RESEARCH_SUCCESS = frozenset({200, 201, 202, 204})
LAB_SUCCESS = range(200, 300)


class WebhookSender:
    """Sends what is due, a bounded number at a time, and keeps a log of every attempt."""

    def __init__(self, records: Records, settings: WebhookSettings, clock: Clock) -> None:
        self.records = records
        self.settings = settings
        self.clock = clock
        self._wake = asyncio.Event()
        self._busy: dict[int, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to send, also what an earlier process left."""
        self.records.after_commit = self._wake.set
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop; what was not answered stays to be sent."""
        tasks = [*self._busy.values(), *([self._loop] if self._loop is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.records.after_commit = lambda: None

    def log(self) -> list[dict[str, Any]]:
        """Return every attempt, oldest first, with the state that its delivery is now in."""
        query = (
            "SELECT attempts.*, webhook_id, generation, method, url, body, state FROM attempts"
            " JOIN deliveries ON deliveries.id = attempts.delivery_id ORDER BY attempts.id"
        )
        return [{**dict(row), "body": json.loads(row["body"])} for row in self.records.rows(query)]

    def pending(self) -> int:
        """Return how many deliveries are still to be made."""
        return int(self.records.rows("SELECT count(*) FROM deliveries WHERE state = 'pending'")[0][0])

    async def _run(self) -> None:
        async with aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), connector=aiohttp.TCPConnector(limit=self.settings.concurrency)
        ) as session:
            while True:
                self._wake.clear()
                room = self.settings.concurrency - len(self._busy)
                for row in self._due(room):
                    task = asyncio.create_task(self._deliver(session, row))
                    self._busy[row["id"]] = task
                    task.add_done_callback(self._done(row["id"]))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._idle_seconds()):
                        await self._wake.wait()

    def _done(self, delivery_id: int) -> Callable[[asyncio.Task[None]], None]:
        def forget(task: asyncio.Task[None]) -> None:
            del self._busy[delivery_id]
            self._wake.set()
            if not task.cancelled() and task.exception() is not None:
                log.error("webhook_sender_failed", exc_info=task.exception())

        return forget

    def _due(self, room: int) -> list[sqlite3.Row]:
        query = "SELECT * FROM deliveries WHERE state = 'pending' AND due_at <= ? ORDER BY due_at, id LIMIT ?"
        rows = self.records.rows(query, self.clock(), room + len(self._busy))
        return [row for row in rows if row["id"] not in self._busy][:room]

    def _idle_seconds(self) -> float | None:
        if len(self._busy) >= self.settings.concurrency:
            return None
        query = "SELECT id, due_at FROM deliveries WHERE state = 'pending' ORDER BY due_at LIMIT ?"
        rows = self.records.rows(query, len(self._busy) + 1)
        waits = [row["due_at"] - self.clock() for row in rows if row["id"] not in self._busy]
        return max(0.0, min(waits)) if waits else None

    async def _deliver(self, session: aiohttp.ClientSession, row: sqlite3.Row) -> None:
        research = row["generation"] == "research"
        limit = self.settings.research_timeout_seconds if research else self.settings.lab_timeout_seconds
        started_at, begun = self.clock(), time.monotonic()
        status, error = await self._attempt(session, row, limit)
        attempt = row["attempt"] + 1
        success = status in (RESEARCH_SUCCESS if research else LAB_SUCCESS)
        state, due_at = "done", row["due_at"]
        if not success:
            wait = self._retry_seconds(attempt, research=research)
            state = "lost" if wait is None else "pending"
            due_at = self.clock() + (wait or 0)
        with self.records.transaction():
            self.records.write(
                "INSERT INTO attempts (delivery_id, attempt, started_at, seconds, status, error)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                *(row["id"], attempt, started_at, time.monotonic() - begun, status, error),
            )
            self.records.write(
                "UPDATE deliveries SET state = ?, attempt = ?, due_at = ? WHERE id = ?",
                state,
                attempt,
                due_at,
                row["id"],
            )
        log.info("webhook", delivery_id=row["id"], attempt=attempt, status=status, error=error, state=state)

    async def _attempt(
        self, session: aiohttp.ClientSession, row: sqlite3.Row, limit_seconds: float
    ) -> tuple[int | None, str | None]:
        headers = {**json.loads(row["headers"]), "Content-Type": "application/json"}
        if row["username"] is not None:
            headers["Authorization"] = aiohttp.encode_basic_auth(row["username"], row["password"] or "")
        timeout = aiohttp.ClientTimeout(total=limit_seconds)
        try:
            async with session.request(
                row["method"],
                row["url"],
                data=row["body"].encode(),
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                await response.read()
                return response.status, None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return None, type(error).__name__

    def _retry_seconds(self, attempt: int, *, research: bool) -> float | None:
        if research:
            return self.settings.research_backoff_seconds(attempt)
        waits = self.settings.lab_retry_seconds
        return waits[attempt - 1] if attempt <= len(waits) else None
