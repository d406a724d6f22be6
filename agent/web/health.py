"""Whether the agent is there (`/healthz`), able to work and at it (`/readyz`), and its numbers (`/metrics`)."""

from __future__ import annotations

from aiohttp import hdrs, web

from agent.errors import DatabaseError
from agent.metrics import CONTENT_TYPE
from agent.web.state import SERVICES, Services, problem

routes = web.RouteTableDef()
_OLD_SECONDS = 300.0
"""Work that takes no place is begun within seconds: this old, something is wrong. A storm of webhooks takes minutes."""


@routes.get("/healthz")
async def alive(_: web.Request) -> web.Response:
    """Answer as the first compute manager did."""
    return web.json_response({"status": "alive"})


@routes.get("/readyz")
async def ready(request: web.Request) -> web.Response:
    """Answer 200 when the database does, every loop comes round, and no work that could be done is old."""
    if found := await troubles(request.app[SERVICES]):
        return problem(503, "; ".join(found), {hdrs.RETRY_AFTER: "10"})
    return web.json_response({"status": "ready"})


@routes.get("/metrics")
async def metrics(request: web.Request) -> web.Response:
    """Answer in Prometheus's text format, also while the database is away."""
    services = request.app[SERVICES]
    try:
        services.metrics.database(await services.work.numbers())
    except DatabaseError:
        services.metrics.database(None)
    return web.Response(body=services.metrics.text(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})


async def troubles(services: Services) -> list[str]:
    """Return what keeps the agent from its work, each in a sentence that names the part."""
    found = [f"the {loop} has not come round for {age:.0f} s" for loop, age in sorted(services.beats.stuck().items())]
    try:
        await services.database.check()
        numbers = await services.work.numbers()
    except DatabaseError as error:
        return [*found, str(error)]
    if numbers.oldest_look > _OLD_SECONDS and not services.ovation.away:
        found.append(f"an Activity has waited for {numbers.oldest_look:.0f} s to be looked at")
    if numbers.unwatched > _OLD_SECONDS:
        found.append(f"a run has waited for {numbers.unwatched:.0f} s to be looked after")
    return found
