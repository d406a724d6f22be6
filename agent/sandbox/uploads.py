"""Revisions and their bytes: making them with credentials of their own, finishing them, and reading them back."""

from __future__ import annotations

import secrets
from typing import Any, Protocol

from agent.sandbox.errors import ApiError
from agent.sandbox.model import Model, checked_attributes
from agent.sandbox.records import Entity, Relation
from agent.sandbox.settings import BUCKET, SandboxSettings
from agent.sandbox.signatures import Credential, presign
from agent.sandbox.tokens import Principal


class StoredObject(Protocol):
    """What the object store knows of an object."""

    @property
    def etag(self) -> str:
        """The ETag without quotes."""

    @property
    def size(self) -> int:
        """The length in bytes."""

    @property
    def version(self) -> str:
        """The version's id."""


class Store(Protocol):
    """Where the bytes are."""

    def stat(self, bucket: str, key: str) -> StoredObject | None:
        """Return the object, None without one."""


class Uploads:
    """The life of a Revision (ovation-api.md sections 4 and 5)."""

    def __init__(self, model: Model, store: Store, settings: SandboxSettings) -> None:
        self.model = model
        self.store = store
        self.settings = settings
        self.s3_url = ""

    def heads(self, file: Entity) -> list[Entity]:
        """Return the newest Revisions: those with the most predecessors."""
        revisions = [one for one in self.model.records.related(file.id, "revisions") if one.trash_info is None]
        depth = max((len(one.attributes.get("previous", [])) for one in revisions), default=0)
        return [one for one in revisions if len(one.attributes.get("previous", [])) == depth]

    def create(
        self, principal: Principal, parent: Entity, new: dict[str, Any]
    ) -> tuple[Entity, Relation, dict[str, Any]]:
        """Make a Revision of a File, or after a given Revision; return it, its link and its upload credentials."""
        if new.get("type") != "Revision":
            raise ApiError(400, f"A {parent.type} does not contain a {new.get('type')}")
        attributes = dict(checked_attributes(new))
        if not isinstance(attributes.get("content_type"), str):
            raise ApiError(400, "attributes.content_type is not a string")
        file, previous = self._place(parent)
        self.model.check_write(principal, file)
        remote = isinstance(attributes.get("url"), str)
        attributes |= {"file_id": file.id, "previous": previous}
        attributes |= {"upload-status": "complete", "remote": True} if remote else {"upload-status": "in-progress"}
        with self.model.records.transaction():
            revision = self.model.add(principal, file.organization, "Revision", attributes, file.roots)
            if not remote:
                revision.object_key = object_key(revision)
                self.model.records.save(revision)
            self._set_status(file, revision)
            self.model.save_change(file)
            relation = self.model.link(principal, file, "revisions", revision.id, "file")
            granted = {} if remote else self._grant(revision)
        return revision, relation, granted

    def complete(self, principal: Principal, revision: Entity) -> Entity:
        """Take the object's size and version from the store; 422 while there is no object."""
        self.model.check_write(principal, revision)
        if revision.object_key is not None:
            stored = self.store.stat(BUCKET, revision.object_key)
            if stored is None:
                raise ApiError(422, "The object has not been uploaded")
            revision.attributes |= {"content_length": stored.size, "version": stored.version}
        self._finish(revision, "complete")
        return revision

    def fail(self, principal: Principal, revision: Entity) -> tuple[Entity, Entity | None]:
        """Take note that the upload failed; return the Revision and its File."""
        self.model.check_write(principal, revision)
        return revision, self._finish(revision, "error")

    def download(self, revision: Entity, *, expired: bool = False) -> dict[str, Any]:
        """Return the presigned URL of the Revision's object, whether or not the object is there."""
        if revision.object_key is None:
            return {"url": revision.attributes.get("url"), "etag": None, "path": None}
        stored = self.store.stat(BUCKET, revision.object_key)
        lifetime = self.settings.presigned_seconds
        signed_at = self.settings.clock() - (lifetime + 60 if expired else 0)
        url = presign(self._reader(), "GET", self.s3_url, BUCKET, revision.object_key, signed_at, lifetime)
        etag = None if stored is None else stored.etag
        return {"url": url, "etag": etag, "path": f"{BUCKET}/{revision.object_key}"}

    def _place(self, parent: Entity) -> tuple[Entity, list[str]]:
        if parent.type == "File":
            heads = self.heads(parent)
            if len(heads) > 1:
                raise ApiError(409, "File has multiple head revisions")
            return parent, [*heads[0].attributes.get("previous", []), heads[0].id] if heads else []
        file = self.model.records.entity(str(parent.attributes.get("file_id")))
        if file is None:
            raise ApiError(400, "The Revision has no File")
        return file, [*parent.attributes.get("previous", []), parent.id]

    def _set_status(self, file: Entity, revision: Entity) -> None:
        started = file.revisions.get(revision.id, {}).get("started-at", revision.attributes["created-at"])
        file.revisions[revision.id] = {"status": revision.attributes["upload-status"], "started-at": started}

    def _finish(self, revision: Entity, status: str) -> Entity | None:
        revision.attributes["upload-status"] = status
        file = self.model.records.entity(str(revision.attributes.get("file_id")))
        if file is not None:
            self._set_status(file, revision)
        self.model.save_change(revision, *([file] if file else []))
        return file

    def _grant(self, revision: Entity) -> dict[str, Any]:
        expires_at = self.settings.clock() + self.settings.upload_credentials_seconds
        granted = self.new_credential(key=revision.object_key, expires_at=expires_at)
        return {
            "access_key_id": granted.access_key,
            "secret_access_key": granted.secret_key,
            "session_token": granted.session_token,
            "bucket": BUCKET,
            "key": revision.object_key,
        }

    def new_credential(self, *, key: str | None, expires_at: float | None) -> Credential:
        """Make temporary credentials for one object, or for the whole store without a key."""
        made = Credential(
            access_key="ASIA" + secrets.token_hex(8).upper(),
            secret_key=secrets.token_urlsafe(30),
            session_token=secrets.token_urlsafe(96),
            bucket=BUCKET if key is not None else None,
            key=key,
            expires_at=expires_at,
        )
        self.model.records.write(
            "INSERT INTO credentials VALUES (?, ?, ?, ?, ?, ?)",
            *(made.access_key, made.secret_key, made.session_token, made.bucket, made.key, made.expires_at),
        )
        return made

    def credential(self, access_key: str) -> Credential | None:
        """Return the credentials with that access key."""
        found = self.model.records.rows("SELECT * FROM credentials WHERE access_key = ?", access_key)
        return Credential(**dict(found[0])) if found else None

    def _reader(self) -> Credential:
        def make() -> str:
            return self.new_credential(key=None, expires_at=None).access_key

        found = self.credential(self.model.records.remembered("store_access_key", make))
        if found is None:
            raise LookupError("the store's own credentials are gone from the records")
        return found

    def store_credential(self) -> Credential:
        """Return credentials that may do everything in the store, for tests and tools."""
        return self._reader()


def object_key(revision: Entity) -> str:
    """Return where the Revision's bytes live; its last part is the name, for clients that name files after it."""
    name = str(revision.attributes["name"]).encode("utf-8", "replace").decode().replace("/", "_").replace("\0", "_")
    if name in {"", ".", ".."}:
        name = "_"
    return f"{revision.organization}/{revision.attributes['file_id']}/{revision.id}/{name}"
