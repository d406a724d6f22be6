"""Reading requests to the API."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from agent.sandbox.errors import ApiError
from agent.sandbox.tokens import Principal

ORGANIZATION = r"/api/v1/o/{organization:-?\d+}"

RouteHandler = Callable[[web.Request, Principal], Awaitable[web.StreamResponse]]
Route = tuple[str, str, RouteHandler]


async def read_json(request: web.Request) -> Any:
    """Return the request's JSON; 400 when it is none."""
    try:
        return json.loads(await request.read())
    except ValueError as error:
        raise ApiError(400, "The body is not JSON") from error


async def read_object(request: web.Request) -> dict[str, Any]:
    """Return the request's JSON object; 400 when it is none."""
    body = await read_json(request)
    if not isinstance(body, dict):
        raise ApiError(400, "The body is not a JSON object")
    return body


def organization_of(request: web.Request) -> int:
    """Return the organization that the path names."""
    return int(request.match_info["organization"])


def flag(request: web.Request, name: str) -> bool:
    """Say whether a query parameter is `true`."""
    return request.query.get(name, "false").lower() == "true"
