"""Ovation's web API: who calls, which answer an error gets, and the routes."""

from __future__ import annotations

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from agent.sandbox.api_annotations import AnnotationRoutes
from agent.sandbox.api_entities import EntityRoutes
from agent.sandbox.api_files import FileRoutes
from agent.sandbox.api_links import LinkRoutes
from agent.sandbox.api_requests import RouteHandler, read_json
from agent.sandbox.errors import ApiError, not_found
from agent.sandbox.faults import FaultBook, fault_middleware
from agent.sandbox.lab import LabRoutes
from agent.sandbox.tokens import SERVICE_SCOPES, Tokens

log = structlog.get_logger(__name__)

MAXIMUM_BODY_BYTES = 4 * 1024 * 1024

Routes = EntityRoutes | FileRoutes | LinkRoutes | AnnotationRoutes | LabRoutes


def make_application(tokens: Tokens, token_seconds: float, faults: FaultBook, *parts: Routes) -> web.Application:
    """Return the API as an aiohttp application; the parts bring their routes."""
    application = web.Application(
        middlewares=[_answers, fault_middleware(faults, "api", lambda _request: None)],
        client_max_size=MAXIMUM_BODY_BYTES,
    )

    def authenticated(handler: RouteHandler) -> Handler:
        async def call(request: web.Request) -> web.StreamResponse:
            principal = tokens.read(_bearer(request))
            if principal is None:
                raise ApiError(401, "Missing or invalid token")
            return await handler(request, principal)

        return call

    application.router.add_get("/healthz", _health)
    application.router.add_post("/oauth/token", _oauth_token(tokens, token_seconds))
    for part in parts:
        for method, path, handler in part.routes():
            served = authenticated(handler)
            # Ovation's router takes a path with and without a slash at its end
            for variant in (path, path + "/"):
                application.router.add_route(method, variant, served)
    return application


async def _health(_request: web.Request) -> web.StreamResponse:
    return web.json_response({"status": "alive"})


def _oauth_token(tokens: Tokens, token_seconds: float) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        if not isinstance(body, dict) or body.get("grant_type") != "client_credentials":
            return web.json_response({"error": "unsupported_grant_type"}, status=400)
        if not tokens.is_client(body.get("client_id"), body.get("client_secret")):
            return web.json_response({"error": "access_denied", "error_description": "Unauthorized"}, status=401)
        granted = {"access_token": tokens.for_service(token_seconds), "token_type": "Bearer"}
        return web.json_response({**granted, "expires_in": int(token_seconds), "scope": SERVICE_SCOPES})

    return answer


def _bearer(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme == "Bearer" else request.query.get("token", "")


@web.middleware
async def _answers(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return _error(request, error)
    except web.HTTPNotFound:
        return _error(request, not_found())
    except web.HTTPRequestEntityTooLarge:
        return _error(request, ApiError(413, "The body is too large"))
    except web.HTTPMethodNotAllowed as error:
        allowed = {"Allow": ", ".join(sorted(error.allowed_methods))}
        return web.json_response({"errors": {"detail": "Method not allowed"}}, status=error.status, headers=allowed)


def _error(request: web.Request, error: ApiError) -> web.Response:
    log.info("api_refused", method=request.method, path=request.path, status=error.status, detail=error.detail)
    headers = {"WWW-Authenticate": 'Bearer realm="ovation"'} if error.status == web.HTTPUnauthorized.status_code else {}
    return web.json_response({"errors": {"detail": error.detail}}, status=error.status, headers=headers)
