"""The agent's own HTTP API, as an operator sees it."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from typing import Any, Self

import aiohttp

from agent.sandbox.demo_errors import DemoFailed
from agent.sandbox.demo_screen import printable

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
JOB_STAGES = ("staging", "launching", "running", "collecting", "reporting")
_TIMEOUT = aiohttp.ClientTimeout(total=10)
_FOLLOW_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=None)
_POLL_SECONDS = 0.1
_LINE_CHARACTERS = 2_000  # a longer line is shown in pieces


class AgentClient:
    """A client of a running agent with its admin token; an async context manager."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._token}"}
        self._http = aiohttp.ClientSession(self._url, headers=headers, timeout=_TIMEOUT)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def is_alive(self) -> bool:
        """Tell whether the agent answers."""
        try:
            async with self._session.get("/healthz") as answer:
                return answer.status == 200  # noqa: PLR2004 OK
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def jobs(self, activity_id: str) -> list[dict[str, Any]]:
        """Return the Activity's jobs."""
        return list((await self._get(f"/api/jobs?activity_id={activity_id}"))["jobs"])

    async def job(self, job_id: str) -> dict[str, Any]:
        """Return one job."""
        return dict(await self._get(f"/api/jobs/{job_id}"))

    async def reasons(self, activity_id: str) -> list[str]:
        """Return why the Activity has no job yet, as far as the agent has looked at it."""
        try:
            return list((await self._get(f"/api/activities/{activity_id}"))["reasons"])
        except DemoFailed:
            return []

    async def events(self, job_id: str) -> list[dict[str, Any]]:
        """Return the job's moves, oldest first."""
        return list((await self._get(f"/api/jobs/{job_id}/events"))["events"])

    async def log(self, job_id: str, stream: str) -> str:
        """Return what the container has written to `stdout` or `stderr`; empty when that is not known."""
        try:
            async with self._session.get(f"/api/jobs/{job_id}/logs/{stream}") as answer:
                return await answer.text(errors="replace") if answer.ok else ""
        except (aiohttp.ClientError, TimeoutError):
            return ""

    async def follow(self, job_id: str) -> AsyncIterator[str]:
        """Yield the lines of the container's standard output as they come, until it ends or the agent does."""
        path = f"/api/jobs/{job_id}/logs/stdout?follow=1"
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        rest = ""
        with suppress(aiohttp.ClientError):
            async with self._session.get(path, timeout=_FOLLOW_TIMEOUT) as answer:
                if not answer.ok:
                    return
                async for chunk in answer.content.iter_any():
                    *lines, rest = (rest + decoder.decode(chunk)).split("\n")
                    # A line without an end is shown as far as it goes rather than kept.
                    if len(rest) > _LINE_CHARACTERS:
                        lines, rest = [*lines, rest], ""
                    for line in lines:
                        yield printable(line)
        if rest:
            yield printable(rest)

    async def cancel(self, activity_id: str, deadline_seconds: float, hurry: asyncio.Event) -> None:
        """Cancel the Activity's jobs and wait until they are over, for at most `deadline_seconds`."""
        deadline = time.monotonic() + deadline_seconds
        asked: set[str] = set()
        while not hurry.is_set() and time.monotonic() < deadline:
            live = [str(job["id"]) for job in await self.jobs(activity_id) if job["state"] not in TERMINAL]
            if not live:
                return
            for job_id in set(live) - asked:
                asked.add(job_id)
                await self._post(f"/api/jobs/{job_id}/cancel")
            await asyncio.sleep(_POLL_SECONDS)

    async def _post(self, path: str) -> None:
        """Ask, whatever the answer: a job that has ended by itself meanwhile cannot be cancelled any more."""
        try:
            async with self._session.post(path):
                pass
        except (aiohttp.ClientError, TimeoutError) as error:
            raise DemoFailed(f"POST {path}: {error or type(error).__name__}") from error

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            raise RuntimeError("use AgentClient as a context manager")
        return self._http

    async def _get(self, path: str) -> Any:
        try:
            async with self._session.get(path) as answer:
                if not answer.ok:
                    raise DemoFailed(f"GET {path} was answered with {answer.status}: {await answer.text()}")
                return await answer.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise DemoFailed(f"GET {path}: {error or type(error).__name__}") from error


def stage_seconds(job: Mapping[str, Any], events: list[dict[str, Any]]) -> dict[str, float]:
    """Return how long each stage took: from the first event in it to the first event after it in another state."""
    moves = [("queued", _moment(job["created_at"]))]
    for event in events:
        if event["state"] != moves[-1][0]:
            moves.append((str(event["state"]), _moment(event["at"])))
    return {state: (after - before).total_seconds() for (state, before), (_, after) in pairwise(moves)}


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
