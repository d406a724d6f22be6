"""The aiohttp application."""

from __future__ import annotations

from aiohttp import web

from agent.web import health, hpc_run, jobs, oncall, openapi, pages, provenance, webhooks
from agent.web.state import MAX_BODY_BYTES, SERVICES, Services, errors


def application(services: Services) -> web.Application:
    """Put the handlers together."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[errors])
    app[SERVICES] = services
    app[pages.PAGE] = pages.Page()
    for module in (webhooks, hpc_run, jobs, oncall, provenance, health, openapi, pages):
        app.add_routes(module.routes)
    return app


def runner(services: Services) -> web.AppRunner:
    """Return what serves the application.

    Compressed bodies stay as they come, and are refused: no sender of webhooks compresses, and a small body could
    become a large one. After an early answer the rest of a body is thrown away for a moment, or the sender would see a
    broken connection instead.
    """
    return web.AppRunner(
        application(services), access_log=None, shutdown_timeout=2, auto_decompress=False, lingering_time=2
    )
