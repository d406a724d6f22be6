"""`/api/log` and `/api/admission`: the agent's own log as it is written, and whether queued jobs are let in."""

from __future__ import annotations

import asyncio
import json
import re

from aiohttp import hdrs, web

from agent.logs import Line, logger, recent
from agent.web.answers import Admission
from agent.web.jobs import authorize, flag, number
from agent.web.state import MAX_LOG_OFFSET, MAX_TAIL, SERVICES, failure

routes = web.RouteTableDef()
_FOLLOW_SECONDS = 0.2
_SIGN_OF_LIFE_SECONDS = 15.0


@routes.get("/api/log")
async def read_log(request: web.Request) -> web.StreamResponse:
    """Send the last lines of this agent's log as JSON, one a line; with `follow=1`, and those that come."""
    authorize(request)
    after = number(request.query, "after", 0, MAX_LOG_OFFSET) or 0
    process = request.query.get("process", recent.process)
    if re.fullmatch(r"[0-9a-f]{1,64}", process) is None:
        raise failure(400, "process is none of those that Log-Process names")
    if process != recent.process:
        after = 0  # that was another process, with numbers of its own
    tail, following = number(request.query, "tail", 0, MAX_TAIL), flag(request.query, "follow")
    response = web.StreamResponse(
        headers={
            hdrs.CONTENT_TYPE: "application/x-ndjson",
            "X-Content-Type-Options": "nosniff",
            "Log-Process": recent.process,
        }
    )
    await response.prepare(request)
    if request.method == hdrs.METH_HEAD:
        return response
    lines = recent.after(after)
    lines = lines if tail is None else lines[len(lines) - min(tail, len(lines)) :]
    quiet = 0.0
    while True:
        if lines:
            await response.write(b"".join(map(_as_json, lines)))
            after, quiet = lines[-1].number, 0.0
        elif quiet > _SIGN_OF_LIFE_SECONDS:
            await response.write(b"\n")
            quiet = 0.0
        if not following:
            break
        await asyncio.sleep(_FOLLOW_SECONDS)
        quiet += _FOLLOW_SECONDS
        lines = recent.after(after)
    await response.write_eof()
    return response


def _as_json(line: Line) -> bytes:
    return json.dumps({"number": line.number, **line.event}, default=str).encode() + b"\n"


@routes.get("/api/admission")
async def admission(request: web.Request) -> web.Response:
    """Say whether queued jobs are let in, and how many are under way here."""
    authorize(request)
    return await _admission(request)


@routes.post("/api/admission/stop")
async def stop(request: web.Request) -> web.Response:
    """Let no queued job in any more; what was let in goes on to its end."""
    authorize(request)
    request.app[SERVICES].worker.admit(admits=False)
    logger().info("admission_stopped")
    return await _admission(request)


@routes.post("/api/admission/start")
async def start(request: web.Request) -> web.Response:
    """Let queued jobs in again."""
    authorize(request)
    request.app[SERVICES].worker.admit(admits=True)
    logger().info("admission_started")
    return await _admission(request)


async def _admission(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    return web.json_response(Admission(admits=services.worker.admits, under_way=await services.work.here()))
