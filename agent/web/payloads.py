"""The bodies that requests may have, as JSON Schemas with examples as the real senders write them."""

from __future__ import annotations

from typing import Any

from agent.web.state import MOST_ORGANIZATION

Schema = dict[str, Any]

_ACTIVITY, _REVISION = "4b6de6e8-502b-40ed-95eb-4e4f3fc0ab40", "0d0e9f7e-95a3-4a0b-8f0c-3b2b7f0c8b11"
_ID = "[0-9A-Za-z][0-9A-Za-z_.-]{0,127}"
OVATION_ID: Schema = {
    "type": "string",
    "pattern": f"^{_ID}$",
    "description": "The id of an entity in Ovation.",
    "examples": [_ACTIVITY],
}
ORGANIZATION: Schema = {"type": "integer", "minimum": 0, "maximum": MOST_ORGANIZATION}
_REF_ID: Schema = {"$ref": "#/components/schemas/OvationId"}
_OF_SOURCE, _OF_TARGET = ["inputs", "actions"], ["activities", "procedures"]
_OF_ACTIVITIES = "|".join([*_OF_SOURCE, *_OF_TARGET])
_MAYBE_ORGANIZATION: Schema = {
    "type": ["integer", "null"],
    "minimum": 0,
    "maximum": MOST_ORGANIZATION,
    "description": "With neither, and none in the address, every organization that the agent watches is asked.",
}


def _form(
    description: str, *required: str, variants: list[Schema] | None = None, **properties: Schema | bool
) -> Schema:
    form: Schema = {"description": description, "type": "object"}
    if required:
        form["required"] = list(required)
    form["properties"] = {
        **properties,
        "organization": _MAYBE_ORGANIZATION,
        "organization_id": _MAYBE_ORGANIZATION,
    }
    return form if variants is None else {**form, "anyOf": variants}


def _named_by(*fields: str, schema: Schema) -> list[Schema]:
    """Say that the first of these fields that is there names the entity."""
    return [
        {"required": [name], "properties": {name: schema, **dict.fromkeys(fields[:position], False)}}
        for position, name in enumerate(fields)
    ]


PAYLOADS: dict[str, Schema] = {
    "RelationFromActivity": _form(
        "A Relation whose source is the Activity, mapped (`entity_id`) or whole (`source_id`).",
        "rel",
        rel={"enum": _OF_SOURCE},
        variants=_named_by("source_id", "entity_id", schema=_REF_ID),
    ),
    "RelationToActivity": _form(
        "A Relation that was made from the other end: its target is the Activity.",
        *("rel", "target_id"),
        rel={"enum": _OF_TARGET},
        target_id=_REF_ID,
    ),
    "RelationId": _form(
        "A Relation of which there is no more than its id.",
        *("type", "_id"),
        type={"const": "Relation"},
        rel=False,
        _id={
            "type": "string",
            "pattern": f"^({_ID}--({'|'.join(_OF_SOURCE)})-->[^>]*|[^>]*--({'|'.join(_OF_TARGET)})-->{_ID})$",
        },
    ),
    "EntityDocument": _form(
        "An Activity or a Revision, whole (`_id`) or as a notice of a change (`id`); what else is in it is not read.",
        "type",
        type={"enum": ["Activity", "Revision"]},
        rel=False,
        variants=_named_by("_id", "id", schema=_REF_ID),
    ),
    "IrrelevantRelation": _form(
        "A Relation that is no reason for a run, such as an output's. Accepted and forgotten.",
        "rel",
        rel={"type": "string", "not": {"enum": [*_OF_SOURCE, *_OF_TARGET]}},
    ),
    "IrrelevantRelationId": _form(
        "The id of such a Relation. Accepted and forgotten.",
        *("type", "_id"),
        type={"const": "Relation"},
        rel=False,
        _id={"type": "string", "pattern": f"^[^>]*--(?!({_OF_ACTIVITIES})-->)[0-9A-Za-z_]+-->[^>]*$"},
    ),
    "IrrelevantDocument": _form(
        "Anything else that has a type and an id. Accepted and forgotten.",
        "type",
        type={"type": "string", "not": {"enum": ["Activity", "Revision", "Relation"]}},
        rel=False,
        variants=_named_by("_id", "id", schema={"type": "string"}),
    ),
}

_OWNER = "15cab930-1e24-0131-026c-22000a977b96"


def _example(summary: str, **value: Any) -> Schema:
    return {"summary": summary, "value": value}


def _mapped(rel: str, inverse_rel: str, source: str, target: str) -> Schema:
    return {"rel": rel, "inverse_rel": inverse_rel, "owner_id": _OWNER, "entity_id": source, "target_id": target}


def _entity(kind: str, entity_id: str, **attributes: Any) -> Schema:
    own = {"_id": entity_id, "type": kind, "api_version": 4, "organization_id": 0, "owner": _OWNER}
    return {**own, "attributes": {"updated-at": "2016-01-26T16:39:13.815Z", **attributes}}


PAYLOAD_EXAMPLES: dict[str, Schema] = {
    "mapped": _example("Research, mapped Relation", **_mapped("inputs", "activities", _ACTIVITY, _REVISION)),
    "mapped_inverse": _example(
        "Research, mapped Relation from the file's end", **_mapped("procedures", "actions", _REVISION, _ACTIVITY)
    ),
    "relation": _example(
        "Research, whole Relation",
        _id=f"{_ACTIVITY}--inputs-->{_REVISION}",
        type="Relation",
        user_id=_OWNER,
        rel="inputs",
        inverse_rel="activities",
        source_id=_ACTIVITY,
        target_id=_REVISION,
        organization_id=0,
        links={"self": f"/api/v1/o/0/relationships/{_ACTIVITY}--inputs-->{_REVISION}"},
    ),
    "relation_id": _example("A Relation's id", _id=f"{_ACTIVITY}--actions-->{_REVISION}", type="Relation"),
    "activity": _example("Research, whole Activity", **_entity("Activity", _ACTIVITY, name="New rev")),
    "revision": _example(
        "Research, whole Revision",
        **_entity("Revision", _REVISION, **{"name": "reads.fastq.gz", "upload-status": "complete"}),
    ),
    "notice": _example("The web API's notice of a change", id=_ACTIVITY, type="Activity", organization=0),
    "lab": _example("Lab subscription", event="activity.updated", id=_ACTIVITY, type="Activity", organization=0),
    "output": _example(
        "Irrelevant: an output", rel="outputs", inverse_rel="origins", entity_id=_ACTIVITY, target_id=_REVISION
    ),
    "project": _example("Irrelevant: a Project", id=_OWNER, type="Project", organization=0),
}

WISH: Schema = {
    "description": "Which Activity is to be run with which of its Related files as the image.",
    "type": "object",
    "required": ["activity_id", "image_name"],
    "properties": {
        "activity_id": _REF_ID,
        "image_name": {"type": "string", "minLength": 1, "description": "The name of one of its Related files."},
        "organization": {
            "default": 0,
            "anyOf": [ORGANIZATION, {"type": "string", "pattern": "^[01]?[0-9]{1,9}$"}],
        },
    },
}
WISH_EXAMPLES: dict[str, Schema] = {
    "client": _example(
        "The released client's `hpc-run`", activity_id=_ACTIVITY, image_name="image.sif", organization="0"
    ),
    "number": _example("The same with a number", activity_id=_ACTIVITY, image_name="image.sif", organization=0),
}
