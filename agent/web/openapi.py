"""`GET /openapi.json`: everything that answers HTTP, as OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from aiohttp import web
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from agent import __version__
from agent.web import answers
from agent.web.operations import OPERATIONS, PROBLEMS, SECURITY, STRANGERS, Answer, Operation, Problem
from agent.web.payloads import OVATION_ID, PAYLOADS, WISH, Schema

routes = web.RouteTableDef()
_SCHEMAS = "#/components/schemas/{model}"
_DESCRIPTION = """\
Runs the compute image of an Ovation Activity on its inputs and brings the outputs back.

Every error is JSON of the shape `{"errors": {"detail": "..."}}`. An address that is not listed here answers 404, a
method that is not listed 405 with `Allow`. `HEAD` answers as `GET` does, without a body.
"""
_TAGS = {
    "webhooks": "Ovation's webhook senders tell of changes.",
    "people": "A person asks for a run.",
    "administration": "On call: what runs, why, and how to stop it.",
    "health": "Whether the agent is there and able to work.",
}


@routes.get("/openapi.json")
async def openapi(_: web.Request) -> web.Response:
    """Describe everything that answers HTTP."""
    return web.json_response(document())


@cache
def document() -> Schema:
    """Return the OpenAPI document."""
    types = {each.type for operation in OPERATIONS.values() for each in operation.answers.values() if each.type}
    paths: dict[str, Schema] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(operation)
        if method == "get":
            paths[path]["head"] = _head(paths[path]["get"])
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Ovation compute agent",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {
                "OvationId": OVATION_ID,
                "Payload": {"anyOf": [{"$ref": _SCHEMAS.format(model=name)} for name in PAYLOADS]},
                **PAYLOADS,
                "Wish": WISH,
                **_types([*types, answers.Problem]),
            },
            "responses": {name: _problem(problem) for name, problem in {**PROBLEMS, **STRANGERS}.items()},
            "securitySchemes": SECURITY,
        },
    }


def _operation(operation: Operation) -> Schema:
    found: Schema = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "security": [{name: [] for name in names} for names in operation.security],
        "parameters": list(operation.parameters),
        "responses": _responses(operation.answers, operation.problems),
    }
    if operation.description:
        found["description"] = operation.description
    if operation.body is not None:
        found["requestBody"] = operation.body
    return found


def _head(get: Schema) -> Schema:
    """Describe HEAD beside its GET: the same without content."""
    responses = {
        status: {"description": answer["description"], "headers": answer.get("headers", {})}
        for status, answer in (
            (status, _problem(PROBLEMS[answer["$ref"].rpartition("/")[2]]) if "$ref" in answer else answer)
            for status, answer in get["responses"].items()
        )
    }
    return {**get, "operationId": f"{get['operationId']}_head", "responses": responses}


def _responses(found: Mapping[int, Answer], problems: Iterable[str]) -> Schema:
    responses: Schema = {
        str(status): {
            "description": answer.description,
            **({"headers": dict(answer.headers)} if answer.headers else {}),
            "content": _content(answer.type, answer.text),
        }
        for status, answer in found.items()
    }
    references = {str(PROBLEMS[name].status): {"$ref": f"#/components/responses/{name}"} for name in problems}
    return dict(sorted({**responses, **references}.items()))


def _content(kind: Any, text: str = "text/plain") -> Schema:
    if kind is None:
        return {text: {"schema": {"type": "string"}}}
    schema = {"type": "object"} if kind == dict[str, Any] else {"$ref": _SCHEMAS.format(model=kind.__name__)}
    return {"application/json": {"schema": schema}}


def _problem(problem: Problem) -> Schema:
    return {
        "description": problem.description,
        **({"headers": dict(problem.headers)} if problem.headers else {}),
        "content": _content(answers.Problem),
    }


class _Untitled(GenerateJsonSchema):
    """Leaves out titles that only repeat names."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 pydantic's signature
        return False


def _types(kinds: Iterable[Any]) -> dict[str, Schema]:
    """Return the JSON Schemas of these types and of what they consist of."""
    _, found = TypeAdapter.json_schemas(
        [(kind, "serialization", TypeAdapter(kind)) for kind in kinds if kind != dict[str, Any]],
        ref_template=_SCHEMAS,
        schema_generator=_Untitled,
    )
    definitions: dict[str, Schema] = found["$defs"]
    return dict(sorted(definitions.items()))
