"""What the commands follow: logs that go on over a broken connection, jobs as they move, a machine as it empties."""

from __future__ import annotations

import asyncio
import codecs
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from agent import console
from agent.client import AgentRefused, Client
from agent.logs import printable
from agent.settings import Settings

_AGAIN_SECONDS = 1.0
_PATIENCE_SECONDS = 300.0
_LOOK_SECONDS = 2.0
_EVENTS_SECONDS = 1.0
_ENDED = {"succeeded", "failed", "cancelled"}
_COLOURS = {"job": "cyan", "out": None, "err": "yellow"}


class Patience:
    """How long an agent that does not answer is waited for; said once."""

    def __init__(self, *, follow: bool) -> None:
        self._follow = follow
        self._since: float | None = None

    def answered(self) -> None:
        """Take note that it is there."""
        if self._since is not None:
            print("ovation-agent: the agent is back", file=sys.stderr)  # noqa: T201 this is for who follows
        self._since = None

    async def lost(self, error: AgentRefused) -> None:
        """Wait before the next try.

        Raises:
            AgentRefused: it will not, or was waited for too long, or nobody follows.
        """
        if not self._follow or not error.transient:
            raise error
        now = time.monotonic()
        if self._since is None:
            self._since = now
            print(f"ovation-agent: {error}; trying again", file=sys.stderr)  # noqa: T201 see above
        if now - self._since > _PATIENCE_SECONDS:
            raise error
        await asyncio.sleep(_AGAIN_SECONDS)


async def log_of(
    settings: Settings, job: str, stream: str, *, follow: bool, tail: int | None = None
) -> AsyncIterator[bytes]:
    """Read a log of a job; what breaks off goes on at the very byte.

    Raises:
        AgentRefused: it is not to be had.
    """
    offset: int | None = None
    patience = Patience(follow=follow)

    def begins(headers: Mapping[str, str]) -> None:
        nonlocal offset
        offset = int(headers.get("Log-Offset", offset or 0))
        patience.answered()

    while True:
        try:
            async with Client.find(settings) as client:
                query = {
                    "follow": "1" if follow else "0",
                    "offset": None if offset is None else str(offset),
                    "tail": str(tail) if offset is None and tail is not None else None,
                }
                async for piece in client.stream("api", "jobs", job, "logs", stream, on_headers=begins, **query):
                    offset = (offset or 0) + len(piece)
                    yield piece
                return
        except AgentRefused as error:
            await patience.lost(error)


async def show_log(settings: Settings, job: str, stream: str, *, follow: bool, tail: int | None) -> None:
    """Print a log of a job, as it is."""
    await console.show_log(log_of(settings, job, stream, follow=follow, tail=tail))


async def show_all(settings: Settings, job: str, *, follow: bool, tail: int | None) -> None:
    """Print the moves of a job and both of its container's outputs, each line with where it is from."""
    async with Client.find(settings) as client:
        await client.get("api", "jobs", job)  # before anything is printed
    async with asyncio.TaskGroup() as group:
        for stream in ("stdout", "stderr"):
            group.create_task(_show_lines(settings, job, stream, follow=follow, tail=tail))
        group.create_task(_show_moves(settings, job, follow=follow))


async def _show_lines(settings: Settings, job: str, stream: str, *, follow: bool, tail: int | None) -> None:
    decoder, rest = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
    try:
        async for piece in log_of(settings, job, stream, follow=follow, tail=tail):
            *lines, rest = (rest + decoder.decode(piece)).split("\n")
            for line in lines:
                _say(stream[3:], line)
    except AgentRefused as error:
        if error.status != 404:  # noqa: PLR2004 it never ran, or its logs are no longer here
            raise
    if rest:
        _say(stream[3:], rest)


async def _show_moves(settings: Settings, job: str, *, follow: bool) -> None:
    patience, shown = Patience(follow=follow), 0
    while True:
        try:
            async with Client.find(settings) as client:
                found = await client.get("api", "jobs", job)
                events = (await client.get("api", "jobs", job, "events"))["events"]
        except AgentRefused as error:
            await patience.lost(error)
            continue
        patience.answered()
        for event in events:
            if event["id"] > shown:
                shown = event["id"]
                at = datetime.fromisoformat(event["at"]).astimezone()
                _say("job", f"{at:%H:%M:%S} {event['state']}{': ' + event['note'] if event['note'] else ''}")
        if not follow or found["state"] in _ENDED:
            if cause := console.cause(found):
                _say("job", cause)
            return
        await asyncio.sleep(_EVENTS_SECONDS)


