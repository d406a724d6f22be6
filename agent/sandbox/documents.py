"""How entities, links and annotations look on the wire (ovation-api.md section 2)."""

from __future__ import annotations

from typing import Any

from agent.sandbox.records import Entity, Relation

PLURALS = {
    "Project": "projects",
    "Folder": "folders",
    "File": "files",
    "Revision": "revisions",
    "Activity": "activities",
    "Source": "sources",
    "User": "users",
}
TYPES = {plural: type_ for type_, plural in PLURALS.items()}

# rel -> (inverse rel, types that may stand at the other end)
RELATIONSHIPS: dict[str, dict[str, tuple[str, frozenset[str]]]] = {
    "Project": {
        "activities": ("parents", frozenset({"Activity"})),
        "folders": ("parents", frozenset({"Folder"})),
        "files": ("parents", frozenset({"File"})),
    },
    "Folder": {
        "folders": ("parents", frozenset({"Folder"})),
        "files": ("parents", frozenset({"File"})),
        "parents": ("folders", frozenset({"Project", "Folder"})),
    },
    "File": {
        "revisions": ("file", frozenset({"Revision"})),
        "parents": ("files", frozenset({"Project", "Folder"})),
    },
    "Revision": {
        "file": ("revisions", frozenset({"File"})),
        "activities": ("inputs", frozenset({"Activity"})),
        "origins": ("outputs", frozenset({"Activity"})),
        "procedures": ("actions", frozenset({"Activity"})),
    },
    "Activity": {
        "inputs": ("activities", frozenset({"Revision", "Source"})),
        "outputs": ("origins", frozenset({"Revision", "Source"})),
        "actions": ("procedures", frozenset({"Revision"})),
        "operators": ("activities", frozenset({"User"})),
        "parents": ("activities", frozenset({"Project"})),
    },
    "Source": {
        "activities": ("inputs", frozenset({"Activity"})),
        "origins": ("outputs", frozenset({"Activity"})),
    },
    "User": {"activities": ("operators", frozenset({"Activity"}))},
}

ANNOTATION_TYPES = ("properties", "tags", "notes", "timeline_events")


def entity_document(entity: Entity, services_url: str, *, writable: bool) -> dict[str, Any]:
    """Return the entity as JSON; `services_url` is where its bytes are asked for."""
    prefix = f"/api/v1/o/{entity.organization}"
    self_path = f"{prefix}/{PLURALS[entity.type]}/{entity.id}"
    annotations = f"{prefix}/entities/{entity.id}/annotations"
    links: dict[str, Any] = {
        "self": self_path,
        "_collaboration_roots": entity.roots,
        "notes": f"{annotations}/notes",
        "properties": f"{annotations}/properties",
        "tags": f"{annotations}/tags",
        "timeline-events": f"{annotations}/timeline_events",
    }
    attributes = dict(entity.attributes)
    document: dict[str, Any] = {
        "_id": entity.id,
        "type": entity.type,
        "api_version": 4,
        "organization_id": entity.organization,
        "owner": entity.owner,
        "permissions": {"create": True, "update": writable, "delete": writable},
    }
    if entity.type in {"Activity", "Folder"}:
        links["zip"] = f"{prefix}/zip/{PLURALS[entity.type]}/{entity.id}"
    if entity.type == "File":
        links["heads"] = f"{self_path}/heads"
        document["revisions"] = entity.revisions
    if entity.type == "Revision":
        links["upload-complete"] = f"{self_path}/upload-complete"
        links["upload-failed"] = f"{self_path}/upload-failed"
        attributes.setdefault("url", f"{services_url}/api/v1/resources/{entity.id}")
    if entity.type == "User":
        attributes.pop("email", None)
    if entity.trash_info is not None:
        document["trash_info"] = entity.trash_info
    relationships = {
        rel: {"self": f"{self_path}/links/{rel}/relationships", "related": f"{self_path}/links/{rel}"}
        for rel in RELATIONSHIPS[entity.type]
    }
    return document | {"attributes": attributes, "relationships": relationships, "links": links}


def relation_document(relation: Relation) -> dict[str, Any]:
    """Return the link as JSON."""
    document: dict[str, Any] = {
        "_id": relation.id,
        "type": "Relation",
        "user_id": relation.user_id,
        "rel": relation.rel,
        "source_id": relation.source_id,
        "target_id": relation.target_id,
        "organization_id": relation.organization,
        "links": {"self": f"/api/v1/o/{relation.organization}/relationships/{relation.id}"},
    }
    if relation.inverse_rel is not None:
        document["inverse_rel"] = relation.inverse_rel
    return document


def annotation_document(
    annotation_id: str, entity: Entity, user_id: str, annotation_type: str, body: dict[str, Any]
) -> dict[str, Any]:
    """Return the annotation as JSON."""
    path = f"/api/v1/o/{entity.organization}/entities/{entity.id}/annotations/{annotation_type}/{annotation_id}"
    return {
        "_id": annotation_id,
        "type": "Annotation",
        "user": user_id,
        "entity": entity.id,
        "annotation_type": annotation_type,
        "annotation": body,
        "links": {"self": path, "_collaboration_roots": entity.roots},
    }
