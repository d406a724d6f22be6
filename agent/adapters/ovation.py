"""Ovation's API, as far as a run needs it. Source of the wire format: the released client, `ovation` 1.26.0."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import tenacity
from yarl import URL

from agent import __version__
from agent.domain.activity import Activity, Entity, Upload
from agent.errors import OvationError, OvationNotFound, OvationRefused, OvationUnavailable
from agent.settings import OvationSettings

_REFRESH_EARLY_SECONDS = 60.0
_ATTEMPTS = 4
_MAX_BODY_BYTES = 64 * 1024 * 1024
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Credentials:
    """Temporary credentials, good for one object."""

    access_key_id: str
    secret_access_key: str
    session_token: str
    bucket: str
    key: str

    def __repr__(self) -> str:
        return f"Credentials(bucket={self.bucket!r}, key={self.key!r})"


@dataclass(frozen=True, slots=True)
class Download:
    """Where a Revision's bytes are now. `remote`: not in Ovation's store; the address is a stranger's."""

    url: str
    remote: bool

    def __repr__(self) -> str:
        return f"Download(host={URL(self.url).host!r}, remote={self.remote})"


class Origins:
    """Ovation's own origins: the only ones that its token is sent to."""

    def __init__(self, api_url: str, hosts: Sequence[str]) -> None:
        self._own = {str(URL(api_url).origin())} | {str(URL(host).origin()) for host in hosts if "://" in host}
        self._names = [host.lower() for host in hosts if "://" not in host]

    def __contains__(self, url: str) -> bool:
        address = URL(url)
        if not address.is_absolute() or address.host is None:
            return False
        if str(address.origin()) in self._own:
            return True
        if address.scheme != "https" or address.port != 443:  # noqa: PLR2004 a bare host name means https
            return False
        host = address.host.lower()
        return any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in self._names)


