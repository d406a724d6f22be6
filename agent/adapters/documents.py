"""Reading Ovation's documents: what they lack or spell oddly ends here, as a sane value or as a clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agent.domain.activity import Entity, Listed, Upload
from agent.errors import OvationError


def parse(body: bytes) -> Any:
    """Parse JSON; lone surrogates, which no file and no database can keep, become question marks.

    Raises:
        ValueError: it is not JSON, or nested beyond all reason.
    """
    try:
        parsed = json.loads(body)
        return _without_surrogates(parsed) if b"\\ud" in body or b"\\uD" in body else parsed
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case list():
            return [_without_surrogates(item) for item in value]
        case dict():
            return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
        case _:
            return value


def text(value: object, default: str) -> str:
    """Return a name as text that a database can keep; `default` for what is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return default
    return str(value).replace("\0", "\N{REPLACEMENT CHARACTER}") or default


def attributes(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an entity's attributes; old entities may have none."""
    found = document.get("attributes")
    return found if isinstance(found, dict) else {}


def identifier(document: Mapping[str, Any]) -> str:
    """Return an entity's id."""
    found = document.get("_id")
    if not isinstance(found, str) or not found:
        raise OvationError("Ovation's answer has an entity without an _id")
    return found


def entity(document: Mapping[str, Any]) -> Entity:
    """Return what a document says of an entity; without an upload-status its upload is complete."""
    given = attributes(document)
    status = given.get("upload-status")
    entity_id = identifier(document)
    return Entity(
        id=entity_id,
        type=text(document.get("type"), "Revision"),
        name=text(given.get("name"), entity_id),
        upload=Upload(status) if isinstance(status, str) and status in set(Upload) else Upload.COMPLETE,
        created_at=text(given.get("created-at"), ""),
    )


def listed(document: Mapping[str, Any]) -> Listed:
    """Return what the list of an organization's Activities says of one."""
    given = attributes(document)
    return Listed(
        id=identifier(document),
        created_at=text(given.get("created-at"), ""),
        updated_at=text(given.get("updated-at"), ""),
    )


def properties(answer: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return every user's value of each property; true and false as these words."""
    found: dict[str, tuple[str, ...]] = {}
    annotations = answer.get("properties")
    for each in annotations if isinstance(annotations, list) else []:
        inner_part = each.get("annotation") if isinstance(each, dict) else None
        if not isinstance(inner_part, dict) or not isinstance(inner_part.get("key"), str):
            continue
        value = inner_part.get("value")
        shown = str(value).lower() if isinstance(value, bool) else text(value, "")
        found[inner_part["key"]] = (*found.get(inner_part["key"], ()), shown)
    return found


def annotations_in(answer: Mapping[str, Any], kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the annotations of a kind in an answer, each with what it says."""
    found = answer.get(kind.replace("-", "_"))
    documents = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    return [(each, each["annotation"]) for each in documents if isinstance(each.get("annotation"), dict)]


def project_of(document: Mapping[str, Any]) -> str:
    """Return the id of the Project that an Activity belongs to: the first of its `_collaboration_roots`."""
    links = document.get("links")
    roots = links.get("_collaboration_roots") if isinstance(links, dict) else None
    if isinstance(roots, list) and roots and isinstance(roots[0], str) and roots[0]:
        return roots[0]
    raise OvationError(
        f"the Activity {identifier(document)} belongs to no Project that this token may see: move it into one"
    )


def link(document: Mapping[str, Any], *keys: str) -> str:
    """Return the address that stands under these keys of a document."""
    found: Any = document
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, str) or not found:
        kind = text(document.get("type"), "entity")
        raise OvationError(f"Ovation's answer lacks {'.'.join(keys)} of the {kind}")
    return found


def entities(answer: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the list under `key`, or else the only list there is; each entity once."""
    found = answer.get(key)
    if not isinstance(found, list):
        lists = [value for value in answer.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise OvationError(f"Ovation's answer has no {key}")
        found = lists[0]
    documents = [document for document in found if isinstance(document, dict)]
    return list({identifier(document): document for document in documents}.values())


def first(answer: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the first object of the list under `key`."""
    found = answer.get(key)
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise OvationError(f"Ovation's answer has no {key}")
    return found[0]


def inner(answer: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the object under `key`."""
    found = answer.get(key)
    if not isinstance(found, dict):
        raise OvationError(f"Ovation's answer has no {key}")
    return found
