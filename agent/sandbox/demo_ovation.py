"""What a person does in Ovation: make a Project and an Activity, upload files, read what came out.

It speaks the wire protocol by itself rather than through the agent's adapters, so that a mistake in those shows.
"""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
from yarl import URL

from agent.sandbox.demo_errors import DemoFailed

ORGANIZATION = 0
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Output:
    """One Revision among an Activity's outputs, as Ovation has it."""

    revision_id: str
    name: str
    bytes: int | None
    status: str
    url: str


@dataclass(frozen=True, slots=True)
class Activity:
    """An Activity and the Project that it is in."""

    id: str
    project_id: str
    document: Mapping[str, Any]

    def relationship(self, rel: str, kind: str = "self") -> str:
        """Return the path under which this Activity's links of one kind are."""
        return str(self.document["relationships"][rel][kind])


class Person:
    """A client of Ovation's API with a person's token; an async context manager."""

    def __init__(self, api_url: str, s3_url: str, token: str) -> None:
        self._api_url = api_url
        self._s3_url = s3_url
        self._token = token
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        self._http = aiohttp.ClientSession(self._api_url, headers=headers, timeout=_TIMEOUT)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def create_activity(self, project: str, activity: str) -> Activity:
        """Create a Project and an Activity in it, with these names and nothing linked."""
        made = await self._call("POST", _path("projects/"), {"projects": [_entity("Project", name=project)]})
        project_id = str(made["projects"][0]["_id"])
        parents = {"related": [project_id], "type": "Project", "inverse_rel": "activities", "create_as_inverse": True}
        entity = _entity("Activity", name=activity) | {"relationships": {"parents": parents}}
        made = await self._call("POST", _path("activities/"), {"activities": [entity]})
        document = made["activities"][0]
        return Activity(str(document["_id"]), project_id, document)

    async def upload(self, activity: Activity, file: Path, name: str) -> str:
        """Upload `file` into the Activity's Project; return its Revision's id."""
        made = await self._call(
            "POST", _path(f"projects/{activity.project_id}"), {"entities": [_entity("File", name=name)]}
        )
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        revision = _entity("Revision", name=name, content_type=content_type)
        made = await self._call("POST", made["entities"][0]["links"]["self"], {"entities": [revision]})
        revision = made["entities"][0]
        await self._put(made["aws"][0]["aws"], file, content_type)
        await self._call("PUT", revision["links"]["upload-complete"])
        return str(revision["_id"])

    async def link(self, activity: Activity, rel: str, inverse_rel: str, revision_id: str) -> None:
        """Link a Revision to the Activity, as input or as related file."""
        await self._call("POST", activity.relationship(rel), [{"target_id": revision_id, "inverse_rel": inverse_rel}])

    async def outputs(self, activity: Activity) -> list[Output]:
        """Return the Activity's outputs, by name."""
        answer = await self._call("GET", activity.relationship("outputs", "related"))
        found = [
            Output(
                revision_id=str(entity["_id"]),
                name=str(entity["attributes"]["name"]),
                bytes=entity["attributes"].get("content_length"),
                status=str(entity["attributes"].get("upload-status", "complete")),
                url=str(entity["attributes"]["url"]),
            )
            for entity in answer["outputs"]
        ]
        return sorted(found, key=lambda output: output.name)

    async def download(self, output: Output, target: Path) -> None:
        """Fetch an output's bytes and check them against its length and the object's ETag.

        Raises:
            DemoFailed: the upload is not complete, or the bytes are not those that Ovation describes.
        """
        if output.status != "complete":
            raise DemoFailed(f"{output.name} is in Ovation, but its upload is {output.status}")
        where = await self._call("GET", output.url)
        url = URL(where["url"], encoded=True)  # it is signed as it stands
        try:
            size, digest, etag = await _fetch(url, target)
        except aiohttp.ClientResponseError as error:
            # Its text would show the address, which is signed.
            raise DemoFailed(f"the bytes of {output.name} were answered with {error.status}") from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise DemoFailed(f"the bytes of {output.name} did not come: {type(error).__name__}") from None
        if output.bytes is not None and size != output.bytes:
            raise DemoFailed(f"{output.name} has {size} bytes, Ovation says {output.bytes}")
        # The ETag of an object that came in parts is not the digest of its bytes; it ends in their number.
        if "-" not in etag and digest != etag:
            raise DemoFailed(f"{output.name} has the MD5 digest {digest}, the object store says {etag}")

    async def _put(self, aws: Mapping[str, Any], file: Path, content_type: str) -> None:
        from aiobotocore.session import get_session
        from botocore.exceptions import BotoCoreError, ClientError

        client = get_session().create_client(
            "s3",
            endpoint_url=self._s3_url,
            region_name=aws.get("region", "us-east-1"),
            aws_access_key_id=aws["access_key_id"],
            aws_secret_access_key=aws["secret_access_key"],
            aws_session_token=aws["session_token"],
        )
        where = {"Bucket": aws["bucket"], "Key": aws["key"]}
        try:
            async with client as s3:
                with file.open("rb") as body:
                    await s3.put_object(**where, Body=body, ContentType=content_type, ServerSideEncryption="AES256")
        except (BotoCoreError, ClientError) as error:
            raise DemoFailed(f"the upload of {file.name} to the object store: {error}") from error

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        if self._http is None:
            raise RuntimeError("use Person as a context manager")
        try:
            async with self._http.request(method, path, json=body) as answer:
                if answer.status >= 400:  # noqa: PLR2004 client and server errors
                    raise DemoFailed(f"{method} {path} was answered with {answer.status}: {await answer.text()}")
                return await answer.json()
        except aiohttp.ClientError as error:
            raise DemoFailed(f"{method} {path}: {error or type(error).__name__}") from error


