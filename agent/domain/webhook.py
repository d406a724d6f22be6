"""What a webhook says may have changed. A hint: the Activity is read from Ovation before anything is decided."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_ACTIVITY_SIDE = {"inputs": "source", "actions": "source", "activities": "target", "procedures": "target"}
_RELATION_ID = re.compile(r"(?P<source>[^>]*)--(?P<rel>[0-9A-Za-z_]+)-->(?P<target>[^>]*)")
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")
_MOST_ORGANIZATION = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Hint:
    """An entity that may have changed. `organization` is None when the payload does not name one."""

    entity_id: str
    type: str  # "Activity", or "Revision" whose Activities are to be looked up
    organization: int | None
    gained: str | None = None  # the input or related file that it says was added


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
    try:
        named = [_organization(payload[name]) for name in ("organization_id", "organization") if name in payload]
    except ValueError:
        return Unreadable(f"organization is not a number from 0 to {_MOST_ORGANIZATION}")
    organization = named[0] if named else None
    if "rel" in payload or payload.get("type") == "Relation":
        return _relation(payload, organization)
    return _document(payload, organization)


def _organization(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_ORGANIZATION):
        return value
    raise ValueError(value)


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
    if "rel" in payload:
        ends = {"source": payload.get("source_id", payload.get("entity_id")), "target": payload.get("target_id")}
        rel = payload["rel"]
    else:  # of a deleted one there may be no more than its id
        derived = _RELATION_ID.fullmatch(str(payload.get("_id", "")))
        ends = dict(derived.groupdict()) if derived else {}
        rel = ends.get("rel")
    if not isinstance(rel, str):
        return Unreadable("rel is not a word")
    side = _ACTIVITY_SIDE.get(rel)
    if side is None:
        return ()
    activity_id = ends[side]
    if not isinstance(activity_id, str) or not _ID.fullmatch(activity_id):
        return Unreadable(f"the {side} of the {rel} relation is not an Ovation id")
    other = ends["target" if side == "source" else "source"]
    gained = other if isinstance(other, str) and _ID.fullmatch(other) else None
    return (Hint(activity_id, "Activity", organization, gained),)
