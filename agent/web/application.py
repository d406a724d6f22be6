"""The aiohttp application."""

from __future__ import annotations

from aiohttp import web

from agent.web import health, hpc_run, jobs, webhooks
from agent.web.state import MAX_BODY_BYTES, SERVICES, Services, errors


def application(services: Services) -> web.Application:
    """Put the handlers together."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[errors])
    app[SERVICES] = services
    for module in (webhooks, hpc_run, jobs, health):
        app.add_routes(module.routes)
    return app
