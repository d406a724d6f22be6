"""Routes for annotations: properties, tags, notes and timeline events (ovation-api.md section 6)."""

from __future__ import annotations

import json
import uuid
from typing import Any

from aiohttp import web

from agent.sandbox.api_requests import ORGANIZATION, Route, organization_of, read_json
from agent.sandbox.documents import ANNOTATION_TYPES, annotation_document
from agent.sandbox.errors import ApiError, not_found
from agent.sandbox.model import Model, new_entities
from agent.sandbox.records import Entity
from agent.sandbox.tokens import Principal

# type -> the fields that an annotation must have, and those that it may have
FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "properties": (frozenset({"key", "value"}), frozenset()),
    "tags": (frozenset({"tag"}), frozenset()),
    "notes": (frozenset({"text", "timestamp"}), frozenset()),
    "timeline_events": (frozenset({"name", "notes", "start"}), frozenset({"end"})),
}


class AnnotationRoutes:
    """Annotations belong to whoever made them, and everybody who sees the entity sees them."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def routes(self) -> list[Route]:
        """Return the routes."""
        path = f"{ORGANIZATION}/entities/{{id}}/annotations/{{type:{'|'.join(ANNOTATION_TYPES)}}}"
        return [
            ("GET", path, self.list_type),
            ("POST", path, self.create),
            ("DELETE", f"{path}/{{annotation_id}}", self.delete),
        ]

    async def list_type(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with everybody's annotations of one type."""
        entity, type_ = self._entity(request, principal)
        rows = self.model.records.annotations(entity.id, (type_,))
        return web.json_response(
            {type_: [annotation_document(one, entity, user, kind, body) for one, user, kind, body in rows]}
        )

    async def create(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Annotate the entity; whoever may read it may do so."""
        entity, type_ = self._entity(request, principal)
        if principal.service:
            self.model.check_write(principal, entity)
        made = []
        with self.model.records.transaction():
            for body in new_entities(await read_json(request), type_):
                _check(type_, body)
                annotation_id = str(uuid.uuid4())
                self.model.records.write(
                    "INSERT INTO annotations (id, entity_id, user_id, type, body) VALUES (?, ?, ?, ?, ?)",
                    *(annotation_id, entity.id, principal.user_id, type_, json.dumps(body)),
                )
                document = annotation_document(annotation_id, entity, principal.user_id, type_, body)
                self.model.outbox.changed("created", document)
                made.append(document)
        return web.json_response({type_: made}, status=201)

    async def delete(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Delete an annotation of the caller's own."""
        entity, type_ = self._entity(request, principal)
        annotation_id = request.match_info["annotation_id"]
        rows = self.model.records.annotations(entity.id, (type_,))
        found = [(user, body) for one, user, _, body in rows if one == annotation_id]
        if not found:
            raise not_found()
        user_id, body = found[0]
        if user_id != principal.user_id:
            raise ApiError(401, "Not authorized")
        document = annotation_document(annotation_id, entity, user_id, type_, body)
        with self.model.records.transaction():
            self.model.records.write("DELETE FROM annotations WHERE id = ?", annotation_id)
            self.model.outbox.changed("deleted", document)
        return web.json_response({type_: [document]}, status=202)

    def _entity(self, request: web.Request, principal: Principal) -> tuple[Entity, str]:
        entity = self.model.find(principal, organization_of(request), request.match_info["id"])
        return entity, request.match_info["type"]


def _check(type_: str, body: dict[str, Any]) -> None:
    needed, allowed = FIELDS[type_]
    if not needed <= body.keys() <= needed | allowed:
        raise ApiError(400, f"One of the {type_} needs {', '.join(sorted(needed))} and nothing unknown")
    for name, value in body.items():
        if name != "value" and not isinstance(value, str):
            raise ApiError(400, f"{name} is not a string")
