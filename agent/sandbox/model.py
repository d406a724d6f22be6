"""What Ovation does with its documents: who may read them, how they are made, linked, changed and trashed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from agent.sandbox.documents import RELATIONSHIPS, entity_document, relation_document
from agent.sandbox.errors import ApiError, not_found
from agent.sandbox.records import Entity, Records, Relation
from agent.sandbox.settings import Clock
from agent.sandbox.tokens import Principal

# parent type -> child type -> rel
CHILDREN = {
    "Project": {"Folder": "folders", "File": "files", "Activity": "activities"},
    "Folder": {"Folder": "folders", "File": "files"},
}


class Outbox(Protocol):
    """Takes note, within the transaction, of a change that webhooks may be interested in."""

    def changed(self, action: str, document: dict[str, Any]) -> None:
        """`action` is `created`, `updated` or `deleted`."""


class Model:
    """The research database. Every method that writes does so in one transaction."""

    def __init__(self, records: Records, outbox: Outbox, clock: Clock) -> None:
        self.records = records
        self.outbox = outbox
        self.clock = clock
        self.services_url = ""

    def now(self) -> str:
        """Return the time as Ovation writes it."""
        moment = datetime.fromtimestamp(self.clock(), UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def document(self, entity: Entity, principal: Principal | None = None) -> dict[str, Any]:
        """Return the entity as this caller sees it."""
        writable = principal is None or self.may_write(principal, entity)
        return entity_document(entity, self.services_url, writable=writable)

    def may_read(self, principal: Principal, entity: Entity) -> bool:
        """Say whether the caller sees the entity at all."""
        if principal.service:
            return "read:global" in principal.scopes
        if entity.type == "User" or principal.user_id in {entity.owner, entity.id}:
            return True
        return self.records.role(entity.roots, principal.user_id) is not None

    def may_write(self, principal: Principal, entity: Entity) -> bool:
        """Say whether the caller may change the entity."""
        if principal.service:
            return "write:global" in principal.scopes
        if principal.user_id == entity.owner:
            return True
        return self.records.role(entity.roots, principal.user_id) == "member"

    def check_write(self, principal: Principal, entity: Entity | None) -> None:
        """Raise 401 unless the caller may change the entity, or make top-level ones when None."""
        allowed = (
            not principal.service or "write:global" in principal.scopes
            if entity is None
            else self.may_write(principal, entity)
        )
        if not allowed:
            raise ApiError(401, "Not authorized")

    def find(
        self,
        principal: Principal,
        organization: int,
        entity_id: str,
        *,
        types: Sequence[str] = (),
        trash: bool = False,
    ) -> Entity:
        """Return the entity; 404 when it is absent, trashed, of another type, or not for this caller."""
        entity = self.records.entity(entity_id)
        if (
            entity is None
            or (entity.organization != organization and entity.type != "User")
            or (types and entity.type not in types)
            or (entity.trash_info is not None and not trash)
            or not self.may_read(principal, entity)
        ):
            raise not_found()
        return entity

    def list_type(self, principal: Principal, organization: int, type_: str) -> list[Entity]:
        """Return what the caller sees of one type."""
        found = self.records.entities_of_type(organization, type_)
        return [entity for entity in found if entity.trash_info is None and self.may_read(principal, entity)]

    def related(self, principal: Principal, entity: Entity, rel: str) -> list[Entity]:
        """Return what the caller sees at the other ends of the entity's links."""
        found = self.records.related(entity.id, rel)
        return [other for other in found if other.trash_info is None and self.may_read(principal, other)]

    def add(
        self, principal: Principal, organization: int, type_: str, attributes: dict[str, Any], roots: list[str]
    ) -> Entity:
        """Write a new entity."""
        entity_id = str(uuid.uuid4())
        now = self.now()
        attributes = {**attributes, "created-at": now, "updated-at": now}
        own_roots = [entity_id] if type_ == "Project" else list(roots)
        entity = Entity(entity_id, organization, type_, principal.user_id, attributes, own_roots)
        with self.records.transaction():
            self.records.save(entity)
            if type_ == "Project":
                self.set_member(entity_id, principal.user_id, "member")
            self.outbox.changed("created", self.document(entity))
        return entity

    def set_member(self, project_id: str, user_id: str, role: str) -> None:
        """Give a user access to a Project: role `member` reads and writes, `reader` only reads."""
        self.records.write(
            "INSERT INTO members VALUES (?, ?, ?) ON CONFLICT (project_id, user_id) DO UPDATE SET role = excluded.role",
            *(project_id, user_id, role),
        )

    def add_child(self, principal: Principal, parent: Entity, new: dict[str, Any]) -> tuple[Entity, list[Relation]]:
        """Write a new entity under a Project or Folder, with its link."""
        type_ = str(new.get("type"))
        rel = CHILDREN.get(parent.type, {}).get(type_)
        if rel is None:
            raise ApiError(400, f"A {parent.type} does not contain a {type_}")
        entity = self.add(principal, parent.organization, type_, checked_attributes(new), parent.roots)
        links = [self.link(principal, parent, rel, entity.id, "parents")]
        return entity, [*links, *self.embedded_links(principal, entity, new)]

    def embedded_links(self, principal: Principal, entity: Entity, new: dict[str, Any]) -> list[Relation]:
        """Make the links that the document of a new entity asks for."""
        links: list[Relation] = []
        for rel, wanted in (new.get("relationships") or {}).items():
            if not isinstance(wanted, dict) or not isinstance(wanted.get("related"), list):
                raise ApiError(400, f"relationships.{rel}.related is not a list")
            for other_id in wanted["related"]:
                inverse = wanted.get("inverse_rel")
                if str(wanted.get("create_as_inverse", "false")).lower() == "true":
                    other = self.find(principal, entity.organization, str(other_id))
                    links.append(self.link(principal, other, str(inverse), entity.id, rel))
                else:
                    links.append(self.link(principal, entity, rel, str(other_id), inverse))
        return links

    def link(self, principal: Principal, source: Entity, rel: str, target_id: str, inverse_rel: str | None) -> Relation:
        """Write a link, once, and let the target inherit the source's Projects where Ovation does so."""
        self.check_write(principal, source)
        if rel not in RELATIONSHIPS[source.type]:
            raise ApiError(400, f"A {source.type} has no rel {rel}")
        target = self.records.entity(target_id)
        if target is None or target.trash_info is not None or not self.may_read(principal, target):
            raise ApiError(400, f"Target {target_id} not found")
        if target.type not in RELATIONSHIPS[source.type][rel][1]:
            raise ApiError(400, f"A {target.type} cannot be one of the {rel} of a {source.type}")
        relation = Relation(source.organization, source.id, rel, target.id, inverse_rel, principal.user_id)
        with self.records.transaction():
            if self.records.add_relation(relation):
                for changed in self._share_roots(source, target):
                    self.records.save(changed)
                self.outbox.changed("created", relation_document(relation))
        return relation

    def unlink(self, principal: Principal, relation: Relation) -> None:
        """Delete a link document."""
        source = self.records.entity(relation.source_id)
        if source is None or not self.may_read(principal, source):
            raise not_found()
        self.check_write(principal, source)
        with self.records.transaction():
            self.records.write(
                "DELETE FROM relations WHERE organization = ? AND id = ?", relation.organization, relation.id
            )
            self.outbox.changed("deleted", relation_document(relation))

    def update(self, principal: Principal, entity: Entity, attributes: dict[str, Any]) -> Entity:
        """Replace the entity's attributes, but for those that Ovation itself keeps."""
        if entity.type == "User":
            raise ApiError(401, "Not authorized to update a User")
        self.check_write(principal, entity)
        entity.attributes = {**attributes, "created-at": entity.attributes["created-at"]}
        self.save_change(entity)
        return entity

    def trash(self, principal: Principal, entity: Entity, *, restore: bool = False) -> Entity:
        """Put the entity in the trash, or take it out; its links stay."""
        if entity.type == "User":
            raise ApiError(401, "Not authorized to trash a User")
        self.check_write(principal, entity)
        info = {"trashing_user": principal.user_id, "trashing_date": self.now(), "trash_root": entity.id}
        entity.trash_info = None if restore else info
        self.save_change(entity)
        return entity

    def save_change(self, *entities: Entity) -> None:
        """Write entities as they now are and tell of the change."""
        with self.records.transaction():
            for entity in entities:
                entity.attributes["updated-at"] = self.now()
                self.records.save(entity)
                self.outbox.changed("updated", self.document(entity))

    def _share_roots(self, source: Entity, target: Entity) -> list[Entity]:
        containers = {"Project", "Folder"}
        if source.type in containers or target.type == "Source":
            heir, giver = target, source
        elif target.type in containers:
            heir, giver = source, target
        else:
            return []
        missing = [root for root in giver.roots if root not in heir.roots]
        heir.roots.extend(missing)
        return [heir] if missing else []


def checked_attributes(new: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of an entity that is to be made; 400 when they have no name."""
    attributes = new.get("attributes")
    if not isinstance(attributes, dict):
        raise ApiError(400, "attributes is not an object")
    if not isinstance(attributes.get("name"), str):
        raise ApiError(400, "attributes.name is not a string")
    return attributes


def new_entities(body: Any, key: str) -> list[dict[str, Any]]:
    """Return the documents that a request wants made; 400 when it is of another shape."""
    found = body.get(key) if isinstance(body, dict) else body
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ApiError(400, f"{key} is not a list of objects")
    return found
