"""Points at which an agent can be made to die, before and after everything that it does for good.

They are put around the calls themselves, in the forked child before `serve` begins: the product has no hook, and what
will be written there in future has its points at once. A point is `<kind>:<what>:<before or after>`, without ids.

    file       a change of a name or of a file's bytes, below the directories that the plan names
    sql        a statement that writes, by the name of the query; or the commit of what was written before
    http       a request that is not only for reading, to Ovation or to the object store
    process    the start of a program
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
from yarl import URL

from agent.adapters import lane
from agent.db import database
from tests.chaos import filepoints
from tests.chaos.points import Plan, Points

_WRITES = re.compile(r"\b(INSERT INTO|DELETE FROM|(?<!FOR )UPDATE|CREATE|ALTER|DROP|TRUNCATE)\b")
_READS_ONLY = frozenset({"GET", "HEAD", "OPTIONS"})


def install(plan: Plan) -> None:
    """Put the points around everything, in this process and from now on; without a plan, nothing is changed."""
    if not plan.record and not plan.kill:
        return
    tempfile.gettempdir()  # the first time, that writes a file
    points = Points(plan)
    filepoints.install(points)
    _around_statements(points)
    _around_requests(points)
    _around_programs(points)


def _around_statements(points: Points) -> None:
    queries = database._QUERIES
    names = {}
    for name in sorted(queries.available_queries, reverse=True):  # of `x` and `x_cursor`, `x` is kept
        names[getattr(queries, name).sql] = name
    written: contextvars.ContextVar[str] = contextvars.ContextVar("written", default="nothing")

    def called(sql: str) -> str | None:
        if sql.startswith("COMMIT"):
            return f"commit of {written.get()}"
        if not _WRITES.search(sql):
            return None
        name = names.get(sql) or " ".join(sql.split()[:3])
        written.set(name)
        return name

    def wrap(verb: str) -> None:
        original = getattr(asyncpg.Connection, verb)

        async def wrapper(connection: Any, sql: str, *arguments: Any, **named: Any) -> Any:
            name = called(sql)
            if name is None:
                return await original(connection, sql, *arguments, **named)
            with points.around(f"sql:{name}"):
                return await original(connection, sql, *arguments, **named)

        setattr(asyncpg.Connection, verb, wrapper)

    for verb in ("execute", "executemany", "fetch", "fetchrow", "fetchval"):
        wrap(verb)


def _around_requests(points: Points) -> None:
    original = aiohttp.ClientSession._request

    def called(method: str, address: URL) -> str:
        host = points.plan.hosts.get(str(address.origin()), "elsewhere")
        query = "&".join(f"{key}={value if value.isdigit() else ''}" for key, value in sorted(address.query.items()))
        return f"{method} {host} {address.path}{'?' + query if query else ''}"

    async def wrapper(session: Any, method: str, url: Any, **named: Any) -> Any:
        if method.upper() in _READS_ONLY:
            return await original(session, method, url, **named)
        address = URL(url) if session._base_url is None else session._base_url.join(URL(url))
        with points.around(f"http:{called(method.upper(), address)}"):
            return await original(session, method, url, **named)

    aiohttp.ClientSession._request = wrapper  # type: ignore[assignment,method-assign]
    through_lane = lane.Lane._answer

    def answer(self: lane.Lane, method: str, target: str, *rest: Any) -> Any:
        if method in _READS_ONLY:
            return through_lane(self, method, target, *rest)
        with points.around(f"http:{called(method, self.origin.join(URL(target, encoded=True)))}"):
            return through_lane(self, method, target, *rest)

    lane.Lane._answer = answer  # type: ignore[assignment,method-assign]


def _around_programs(points: Points) -> None:
    original = asyncio.create_subprocess_exec

    async def wrapper(program: Any, *arguments: Any, **named: Any) -> Any:
        words = [Path(os.fsdecode(word)).name for word in (program, *arguments)]
        what = " ".join(word for word in words[:5] if not word.startswith("-") or word == "--version")
        with points.around(f"process:{what.replace(Path(sys.executable).name, 'python')}"):
            return await original(program, *arguments, **named)

    asyncio.create_subprocess_exec = wrapper
