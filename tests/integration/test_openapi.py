"""The agent does what its OpenAPI document says: all of it, and nothing else, whatever is sent."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import aiohttp
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from agent import __version__
from agent.web import openapi
from agent.web.application import application
from agent.web.payloads import PAYLOADS
from tests.agents import ADMIN_TOKEN, WEBHOOK_KEY
from tests.lab import Lab, laboratory

PERSON = "person@example.org"
# Of the Standard Webhooks' form. Nothing here is signed with it: it has the agent read the headers that say so.
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"a key of thirty-two bytes, or so").decode()
CONFIGURATION = """
warnings.fail-on = true  # such as: it met nothing but 404
[auth.openapi]
webhookBasic = { username = "${WEBHOOK_KEY}", password = "${WEBHOOK_KEY}" }
admin = { bearer = "${ADMIN_TOKEN}" }
person = { bearer = "${PERSON_TOKEN}" }
"""


def test_every_route_is_described_and_nothing_else() -> None:
    router = application(object()).router  # type: ignore[arg-type] # nothing is asked of it
    routes = {
        (route.method.lower(), resource.canonical)
        for resource in router.resources()
        for route in resource
        if not resource.canonical.startswith("/page/")  # what a browser asks for, for people
    }
    described = {(method, path) for path, item in openapi.document()["paths"].items() for method in item}
    assert described == routes


def test_the_document_is_openapi() -> None:
    document = openapi.document()
    validate(document)
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == __version__


def test_the_examples_fit_their_schemas() -> None:
    document = openapi.document()
    for item in document["paths"].values():
        for operation in item.values():
            for body in operation.get("requestBody", {}).get("content", {}).values():
                schema = {**body["schema"], "components": document["components"]}
                for example in body["examples"].values():
                    OAS31Validator(schema).validate(example["value"])


async def served(lab: Lab) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{lab.agent.address}/openapi.json") as answer:
        assert answer.status == 200
        document: dict[str, Any] = await answer.json()
        return document


def close(document: dict[str, Any]) -> None:
    """Have the answers consist of nothing but what is described."""
    schemas = document["components"]["schemas"]
    for name in schemas.keys() - PAYLOADS.keys() - {"Wish"}:
        if "properties" in schemas[name]:
            schemas[name]["additionalProperties"] = False


def fill_in(document: dict[str, Any], ended: dict[str, Any], live: dict[str, Any]) -> None:
    """Have the examples name what there is: jobs, an Activity and its image."""
    paths = document["paths"]
    for path, item in paths.items():
        for parameter in (parameter for operation in item.values() for parameter in operation["parameters"]):
            if parameter["name"] in {"id", "job_id", "activity_id"}:
                of_job = parameter["name"] == "job_id" or path.startswith("/api/jobs/")
                parameter["example"] = ended["id"] if of_job else ended["activity_id"]
    paths["/api/jobs/{id}/cancel"]["post"]["parameters"] = [
        {**parameter, "example": live["id"]} for parameter in paths["/api/jobs/{id}/cancel"]["post"]["parameters"]
    ]
    for operation in paths["/api/log"].values():  # it goes on as long as the agent does
        operation["parameters"] = [each for each in operation["parameters"] if each["name"] != "follow"]
    wishes = paths["/hpc_run"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for wish in wishes.values():
        wish["value"] |= {"activity_id": ended["activity_id"], "image_name": ended["image_name"]}


async def schemathesis(directory: Path, lab: Lab, document: dict[str, Any], configuration: str, examples: int) -> str:
    """Run schemathesis with every check it has on a document, and return what it says."""
    directory.mkdir()
    (directory / "openapi.json").write_text(json.dumps(document))
    (directory / "schemathesis.toml").write_text(configuration)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "COLUMNS": "120",
        "WEBHOOK_KEY": WEBHOOK_KEY,
        "ADMIN_TOKEN": ADMIN_TOKEN,
        "PERSON_TOKEN": lab.sandbox.user_token(PERSON),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", "openapi.json"),
        *("--url", lab.agent.address, "--checks", "all", "--max-examples", str(examples), "--generation-deterministic"),
        *("--continue-on-failure", "--request-timeout", "10", "--no-color"),
        cwd=directory,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    return output


async def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    async with laboratory(tmp_path, AGENT_WEBHOOK_SECRET=WEBHOOK_SECRET) as lab:
        lab.sandbox.admin.add_member(lab.project_id, PERSON, "reader")
        ended, _ = await lab.run("echo out; echo err >&2")
        live = await lab.agent.job(lab.activity("sleep 20"), states={"running"})
        document = await served(lab)
        close(document)
        fill_in(document, ended, live)
        said = await schemathesis(tmp_path / "authenticated", lab, document, CONFIGURATION, examples=25)
        operations = sum(len(item) for item in document["paths"].values())
        assert f"Tested: {operations}" in said
        await schemathesis(tmp_path / "nobody", lab, document, "", examples=5)
        assert lab.agent.process.returncode is None
        assert lab.agent.events("request_failed") == []