def _say(source: str, line: str) -> None:
    text = printable(line.removesuffix("\r"), keep="\t")
    if sys.stdout.isatty() and (colour := _COLOURS[source]):
        from click import style

        text = style(text, fg=colour)
    print(f"{source} | {text}", flush=True)  # noqa: T201 this is what the command is for


async def show_agent_log(
    settings: Settings, *, follow: bool, tail: int | None, since_seconds: int | None, as_json: bool
) -> None:
    """Print the agent's own log, of all jobs."""
    patience, show, last = Patience(follow=follow), _line_shower(as_json=as_json), 0
    process: str | None = None
    oldest = None if since_seconds is None else datetime.now(UTC) - timedelta(seconds=since_seconds)

    def begins(headers: Mapping[str, str]) -> None:
        nonlocal process
        process = headers.get("Log-Process")
        patience.answered()

    while True:
        rest = b""
        try:
            async with Client.find(settings) as client:
                query = {
                    "follow": "1" if follow else "0",
                    "after": str(last) if last else None,
                    "process": process if last else None,
                    "tail": None if tail is None or last else str(tail),
                }
                async for piece in client.stream("api", "log", on_headers=begins, **query):
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in filter(None, lines):
                        event = json.loads(line)
                        number = event.pop("number")
                        last = number
                        if oldest is None or datetime.fromisoformat(event["timestamp"]) >= oldest:
                            show(event)
            if not follow:
                return
        except AgentRefused as error:
            await patience.lost(error)


def _line_shower(*, as_json: bool) -> Callable[[dict[str, Any]], None]:
    if as_json:
        return lambda event: print(json.dumps(event), flush=True)  # noqa: T201 this is what the command is for
    import structlog

    render = structlog.dev.ConsoleRenderer(
        colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=22
    )

    def show(event: dict[str, Any]) -> None:
        exception = event.pop("exception", None)
        clean = {
            key: value if isinstance(value, bool | int | float | None) else printable(str(value))
            for key, value in event.items()
        }
        print(render(None, "", clean), flush=True)  # noqa: T201 see above
        if exception:
            print(printable(str(exception), keep="\n"), flush=True)  # noqa: T201 see above

    return show


async def watch_jobs(settings: Settings, look: Callable[[Client], Awaitable[list[dict[str, Any]]]]) -> None:
    """Show jobs as they move, until interrupted."""
    patience = Patience(follow=True)
    with _job_board() as show:
        while True:
            try:
                async with Client.find(settings) as client:
                    while True:
                        show(await look(client))
                        patience.answered()
                        await asyncio.sleep(_LOOK_SECONDS)
            except AgentRefused as error:
                await patience.lost(error)


@contextmanager
def _job_board() -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    if not sys.stdout.isatty():
        seen: dict[str, tuple[Any, ...]] = {}

        def tell(jobs: list[dict[str, Any]]) -> None:
            for job in reversed(jobs):
                now = (job["state"], job["waiting_for"])
                if seen.get(job["id"]) != now:
                    seen[job["id"]] = now
                    console.show_jobs([job], as_json=False)
                    sys.stdout.flush()

        yield tell
        return
    from rich.live import Live

    with Live(auto_refresh=False, screen=True, vertical_overflow="crop") as live:
        yield lambda jobs: live.update(console.job_table(jobs), refresh=True)


async def drain(settings: Settings, *, wait: bool) -> None:
    """Let no queued job in, and wait until nothing is under way here."""
    async with Client.find(settings) as client:
        found = await client.post("api", "admission", "stop")
        print("no queued job is let in here until `ovation-agent drain --off`, or until the agent is started anew")  # noqa: T201
        told = None
        while wait and found["under_way"]:
            if found["under_way"] != told:
                told = found["under_way"]
                print(f"{told} under way", flush=True)  # noqa: T201 see above
            await asyncio.sleep(_LOOK_SECONDS)
            found = await client.get("api", "admission")
        if not found["under_way"]:
            print("nothing is under way here")  # noqa: T201 see above
