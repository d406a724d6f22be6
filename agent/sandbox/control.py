"""The sandbox's own routes under `/_sandbox`, for tests in other processes; they need the control token."""

from __future__ import annotations

import hmac

from aiohttp import web
from aiohttp.typedefs import Handler

from agent.sandbox.admin import REMOTE, Admin
from agent.sandbox.api_requests import read_object
from agent.sandbox.errors import ApiError, not_found
from agent.sandbox.faults import FaultBook


class ControlRoutes:
    """Faults and the admin's helpers over HTTP."""

    def __init__(self, faults: FaultBook, admin: Admin, token: str) -> None:
        self.faults = faults
        self.admin = admin
        self._token = token

    def add_to(self, application: web.Application) -> None:
        """Add the routes."""
        router = application.router
        router.add_get("/_sandbox/faults", self._guarded(self.list_faults))
        router.add_post("/_sandbox/faults", self._guarded(self.add_fault))
        router.add_delete("/_sandbox/faults", self._guarded(self.remove_faults))
        router.add_delete("/_sandbox/faults/{id}", self._guarded(self.remove_faults))
        router.add_post("/_sandbox/admin/{name}", self._guarded(self.call))

    async def list_faults(self, _request: web.Request) -> web.StreamResponse:
        """Answer with the programmed faults and how often each has hit."""
        return web.json_response({"faults": [fault.document() for fault in self.faults.faults]})

    async def add_fault(self, request: web.Request) -> web.StreamResponse:
        """Program a fault; the body's fields are those of `faults.Fault`."""
        try:
            fault = self.faults.add_document(await read_object(request))
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return web.json_response({"fault": fault.document()}, status=201)

    async def remove_faults(self, request: web.Request) -> web.StreamResponse:
        """Forget one fault, or all."""
        self.faults.remove(request.match_info.get("id"))
        return web.Response(status=204)

    async def call(self, request: web.Request) -> web.StreamResponse:
        """Call one of the admin's helpers with the body's fields as arguments."""
        name = request.match_info["name"]
        if name not in REMOTE:
            raise not_found()
        try:
            result = getattr(self.admin, name)(**await read_object(request))
        except TypeError as error:
            raise ApiError(400, str(error)) from error
        return web.json_response({"result": result})

    def _guarded(self, handler: Handler) -> Handler:
        async def check(request: web.Request) -> web.StreamResponse:
            given = request.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
                raise ApiError(401, "The control token is missing or wrong")
            return await handler(request)

        return check
