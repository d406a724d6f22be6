"""Routes for relations: what is at the other ends, the link documents, making and deleting them."""

from __future__ import annotations

from aiohttp import web

from agent.sandbox.api_requests import ORGANIZATION, Route, organization_of, read_json
from agent.sandbox.documents import RELATIONSHIPS, TYPES, relation_document
from agent.sandbox.errors import ApiError, not_found
from agent.sandbox.model import Model, new_entities
from agent.sandbox.records import Entity, Relation
from agent.sandbox.tokens import Principal


class LinkRoutes:
    """Links, from either end."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def routes(self) -> list[Route]:
        """Return the routes."""
        links = f"{ORGANIZATION}/{{plural:{'|'.join(TYPES)}}}/{{id}}/links/{{rel}}"
        return [
            ("GET", links, self.related),
            ("GET", f"{links}/relationships", self.list_links),
            ("POST", f"{links}/relationships", self.create),
            ("GET", f"{ORGANIZATION}/relationships/{{id}}", self.get),
            ("DELETE", f"{ORGANIZATION}/relationships/{{id}}", self.delete),
        ]

    async def related(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with the entities at the other ends."""
        entity, rel = self._source(request, principal)
        found = self.model.related(principal, entity, rel)
        return web.json_response({rel: [self.model.document(one, principal) for one in found]})

    async def list_links(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with the link documents."""
        entity, rel = self._source(request, principal)
        found = self.model.records.relations(entity.id, rel)
        return web.json_response({"links": [relation_document(link) for link in found]})

    async def create(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Link the entity to targets; a link that is there already is not made again."""
        entity, rel = self._source(request, principal)
        wanted = new_entities(await read_json(request), "links")
        links = []
        with self.model.records.transaction():
            for one in wanted:
                target_id, inverse_rel = one.get("target_id"), one.get("inverse_rel")
                if not isinstance(target_id, str) or not isinstance(inverse_rel, str | None):
                    raise ApiError(400, "A link needs a target_id, and its inverse_rel is a string")
                links.append(self.model.link(principal, entity, rel, target_id, inverse_rel))
        updated = self.model.records.entity(entity.id) or entity
        answer = {
            "links": [relation_document(link) for link in links],
            "updates": [self.model.document(updated, principal)],
        }
        return web.json_response(answer, status=201)

    async def get(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with one link document."""
        return web.json_response({"relationship": relation_document(self._relation(request, principal))})

    async def delete(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Delete one link document."""
        relation = self._relation(request, principal)
        self.model.unlink(principal, relation)
        return web.json_response({"relationships": [relation_document(relation)]}, status=202)

    def _source(self, request: web.Request, principal: Principal) -> tuple[Entity, str]:
        type_ = TYPES[request.match_info["plural"]]
        entity = self.model.find(principal, organization_of(request), request.match_info["id"], types=(type_,))
        rel = request.match_info["rel"]
        if rel not in RELATIONSHIPS[type_]:
            raise not_found()
        return entity, rel

    def _relation(self, request: web.Request, principal: Principal) -> Relation:
        relation = self.model.records.relation(organization_of(request), request.match_info["id"])
        source = self.model.records.entity(relation.source_id) if relation is not None else None
        if relation is None or source is None or not self.model.may_read(principal, source):
            raise not_found()
        return relation