class Ovation:
    """A session with one token: the agent's own, or, through `as_user`, the one that a request carried."""

    def __init__(self, settings: OvationSettings, http: aiohttp.ClientSession, user_token: str | None = None) -> None:
        self._settings = settings
        self._http = http
        self._origins = Origins(settings.api_url, settings.hosts)
        self._token = user_token or (settings.token.get_secret_value() if settings.token else None)
        self._fixed = self._token is not None
        self._expires_at = float("inf") if self._fixed else 0.0

    @classmethod
    def open(cls, settings: OvationSettings) -> Self:
        """Open a session; nothing is sent yet."""
        http = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=60, connect=10, sock_read=30),
            headers={"Accept": "application/json", "User-Agent": f"ovation-agent/{__version__}"},
            connector=aiohttp.TCPConnector(limit=32),
        )
        return cls(settings, http)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    def as_user(self, token: str) -> Ovation:
        """Return a view of Ovation with a person's own token, for one request; it shares the connections."""
        return Ovation(self._settings, self._http, user_token=token)

    async def check(self) -> str:
        """Return a word on the account once Ovation has accepted the token.

        Raises:
            OvationRefused, OvationUnavailable: it has not.
        """
        organization = self._settings.organizations[0] if self._settings.organizations else 0
        answer = await self._call("GET", f"/api/v1/o/{organization}/projects/")
        return f"{len(_list(answer, 'projects'))} projects in organization {organization}"

    async def entity(self, organization: int, entity_id: str) -> dict[str, Any]:
        """Read any entity by its id."""
        answer = await self._call(
            "GET", f"/api/v1/o/{organization}/entities/{quote(entity_id, safe='')}", params={"trash": "false"}
        )
        return _dict(answer, "entity")

    async def activity(self, organization: int, activity_id: str) -> Activity:
        """Read an Activity with its inputs and related files.

        Raises:
            OvationNotFound: there is none, the token may not read it, or it is something else.
        """
        entity = await self.entity(organization, activity_id)
        if entity.get("type") != "Activity":
            raise OvationNotFound(f"{activity_id} is a {entity.get('type')}, not an Activity", status=404)
        roots = entity.get("links", {}).get("_collaboration_roots") or [""]
        return Activity(
            id=str(entity["_id"]),
            organization=int(entity.get("organization_id", organization)),
            name=str(entity["attributes"].get("name", activity_id)),
            project_id=str(roots[0]),
            inputs=tuple(map(_entity, await self._related(entity, "inputs"))),
            related=tuple(map(_entity, await self._related(entity, "actions"))),
        )

    async def activities_of(self, organization: int, revision_id: str) -> list[str]:
        """Return the ids of the Activities that use a Revision as input or related file."""
        revision = await self.entity(organization, revision_id)
        found = [*await self._related(revision, "activities"), *await self._related(revision, "procedures")]
        return sorted({str(entity["_id"]) for entity in found if entity.get("type") == "Activity"})

    async def download(self, revision: Mapping[str, Any]) -> Download:
        """Return where the bytes of a Revision document are now; the address soon expires."""
        url = str(revision["attributes"].get("url") or "")
        if revision["attributes"].get("remote") or url not in self._origins:
            return Download(url=url, remote=True)
        # The released client sends the token in the header and in the query; Ovation reads either.
        answer = await self._call("GET", url, params={"token": await self._bearer()})
        return Download(url=str(answer["url"]), remote=False)

    async def create(self, parent: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
        """Make a File or Folder in a Project or Folder and return its document."""
        body = {"entities": [{"type": kind, "attributes": {"name": name}}]}
        made: dict[str, Any] = _list(await self._call("POST", parent["links"]["self"], json=body), "entities")[0]
        return made

    async def contents(self, parent: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
        """Return what stands in a Project or Folder, by (type, name); of one name twice, the first that was made."""
        found = [*await self._related(parent, "folders"), *await self._related(parent, "files")]
        found.sort(key=lambda entity: str(entity["attributes"].get("created-at", "")), reverse=True)
        return {(entity["type"], entity["attributes"].get("name", "")): entity for entity in found}

    async def create_revision(
        self, file: Mapping[str, Any], name: str, content_type: str
    ) -> tuple[dict[str, Any], Credentials]:
        """Make a Revision of a File and return its document and the credentials to upload its bytes with."""
        body = {"entities": [{"type": "Revision", "attributes": {"name": name, "content_type": content_type}}]}
        answer = await self._call("POST", file["links"]["self"], json=body)
        aws = _list(answer, "aws")[0]["aws"]
        fields = ("access_key_id", "secret_access_key", "session_token", "bucket", "key")
        return _list(answer, "entities")[0], Credentials(**{field: str(aws[field]) for field in fields})

    async def upload_complete(self, revision: Mapping[str, Any]) -> dict[str, Any]:
        """Tell Ovation that a Revision's bytes are there and return its document, with `content_length`."""
        return _dict(await self._call("PUT", revision["links"]["upload-complete"], json={}), "revision")

    async def upload_failed(self, revision: Mapping[str, Any]) -> None:
        """Tell Ovation that a Revision's bytes will not come."""
        await self._call("PUT", revision["links"]["upload-failed"], json={})

    async def add_output(self, activity: Mapping[str, Any], revision_id: str) -> None:
        """Link a Revision to an Activity as an output; doing it twice makes one link."""
        body = [{"target_id": revision_id, "inverse_rel": "origins"}]
        await self._call("POST", activity["relationships"]["outputs"]["self"], json=body)

    async def _related(self, entity: Mapping[str, Any], rel: str) -> list[dict[str, Any]]:
        links = entity.get("relationships", {}).get(rel)
        if not links:
            return []
        answer = await self._call("GET", links["related"])
        found = next((value for value in answer.values() if isinstance(value, list)), [])
        unique = {document["_id"]: document for document in found}
        return list(unique.values())

    async def _bearer(self) -> str:
        if self._token is None or time.time() > self._expires_at - _REFRESH_EARLY_SECONDS:
            await self._fetch_token()
        if self._token is None:
            raise OvationRefused("no token: set OVATION_TOKEN, or OVATION_CLIENT_ID and OVATION_CLIENT_SECRET")
        return self._token

    async def _fetch_token(self) -> None:
        settings = self._settings
        if self._fixed or settings.client_id is None or settings.client_secret is None:
            return
        body = {
            "client_id": settings.client_id,
            "client_secret": settings.client_secret.get_secret_value(),
            "audience": settings.audience,
            "grant_type": "client_credentials",
        }
        answer = await self._retried("POST", URL(settings.auth_domain) / "oauth/token", {"json": body})
        self._token = str(answer["access_token"])
        self._expires_at = time.time() + float(answer.get("expires_in", 3600))

    async def _call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        url = URL(self._settings.api_url).join(URL(path))
        if str(url) not in self._origins:
            raise OvationError(f"Ovation points to {url.host}, which is not one of its own hosts (OVATION_HOSTS)")
        try:
            return await self._retried(method, url, request, signed=True)
        except OvationRefused as error:
            if error.status != 401 or self._fixed or method != "GET":  # noqa: PLR2004 HTTP's own number
                raise
            self._expires_at = 0.0  # a service token may be revoked before it expires: once more with a fresh one
            return await self._retried(method, url, request, signed=True)

    async def _retried(self, method: str, url: URL, request: dict[str, Any], *, signed: bool = False) -> dict[str, Any]:
        # A POST without an answer may have made something: the step that wanted it looks before it asks again.
        repeatable = method != "POST"
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=3),
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, OvationUnavailable) and (repeatable or error.status in {429, 503})
            ),
            reraise=True,
        )
        headers = {"Authorization": f"Bearer {await self._bearer()}"} if signed else {}
        answer: dict[str, Any] = await retrying(self._send, method, url, headers, request)
        return answer

    async def _send(self, method: str, url: URL, headers: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        what = f"{method} {url.path}"
        try:
            async with self._http.request(method, url, headers=headers, allow_redirects=False, **request) as response:
                if (response.content_length or 0) > _MAX_BODY_BYTES:
                    raise OvationError(f"Ovation's answer to {what} is too large", status=response.status)
                if response.status >= 300:  # noqa: PLR2004 HTTP's own number
                    raise _refusal(what, response.status, (await response.text())[:500])
                body = await response.json(content_type=None) if response.status != 204 else {}  # noqa: PLR2004
        except TimeoutError:
            raise OvationUnavailable(f"Ovation does not answer {what} in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise OvationUnavailable(f"Ovation cannot be reached for {what}: {type(error).__name__}") from None
        except ValueError:
            raise OvationUnavailable(f"Ovation's answer to {what} is not JSON") from None
        if not isinstance(body, dict):
            raise OvationError(f"Ovation's answer to {what} is not an object")
        return body


def _refusal(what: str, status: int, text: str) -> OvationError:
    if status in _TRANSIENT:
        return OvationUnavailable(f"Ovation answers {what} with {status}", status=status)
    if status in {401, 403}:
        return OvationRefused(f"Ovation refuses {what} with {status}: is the token valid for it?", status=status)
    if status == 404:  # noqa: PLR2004 HTTP's own number
        return OvationNotFound(f"Ovation has nothing at {what}, or hides it from this token", status=status)
    return OvationError(f"Ovation answers {what} with {status}: {text}", status=status)


def _entity(document: Mapping[str, Any]) -> Entity:
    attributes = document.get("attributes", {})
    status = attributes.get("upload-status", Upload.COMPLETE)
    return Entity(
        id=str(document["_id"]),
        type=str(document.get("type", "Revision")),
        name=str(attributes.get("name") or document["_id"]),
        upload=Upload(status) if status in set(Upload) else Upload.COMPLETE,
        created_at=str(attributes.get("created-at", "")),
    )


def _list(answer: Mapping[str, Any], key: str) -> list[Any]:
    found = answer.get(key)
    if not isinstance(found, list) or (not found and key != "projects"):
        raise OvationError(f"Ovation's answer has no {key}")
    return found


def _dict(answer: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = answer.get(key)
    if not isinstance(found, dict):
        raise OvationError(f"Ovation's answer has no {key}")
    return found
