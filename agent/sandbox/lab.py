"""Routes for the lab generation's webhook subscriptions (ovation-api.md section 7)."""

from __future__ import annotations

import json
import sqlite3
import uuid
from typing import Any

from aiohttp import web

from agent.sandbox.api_requests import Route, read_object
from agent.sandbox.errors import ApiError, not_found
from agent.sandbox.model import Model
from agent.sandbox.tokens import Principal

ENDPOINTS = "/api/v3/project_templates/{template_id}/webhook_endpoints"
STRINGS = ("target_url", "event", "username", "password")


class LabRoutes:
    """List, read, make, change and delete subscriptions; a password is never read back."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            ("GET", ENDPOINTS, self.list_all),
            ("POST", ENDPOINTS, self.create),
            ("GET", f"{ENDPOINTS}/{{id}}", self.get),
            ("PUT", f"{ENDPOINTS}/{{id}}", self.update),
            ("DELETE", f"{ENDPOINTS}/{{id}}", self.delete),
        ]

    async def list_all(self, request: web.Request, _principal: Principal) -> web.StreamResponse:
        """Answer with the template's subscriptions."""
        query = "SELECT * FROM webhooks WHERE template_id = ? ORDER BY rowid"
        rows = self.model.records.rows(query, request.match_info["template_id"])
        return web.json_response(
            {"webhook_endpoints": [_shown(row["id"], json.loads(row["document"])) for row in rows]}
        )

    async def create(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Make a subscription."""
        self.model.check_write(principal, None)
        document = _checked(await read_object(request), {})
        endpoint_id = str(uuid.uuid4())
        self.model.records.write(
            "INSERT INTO webhooks VALUES (?, 'lab', ?, ?)",
            *(endpoint_id, request.match_info["template_id"], json.dumps(document)),
        )
        return web.json_response({"webhook_endpoint": _shown(endpoint_id, document)}, status=201)

    async def get(self, request: web.Request, _principal: Principal) -> web.StreamResponse:
        """Answer with one subscription."""
        row = self._row(request)
        return web.json_response({"webhook_endpoint": _shown(row["id"], json.loads(row["document"]))})

    async def update(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Change what the body names."""
        self.model.check_write(principal, None)
        row = self._row(request)
        document = _checked(await read_object(request), json.loads(row["document"]))
        self.model.records.write("UPDATE webhooks SET document = ? WHERE id = ?", json.dumps(document), row["id"])
        return web.json_response({"webhook_endpoint": _shown(row["id"], document)})

    async def delete(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Delete a subscription."""
        self.model.check_write(principal, None)
        self.model.records.write("DELETE FROM webhooks WHERE id = ?", self._row(request)["id"])
        return web.Response(status=204)

    def _row(self, request: web.Request) -> sqlite3.Row:
        found = self.model.records.rows(
            "SELECT * FROM webhooks WHERE template_id = ? AND id = ?",
            *(request.match_info["template_id"], request.match_info["id"]),
        )
        if not found:
            raise not_found()
        return found[0]


def _checked(body: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    given = body.get("webhook_endpoint")
    if not isinstance(given, dict):
        raise ApiError(422, "webhook_endpoint is not an object")
    document = {
        **before,
        **{name: given[name] for name in (*STRINGS, "project_requisition_template_association_id") if name in given},
    }
    if "requestHeaders" in given:
        document["requestHeaders"] = given["requestHeaders"]
    if not isinstance(document.get("target_url"), str) or not isinstance(document.get("event"), str):
        raise ApiError(422, "target_url and event are needed")
    if not document["target_url"].startswith(("http://", "https://")):
        raise ApiError(422, "target_url is not a web address")
    headers = document.get("requestHeaders") or {}
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise ApiError(422, "requestHeaders is not an object of strings")
    if any(not isinstance(document.get(name), str | None) for name in STRINGS):
        raise ApiError(422, f"{', '.join(STRINGS)} are strings")
    return document


def _shown(endpoint_id: str, document: dict[str, Any]) -> dict[str, Any]:
    return {"id": endpoint_id, **{name: value for name, value in document.items() if name != "password"}}