class SandboxControl:
    """What nobody can do through Ovation's API: people and webhooks are made by Ovation's own staff."""

    def __init__(self, api_url: str, control_token: str) -> None:
        self._api_url = api_url
        self._headers = {"Authorization": f"Bearer {control_token}"}

    async def token_of(self, email: str) -> str:
        """Return a token of the person with that address."""
        return str((await self._call("create_user", {"email": email}))["token"])

    async def ask_for_webhooks(self, url: str, key: str) -> None:
        """Have changes of links, Activities and Revisions told to `url`, with `key` as credentials."""
        for kind in ("Relation", "Activity", "Revision"):
            await self._call("create_webhook", {"url": url, "trigger_type": kind, "api_key": key})

    async def _call(self, name: str, arguments: dict[str, str]) -> Any:
        try:
            async with (
                aiohttp.ClientSession(self._api_url, headers=self._headers, timeout=_TIMEOUT) as http,
                http.post(f"/_sandbox/admin/{name}", json=arguments) as answer,
            ):
                if not answer.ok:
                    raise DemoFailed(f"the sandbox answered {name} with {answer.status}: {await answer.text()}")
                return (await answer.json())["result"]
        except aiohttp.ClientError as error:
            raise DemoFailed(f"{name} in the sandbox: {error or type(error).__name__}") from error


async def _fetch(url: URL, target: Path) -> tuple[int, str, str]:
    """Fetch an object into `target`; return its length, its MD5 digest, and its ETag as the store says it."""
    digest, size = hashlib.md5(usedforsecurity=False), 0
    async with aiohttp.ClientSession(timeout=_TIMEOUT, raise_for_status=True) as http, http.get(url) as answer:
        etag = answer.headers.get("ETag", "").strip('"')
        with target.open("wb") as file:
            async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    return size, digest.hexdigest(), etag


def _path(rest: str) -> str:
    return f"/api/v1/o/{ORGANIZATION}/{rest}"


def _entity(kind: str, **attributes: str) -> dict[str, Any]:
    return {"type": kind, "attributes": attributes}
