"""Routes for entities: read, list, make, change, trash and restore; breadcrumbs and provenance."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from agent.sandbox.api_requests import ORGANIZATION, Route, flag, organization_of, read_json, read_object
from agent.sandbox.documents import ANNOTATION_TYPES, TYPES, annotation_document, relation_document
from agent.sandbox.errors import ApiError, not_found
from agent.sandbox.model import Model, checked_attributes, new_entities
from agent.sandbox.records import Entity, Relation
from agent.sandbox.tokens import Principal
from agent.sandbox.uploads import Uploads

TOP_LEVEL = frozenset({"Project", "Activity", "Source"})
UPSTREAM = {"Activity": "inputs"}
DOWNSTREAM = {"Activity": "outputs"}


class EntityRoutes:
    """What all types have in common."""

    def __init__(self, model: Model, uploads: Uploads) -> None:
        self.model = model
        self.uploads = uploads

    def routes(self) -> list[Route]:
        """Return the routes."""
        one = f"{ORGANIZATION}/{{plural:{'|'.join(TYPES)}}}"
        return [
            ("GET", f"{ORGANIZATION}/entities/{{id}}", self.get_entity),
            ("PUT", f"{ORGANIZATION}/entities/{{id}}", self.update),
            ("DELETE", f"{ORGANIZATION}/entities/{{id}}", self.trash),
            ("PUT", f"{ORGANIZATION}/entities/{{id}}/restore", self.restore),
            ("GET", f"{ORGANIZATION}/breadcrumbs", self.breadcrumbs),
            ("GET", f"{ORGANIZATION}/prov/{{id}}", self.provenance),
            ("GET", one, self.list_type),
            ("POST", one, self.create),
            ("GET", f"{one}/{{id}}", self.get_typed),
            ("PUT", f"{one}/{{id}}", self.update),
            ("DELETE", f"{one}/{{id}}", self.trash),
            ("POST", f"{one}/{{id}}", self.create_under),
        ]

    async def get_entity(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with the entity, and its annotations when they are asked for."""
        entity = self._find(request, principal, trash=flag(request, "trash"))
        answer: dict[str, Any] = {"entity": self.model.document(entity, principal)}
        if request.query.get("includes") == "annotations":
            answer["includes"] = self._annotations(entity)
        return web.json_response(answer)

    async def get_typed(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with the entity under its type's word."""
        entity = self._find(request, principal)
        return web.json_response({entity.type.lower(): self.model.document(entity, principal)})

    async def list_type(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with all entities of a type."""
        plural = request.match_info["plural"]
        found = self.model.list_type(principal, organization_of(request), TYPES[plural])
        return web.json_response({plural: [self.model.document(one, principal) for one in found]})

    async def create(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Make top-level entities, with the links that their documents ask for."""
        plural = request.match_info["plural"]
        type_ = TYPES[plural]
        if type_ not in TOP_LEVEL:
            raise ApiError(405, f"A {type_} is made under its parent")
        self.model.check_write(principal, None)
        organization = organization_of(request)
        if not self.model.records.rows("SELECT 1 FROM organizations WHERE id = ?", organization):
            raise not_found()
        made: list[Entity] = []
        links: list[Relation] = []
        wanted = new_entities(await read_json(request), plural)
        with self.model.records.transaction():
            for new in wanted:
                if new.get("type") != type_:
                    raise ApiError(400, f'Entities must be of "type" {type_}')
                entity = self.model.add(principal, organization, type_, checked_attributes(new), [])
                links += self.model.embedded_links(principal, entity, new)
                made.append(entity)
        if not links:
            # Ovation names links and updates only when there are any
            return web.json_response({plural: [self.model.document(one, principal) for one in made]}, status=201)
        return self._created(plural, [one.id for one in made], links, principal, made)

    async def create_under(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Make Folders, Files and Activities under a Project or Folder, and Revisions of a File."""
        parent = self._find(request, principal)
        self.model.check_write(principal, parent)
        wanted = new_entities(await read_json(request), "entities")
        if parent.type in {"File", "Revision"}:
            return self._create_revisions(parent, wanted, principal)
        made: list[Entity] = []
        links: list[Relation] = []
        with self.model.records.transaction():
            for new in wanted:
                entity, own_links = self.model.add_child(principal, parent, new)
                made.append(entity)
                links += own_links
        return self._created("entities", [one.id for one in made], links, principal, [parent])

    async def update(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Replace an entity's attributes."""
        entity = self._find(request, principal)
        body = await read_object(request)
        word = entity.type.lower() if "plural" in request.match_info else "entity"
        given = body.get(word)
        if not isinstance(given, dict) or not isinstance(given.get("attributes"), dict):
            raise ApiError(400, f"{word}.attributes is not an object")
        updated = self.model.update(principal, entity, given["attributes"])
        return web.json_response({word: self.model.document(updated, principal)})

    async def trash(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Put an entity in the trash."""
        trashed = self.model.trash(principal, self._find(request, principal))
        return web.json_response({"entity": self.model.document(trashed, principal)}, status=202)

    async def restore(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Take an entity out of the trash."""
        restored = self.model.trash(principal, self._find(request, principal, trash=True), restore=True)
        return web.json_response({"entity": self.model.document(restored, principal)})

    async def breadcrumbs(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with every path from the entity up to a Project."""
        entity_id = request.query.get("id", "")
        entity = self.model.find(principal, organization_of(request), entity_id)
        return web.json_response({"breadcrumbs": self._paths(principal, entity, frozenset())})

    async def provenance(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """Answer with what the entity came from and what came of it, each described once."""
        entity = self._find(request, principal)
        found: dict[str, dict[str, Any]] = {}
        for direction, other in ((UPSTREAM, "origins"), (DOWNSTREAM, "activities")):
            seen: set[str] = set()
            ahead = [entity]
            while ahead:
                one = ahead.pop()
                if one.id in seen:
                    continue
                seen.add(one.id)
                found[one.id] = self._summary(principal, one)
                ahead += self.model.related(principal, one, direction.get(one.type, other))
        return web.json_response({"provenance": list(found.values())})

    def _find(self, request: web.Request, principal: Principal, *, trash: bool = False) -> Entity:
        types = (TYPES[request.match_info["plural"]],) if "plural" in request.match_info else ()
        organization = organization_of(request)
        return self.model.find(principal, organization, request.match_info["id"], types=types, trash=trash)

    def _created(
        self, word: str, ids: list[str], links: list[Relation], principal: Principal, updates: list[Entity]
    ) -> web.Response:
        # read again: links have given the new entities their Projects
        made = [entity for one in ids if (entity := self.model.records.entity(one)) is not None]
        answer = {
            word: [self.model.document(one, principal) for one in made],
            "links": [relation_document(link) for link in links],
            "updates": [self.model.document(one, principal) for one in updates],
        }
        headers = {"Location": answer[word][0]["links"]["self"]} if made else {}
        return web.json_response(answer, status=201, headers=headers)

    def _create_revisions(
        self, parent: Entity, wanted: list[dict[str, Any]], principal: Principal
    ) -> web.StreamResponse:
        with self.model.records.transaction():
            made = [self.uploads.create(principal, parent, new) for new in wanted]
        file = self.model.records.entity(made[0][0].attributes["file_id"]) if made else None
        revisions = [self.model.document(revision, principal) for revision, _, _ in made]
        answer = {
            "entities": revisions,
            "links": [relation_document(link) for _, link, _ in made],
            "updates": [*revisions, *([self.model.document(file, principal)] if file else [])],
            "aws": [{"id": revision.id, "aws": granted} for revision, _, granted in made],
        }
        return web.json_response(answer, status=201)

    def _annotations(self, entity: Entity) -> list[dict[str, Any]]:
        rows = self.model.records.annotations(entity.id, ANNOTATION_TYPES)
        return [annotation_document(one, entity, user, type_, body) for one, user, type_, body in rows]

    def _paths(self, principal: Principal, entity: Entity, below: frozenset[str]) -> list[list[dict[str, str]]]:
        crumb = {"type": entity.type, "id": entity.id, "name": entity.attributes["name"]}
        parents = self.model.related(principal, entity, "parents") if entity.id not in below else []
        if not parents:
            return [[crumb]]
        below |= {entity.id}
        return [[crumb, *path] for parent in parents for path in self._paths(principal, parent, below)]

    def _summary(self, principal: Principal, entity: Entity) -> dict[str, Any]:
        rels = ("inputs", "outputs", "actions") if entity.type == "Activity" else ("origins", "activities")
        links = {rel: [_brief(other) for other in self.model.related(principal, entity, rel)] for rel in rels}
        return {**_brief(entity), **links}


def _brief(entity: Entity) -> dict[str, str]:
    return {"_id": entity.id, "type": entity.type, "name": entity.attributes.get("name", "")}
