"""What a webhook says may have changed. A hint: the Activity is read from Ovation before anything is decided."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_ACTIVITY_SIDE = {"inputs": "source", "actions": "source", "activities": "target", "procedures": "target"}
_RELATION_ID = re.compile(r"(?P<source>.+)--(?P<rel>\w+)-->(?P<target>.+)", re.DOTALL)
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Hint:
    """An entity that may have changed. `organization` is None when the payload does not name one."""

    entity_id: str
    type: str  # "Activity", or "Revision" whose Activities are to be looked up
    organization: int | None
    gained: bool = False  # it says that an input or a related file was added, not only that something changed


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The payload is not one of the forms; `where` says which part and why."""

    where: str


def parse(payload: object) -> tuple[Hint, ...] | Unreadable:
    """Return what the payload is about; nothing at all when that cannot matter to a run.

    The forms are those of Ovation's two webhook generations: a mapped or a whole Relation (from either end), a whole
    Activity or Revision document, and `{id, type, organization}`.
    """
    if not isinstance(payload, Mapping):
        return Unreadable("the body is not a JSON object")
    organization = payload.get("organization_id", payload.get("organization"))
    if organization is not None and (not isinstance(organization, int) or isinstance(organization, bool)):
        return Unreadable("organization is not a number")
    if "rel" in payload or payload.get("type") == "Relation":
        return _relation(payload, organization)
    return _document(payload, organization)


def _document(payload: Mapping[str, object], organization: int | None) -> tuple[Hint, ...] | Unreadable:
    entity_id = payload.get("_id", payload.get("id"))
    kind = payload.get("type")
    if not isinstance(entity_id, str) or not isinstance(kind, str):
        return Unreadable("neither rel, nor an id with a type")
    if kind not in {"Activity", "Revision"}:
        return ()
    if not _ID.fullmatch(entity_id):
        return Unreadable("the id is not an Ovation id")
    return (Hint(entity_id, kind, organization),)


def _relation(payload: Mapping[str, object], organization: int | None) -> tuple[Hint, ...] | Unreadable:
    derived = _RELATION_ID.fullmatch(str(payload.get("_id", "")))
    rel = payload.get("rel") or (derived["rel"] if derived else None)
    source = payload.get("source_id") or payload.get("entity_id") or (derived["source"] if derived else None)
    target = payload.get("target_id") or (derived["target"] if derived else None)
    if not isinstance(rel, str):
        return Unreadable("rel is not a word")
    side = _ACTIVITY_SIDE.get(rel)
    if side is None:
        return ()
    activity_id = source if side == "source" else target
    if not isinstance(activity_id, str) or not _ID.fullmatch(activity_id):
        return Unreadable(f"the {side} of the {rel} relation is not an Ovation id")
    return (Hint(activity_id, "Activity", organization, gained=True),)
