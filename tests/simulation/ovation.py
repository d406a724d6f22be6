"""The simulated Ovation: the truth, and the part of its API that agents call.

How documents look is taken from the sandbox, which the released client judges.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from agent.sandbox.documents import (
    RELATIONSHIPS,
    TYPES,
    annotation_document,
    entity_document,
    relation_document,
)
from agent.sandbox.model import CHILDREN
from agent.sandbox.records import Entity, Relation
from tests.simulation.session import Reply, Request
from tests.simulation.store import Store
from tests.simulation.world import World

API = "https://api.ovation.test"
OWNER = "agent"


class _NotFoundError(Exception):
    """There is no such thing."""


class SimulatedOvation:
    """Entities and links in memory."""

    def __init__(self, world: World, store: Store) -> None:
        self._world = world
        self._store = store
        self.entities: dict[str, Entity] = {}
        self.relations: dict[str, Relation] = {}
        self.annotations: dict[str, tuple[Entity, str, dict[str, Any]]] = {}
        self.on_link: Callable[[Relation], None] = lambda _: None
        self.links_change_time = True
        self._annotated = 0
        self._routes = self._routing()

    # What people and tests do.

    def add(self, kind: str, name: str, roots: list[str], **attributes: Any) -> Entity:
        """Make an entity."""
        entity_id = f"{kind.lower()}-{sum(each.type == kind for each in self.entities.values()) + 1}"
        now = self._now()
        attributes = {"name": name, **attributes, "created-at": now, "updated-at": now}
        entity = Entity(entity_id, 0, kind, OWNER, attributes, roots or [entity_id])
        self.entities[entity_id] = entity
        return entity

    def link(self, source: Entity, rel: str, target: Entity) -> None:
        """Link two entities, once."""
        inverse = RELATIONSHIPS[source.type][rel][0]
        relation = Relation(0, source.id, rel, target.id, inverse, OWNER)
        if relation.id in self.relations:
            return
        self.relations[relation.id] = relation
        if self.links_change_time:
            source.attributes["updated-at"] = self._now()
        self.on_link(relation)

    def unlink(self, source: Entity, rel: str, target: Entity) -> None:
        """Take a link away."""
        relation = self.relations.pop(Relation(0, source.id, rel, target.id, None, OWNER).id, None)
        if relation is not None:
            self.on_link(relation)

    def revision(self, file: Entity, name: str, content: bytes | None) -> Entity:
        """Make a Revision of a File; without content its upload is still going on."""
        revision = self.add("Revision", name, file.roots, file_id=file.id, content_type="application/octet-stream")
        self._set_status(revision, "in-progress")
        revision.object_key = f"{file.id}/{revision.id}"
        self.link(file, "revisions", revision)
        if content is not None:
            self._store.objects[revision.object_key] = content
            self._complete(revision)
        return revision

    def upload(self, revision: Entity, content: bytes) -> None:
        """End an upload that was going on."""
        self._store.objects[str(revision.object_key)] = content
        self._complete(revision)

    def related(self, entity: Entity, rel: str) -> list[Entity]:
        """Return what stands at the other ends of an entity's links, oldest link first."""
        ends = [each.target_id for each in self.relations.values() if (each.source_id, each.rel) == (entity.id, rel)]
        ends += [
            each.source_id for each in self.relations.values() if (each.target_id, each.inverse_rel) == (entity.id, rel)
        ]
        return [self.entities[each] for each in dict.fromkeys(ends)]

    def content(self, revision: Entity) -> bytes | None:
        """Return a Revision's bytes."""
        return self._store.objects.get(str(revision.object_key))

    def document(self, entity: Entity) -> dict[str, Any]:
        """Return an entity as its API shows it."""
        return entity_document(entity, API, writable=True)

    # The API.

    def serve(self, request: Request) -> Reply:
        """Answer a request."""
        try:
            return self._serve(request)
        except (_NotFoundError, KeyError):
            return Reply(404, b"{}")

    def _serve(self, request: Request) -> Reply:
        for method, path, answer in self._routes:
            if method == request.method and (match := path.fullmatch(request.url.path.rstrip("/"))):
                return answer(request.json, **match.groupdict())
        if request.url.path != "/":
            self._world.problem(f"the simulated Ovation does not know {request.method} {request.url.path}")
        return Reply(404, b"{}")

    def _routing(self) -> list[tuple[str, re.Pattern[str], Callable[..., Reply]]]:
        plural = f"/(?P<plural>{'|'.join(TYPES)})"
        one = f"{plural}/(?P<entity_id>[^/]+)"
        revision = "/revisions/(?P<entity_id>[^/]+)"
        annotations = r"/entities/(?P<entity_id>[^/]+)/annotations/(?P<kind>\w+)"
        routes: list[tuple[str, str, Callable[..., Reply]]] = [
            ("GET", "/entities/(?P<entity_id>[^/]+)", self._get),
            ("GET", plural, self._list),
            ("GET", one, self._get_typed),
            ("POST", one, self._create),
            ("GET", rf"{one}/links/(?P<rel>\w+)", self._related),
            ("POST", rf"{one}/links/(?P<rel>\w+)/relationships", self._create_links),
            ("PUT", f"{revision}/upload-complete", self._upload_complete),
            ("PUT", f"{revision}/upload-failed", self._upload_failed),
            ("GET", annotations, self._list_annotations),
            ("POST", annotations, self._annotate),
            ("DELETE", f"{annotations}/(?P<annotation_id>[^/]+)", self._remove_annotation),
        ]
        found = [(method, re.compile(f"/api/v1/o/0{path}"), answer) for method, path, answer in routes]
        return [*found, ("GET", re.compile("/api/v1/resources/(?P<entity_id>[^/]+)"), self._resource)]

    def _resource(self, _: Any, entity_id: str) -> Reply:
        return Reply.of({"url": self._store.presigned(str(self._entity(entity_id, "revisions").object_key))})

    def _get(self, _: Any, entity_id: str) -> Reply:
        return Reply.of({"entity": self.document(self._entity(entity_id))})

    def _get_typed(self, _: Any, plural: str, entity_id: str) -> Reply:
        return Reply.of({TYPES[plural].lower(): self.document(self._entity(entity_id, plural))})

    def _list(self, _: Any, plural: str) -> Reply:
        found = [each for each in self.entities.values() if each.type == TYPES[plural]]
        return Reply.of({plural: [self.document(each) for each in found]})

    def _related(self, _: Any, plural: str, entity_id: str, rel: str) -> Reply:
        found = self.related(self._entity(entity_id, plural), rel)
        return Reply.of({rel: [self.document(each) for each in found]})

    def _entity(self, entity_id: str, plural: str | None = None) -> Entity:
        entity = self.entities.get(entity_id)
        if entity is None or (plural is not None and entity.type != TYPES[plural]):
            raise _NotFoundError
        return entity

    def _create(self, body: Any, plural: str, entity_id: str) -> Reply:
        parent, new = self._entity(entity_id, plural), body["entities"][0]
        kind, attributes = new["type"], dict(new["attributes"])
        if (parent.type, kind) == ("File", "Revision"):
            revision = self.revision(parent, attributes["name"], None)
            self._world.note("ovation", f"{revision.id} of {parent.id} ({attributes['name']})")
            aws = {"id": revision.id, "aws": self._store.grant(str(revision.object_key))}
            return Reply.of({"entities": [self.document(revision)], "aws": [aws]}, 201)
        if kind not in CHILDREN.get(parent.type, {}):
            return Reply(400, b"{}")
        entity = self.add(kind, attributes.pop("name"), parent.roots, **attributes)
        self._world.note("ovation", f"{entity.id} in {parent.id} ({entity.attributes['name']})")
        self.link(parent, CHILDREN[parent.type][kind], entity)
        return Reply.of({"entities": [self.document(entity)]}, 201)

    def _create_links(self, wanted: Any, plural: str, entity_id: str, rel: str) -> Reply:
        source = self._entity(entity_id, plural)
        for each in wanted:
            target = self._entity(each["target_id"])
            self._world.note("ovation", f"{source.id} {rel} {target.id}")
            self.link(source, rel, target)
        links = [relation_document(each) for each in self.relations.values() if each.source_id == source.id]
        return Reply.of({"links": links}, 201)

    def _upload_complete(self, _: Any, entity_id: str) -> Reply:
        revision = self._entity(entity_id, "revisions")
        if self.content(revision) is None:
            return Reply(422, b"{}")
        self._complete(revision)
        self._world.note("ovation", f"{revision.id} complete")
        return Reply.of({"revision": self.document(revision)})

    def _upload_failed(self, _: Any, entity_id: str) -> Reply:
        revision = self._entity(entity_id, "revisions")
        self._set_status(revision, "error")
        self._world.note("ovation", f"{revision.id} failed")
        return Reply.of({"revision": self.document(revision)})

    def _complete(self, revision: Entity) -> None:
        revision.attributes["content_length"] = len(self.content(revision) or b"")
        self._set_status(revision, "complete")

    def _set_status(self, revision: Entity, status: str) -> None:
        revision.attributes["upload-status"] = status
        file = self.entities[revision.attributes["file_id"]]
        started = file.revisions.get(revision.id, {}).get("started-at", revision.attributes["created-at"])
        file.revisions[revision.id] = {"status": status, "started-at": started}

    def _list_annotations(self, _: Any, entity_id: str, kind: str) -> Reply:
        found = [
            annotation_document(annotation_id, entity, OWNER, kind, body)
            for annotation_id, (entity, its_kind, body) in self.annotations.items()
            if entity.id == entity_id and its_kind == kind
        ]
        return Reply.of({kind: found})

    def _annotate(self, body: Any, entity_id: str, kind: str) -> Reply:
        entity = self._entity(entity_id)
        for each in body[kind]:
            self._annotated += 1
            self.annotations[f"annotation-{self._annotated}"] = (entity, kind, each)
        return self._list_annotations(None, entity_id, kind)

    def _remove_annotation(self, _: Any, entity_id: str, kind: str, annotation_id: str) -> Reply:
        del entity_id, kind
        self.annotations.pop(annotation_id, None)
        return Reply(202, b"{}")

    def _now(self) -> str:
        moment = datetime.fromtimestamp(self._world.wall, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
