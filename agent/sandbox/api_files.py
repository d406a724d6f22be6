"""Routes for Files' heads, Revisions' uploads, and the addresses that Revisions' bytes are asked for at."""

from __future__ import annotations

from aiohttp import web

from agent.sandbox.api_requests import ORGANIZATION, Route, organization_of
from agent.sandbox.errors import ApiError
from agent.sandbox.faults import FAULT, FaultKind
from agent.sandbox.model import Model
from agent.sandbox.records import Entity
from agent.sandbox.tokens import Principal
from agent.sandbox.uploads import Uploads


class FileRoutes:
    """Everything about bytes but the bytes."""

    def __init__(self, model: Model, uploads: Uploads) -> None:
        self.model = model
        self.uploads = uploads

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            ("GET", f"{ORGANIZATION}/files/{{id}}/heads", self.heads),
            ("PUT", f"{ORGANIZATION}/revisions/{{id}}/upload-complete", self.upload_complete),
            ("PUT", f"{ORGANIZATION}/revisions/{{id}}/upload-failed", self.upload_failed),
            ("GET", "/api/v1/resources/{id}", self.resource),
            ("GET", f"{ORGANIZATION}/zip/{{plural}}/{{id}}", self.archive),
        ]

    async def heads(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with a File's newest Revisions."""
        file = self.model.find(principal, organization_of(request), request.match_info["id"], types=("File",))
        heads = self.uploads.heads(file)
        return web.json_response({"revisions": [self.model.document(one, principal) for one in heads]})

    async def upload_complete(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Finish an upload."""
        revision = self.uploads.complete(principal, self._revision(request, principal))
        return web.json_response({"revision": self.model.document(revision, principal)})

    async def upload_failed(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Give an upload up."""
        revision, file = self.uploads.fail(principal, self._revision(request, principal))
        answer = {"revision": self.model.document(revision, principal)}
        if file is not None:
            answer["file"] = self.model.document(file, principal)
        return web.json_response(answer)

    async def resource(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with a presigned URL; this is where a Revision's `url` leads."""
        found = self.model.records.entity(request.match_info["id"])
        organization = found.organization if found is not None else 0
        revision = self.model.find(principal, organization, request.match_info["id"], types=("Revision",))
        fault = request.get(FAULT)
        expired = fault is not None and fault.kind is FaultKind.EXPIRED_URL
        return web.json_response(self.uploads.download(revision, expired=expired))

    async def archive(self, _request: web.Request, _principal: Principal) -> web.StreamResponse:
        """Refuse: Ovation has another service for this, and nothing here needs it."""
        raise ApiError(501, "The sandbox makes no zip archives")

    def _revision(self, request: web.Request, principal: Principal) -> Entity:
        revision_id = request.match_info["id"]
        return self.model.find(principal, organization_of(request), revision_id, types=("Revision",))
