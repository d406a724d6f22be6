"""Whether the agent is there (`/healthz`) and able to work (`/readyz`)."""

from __future__ import annotations

from aiohttp import hdrs, web

from agent.errors import DatabaseError
from agent.web.state import SERVICES, problem

routes = web.RouteTableDef()


@routes.get("/")
@routes.get("/healthz")
async def alive(_: web.Request) -> web.Response:
    """Answer as the first compute manager did."""
    return web.json_response({"status": "alive"})


@routes.get("/readyz")
async def ready(request: web.Request) -> web.Response:
    """Answer 200 when the database does and has the schema that this program needs."""
    try:
        await request.app[SERVICES].database.check()
    except DatabaseError as error:
        return problem(503, str(error), {hdrs.RETRY_AFTER: "10"})
    return web.json_response({"status": "ready"})
