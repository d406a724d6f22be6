"""Ovation's API, as far as a run needs it. Source of the wire format: the released client, `ovation` 1.26.0."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp

from agent import __version__
from agent.adapters import documents
from agent.adapters.circuit import Circuit
from agent.adapters.lane import KEPT_SECONDS
from agent.adapters.ovation_http import Connection
from agent.domain.activity import Activity, Listed
from agent.errors import OvationNotFound, StorageRefused
from agent.settings import OvationSettings


@dataclass(frozen=True, slots=True)
class Credentials:
    """Temporary credentials, good for one object."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str = field(repr=False)
    bucket: str
    key: str


@dataclass(frozen=True, slots=True)
class Download:
    """Where a Revision's bytes are now. `remote`: not in Ovation's store; the address is a stranger's."""

    url: str = field(repr=False)  # its query lets anybody read
    remote: bool


class Ovation:
    """A session with one token: the agent's own, or, through `as_user`, the one that a request carried."""

    def __init__(self, settings: OvationSettings, http: aiohttp.ClientSession, connection: Connection) -> None:
        self._settings = settings
        self._http = http
        self._connection = connection
        self._call = connection.call

    @classmethod
    def open(cls, settings: OvationSettings, circuit: Circuit | None = None) -> Self:
        """Open a session; nothing is sent yet. With a circuit, it notices when Ovation goes and when it is back.

        Raises:
            ConfigurationError: OVATION_HOSTS cannot be read.
        """
        http = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, connect=10, sock_read=30),
            headers={"Accept": "application/json", "User-Agent": f"ovation-agent/{__version__}"},
            # Whoever calls bounds how much it asks at once; waiting for a connection here would look like an outage.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return cls(settings, http, Connection(settings, http, circuit=circuit))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connection.close()

    def as_user(self, token: str) -> Ovation:
        """Return a view of Ovation with a person's own token, for one request; it shares the connections."""
        return Ovation(self._settings, self._http, self._connection.for_person(token))

    @property
    def api_url(self) -> str:
        """Where the API is, without a slash at the end."""
        return self._settings.api_url

    @property
    def away(self) -> bool:
        """Whether Ovation is away, or whoever hands out its tokens while there is none: calls would be refused."""
        return self._connection.away

    def on_back(self, callback: Callable[[], Awaitable[object]]) -> None:
        """Have this called whenever Ovation is back."""
        self._connection.on_back(callback)

    @property
    def renews_its_token(self) -> bool:
        """Whether tokens are fetched with a service account's secret, one after the other."""
        return self._settings.token is None

    async def claims(self) -> Mapping[str, Any] | None:
        """Return what the token says of itself, unverified; nothing of one that is no JSON Web Token."""
        return await self._connection.claims()

    async def check(self) -> str:
        """Return a word on the account once Ovation has accepted the token.

        Raises:
            OvationRefused, OvationUnavailable: it has not.
        """
        organization = self._settings.organizations[0] if self._settings.organizations else 0
        answer = await self._call("GET", f"/api/v1/o/{organization}/projects/")
        return f"{len(documents.entities(answer, 'projects'))} projects in organization {organization}"

    async def entity(self, organization: int, entity_id: str) -> dict[str, Any]:
        """Read any entity by its id."""
        if not entity_id.strip("."):
            raise OvationNotFound(f"{entity_id!r} is not the id of an entity", status=404)  # nor a step up the path
        path = f"/api/v1/o/{organization}/entities/{quote(entity_id, safe='')}"
        return documents.inner(await self._call("GET", path, params={"trash": "false"}), "entity")

    async def activity(self, organization: int, activity_id: str) -> Activity:
        """Read an Activity with its inputs and related files.

        Raises:
            OvationNotFound: there is none, the token may not read it, or it is something else.
        """
        entity = await self.entity(organization, activity_id)
        if entity.get("type") != "Activity":
            raise OvationNotFound(f"{activity_id} is a {entity.get('type')}, not an Activity", status=404)
        own = entity.get("organization_id")
        inputs, related, properties = await asyncio.gather(
            self._related(entity, "inputs"), self._related(entity, "actions"), self._properties(entity)
        )
        return Activity(
            id=documents.identifier(entity),
            organization=own if isinstance(own, int) else organization,
            name=documents.text(documents.attributes(entity).get("name"), activity_id),
            project_id=documents.project_of(entity),
            inputs=tuple(map(documents.entity, inputs)),
            related=tuple(map(documents.entity, related)),
            properties=properties,
            created_at=documents.text(documents.attributes(entity).get("created-at"), ""),
        )

    async def activities(self, organization: int) -> list[Listed]:
        """Return every Activity of an organization, in one call."""
        answer = await self._call("GET", f"/api/v1/o/{organization}/activities/")
        return [documents.listed(document) for document in documents.entities(answer, "activities")]

    async def activities_of(self, organization: int, revision_id: str) -> list[str]:
        """Return the ids of the Activities that use a Revision as input or related file."""
        revision = await self.entity(organization, revision_id)
        found = [*await self._related(revision, "activities"), *await self._related(revision, "procedures")]
        return sorted({documents.identifier(entity) for entity in found if entity.get("type") == "Activity"})

    async def operators(self, activity: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the ids and names of the operators of an Activity, given its document."""
        return [(each.id, each.name) for each in map(documents.entity, await self._related(activity, "operators"))]

    async def came_from(self, organization: int, entity_id: str) -> list[tuple[str, str]]:
        """Return the ids and names of the Activities around an entity, upstream and downstream, by Ovation's graph."""
        path = f"/api/v1/o/{organization}/prov/{quote(entity_id, safe='')}"
        found = documents.entities(await self._call("GET", path), "provenance")
        activities = [document for document in found if document.get("type") == "Activity"]
        return [(documents.identifier(each), documents.text(each.get("name"), "an Activity")) for each in activities]

    async def download(self, revision: Mapping[str, Any]) -> Download:
        """Return where the bytes of a Revision document are now; the address soon expires.

        Raises:
            StorageRefused: the Revision names no address.
        """
        attributes = documents.attributes(revision)
        url = attributes.get("url")
        if not isinstance(url, str) or not url:
            name = documents.text(attributes.get("name"), documents.identifier(revision))
            raise StorageRefused(f"{name}: Ovation names no address for its bytes")
        if self.is_remote(revision):
            return Download(url=url, remote=True)
        # The released client sends the token in the header and in the query; Ovation reads either.
        answer = await self._call("GET", url, token_in_query=True)
        return Download(url=documents.link(answer, "url"), remote=False)

    def is_remote(self, revision: Mapping[str, Any]) -> bool:
        """Say whether a Revision's bytes are a stranger's, who may serve others tomorrow."""
        attributes = documents.attributes(revision)
        url = attributes.get("url")
        return bool(attributes.get("remote")) or not isinstance(url, str) or url not in self._connection.origins

    async def create(self, parent: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
        """Make a File or Folder in a Project or Folder and return its document."""
        body = {"entities": [{"type": kind, "attributes": {"name": name}}]}
        answer = await self._call("POST", documents.link(parent, "links", "self"), json=body)
        return documents.first(answer, "entities")

    async def contents(self, parent: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
        """Return what stands in a Project or Folder, by (type, name); of one name twice, the first that was made."""
        found = [*await self._related(parent, "folders"), *await self._related(parent, "files")]
        by_age = sorted(
            ((documents.entity(document), document) for document in found), key=lambda each: each[0].created_at
        )
        standing: dict[tuple[str, str], dict[str, Any]] = {}
        for entity, document in by_age:
            standing.setdefault((entity.type, entity.name), document)
        return standing

    async def create_revision(
        self, file: Mapping[str, Any], name: str, content_type: str
    ) -> tuple[dict[str, Any], Credentials]:
        """Make a Revision of a File and return its document and the credentials to upload its bytes with."""
        body = {"entities": [{"type": "Revision", "attributes": {"name": name, "content_type": content_type}}]}
        answer = await self._call("POST", documents.link(file, "links", "self"), json=body)
        aws = documents.inner(documents.first(answer, "aws"), "aws")
        given = {each.name: documents.link(aws, each.name) for each in fields(Credentials)}
        return documents.first(answer, "entities"), Credentials(**given)

    async def upload_complete(self, revision: Mapping[str, Any]) -> dict[str, Any]:
        """Tell Ovation that a Revision's bytes are there and return its document, with `content_length`."""
        path = documents.link(revision, "links", "upload-complete")
        return documents.inner(await self._call("PUT", path, json={}), "revision")

    async def upload_failed(self, revision: Mapping[str, Any]) -> None:
        """Tell Ovation that a Revision's bytes will not come."""
        await self._call("PUT", documents.link(revision, "links", "upload-failed"), json={})

    async def add_output(self, activity: Mapping[str, Any], revision_id: str) -> None:
        """Link a Revision to an Activity as an output; doing it twice makes one link, so it may be asked for again."""
        body = [{"target_id": revision_id, "inverse_rel": "origins"}]
        path = documents.link(activity, "relationships", "outputs", "self")
        await self._call("POST", path, json=body, repeatable=True)

    async def annotations(self, entity: Mapping[str, Any], kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return everybody's annotations of a kind (`notes`, `timeline-events`), each with what it says."""
        answer = await self._call("GET", documents.link(entity, "links", kind))
        return documents.annotations_in(answer, kind)

    async def annotate(
        self, entity: Mapping[str, Any], kind: str, said: Sequence[Mapping[str, str]]
    ) -> list[dict[str, Any]]:
        """Add annotations to an entity and return their documents; a lost answer is not asked for again."""
        body = {kind.replace("-", "_"): list(said)}
        answer = await self._call("POST", documents.link(entity, "links", kind), json=body)
        return [document for document, _ in documents.annotations_in(answer, kind)]

    async def remove_annotation(self, entity: Mapping[str, Any], kind: str, annotation_id: str) -> None:
        """Remove an annotation of the agent's own."""
        await self._call("DELETE", f"{documents.link(entity, 'links', kind)}/{quote(annotation_id, safe='')}")

    async def _properties(self, entity: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        links = entity.get("links")
        if not isinstance(links, dict) or not links.get("properties"):
            return {}
        return documents.properties(await self._call("GET", documents.link(entity, "links", "properties")))

    async def _related(self, entity: Mapping[str, Any], rel: str) -> list[dict[str, Any]]:
        relationships = entity.get("relationships")
        if not isinstance(relationships, dict) or not relationships.get(rel):
            return []  # old entities, and types that have no such relation
        path = documents.link(entity, "relationships", rel, "related")
        return documents.entities(await self._call("GET", path), rel)

    async def children(self, parent: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what stands in a Project or Folder, Folders and Files alike, what was made first before the rest."""
        found = [*await self._related(parent, "folders"), *await self._related(parent, "files")]
        return sorted(found, key=lambda document: documents.entity(document).created_at)
