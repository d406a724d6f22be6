"""What tests and the demo need done in Ovation without a person: users, Projects, and Revisions in every condition."""

from __future__ import annotations

import base64
import secrets
from typing import Any

from agent.sandbox.errors import not_found
from agent.sandbox.model import Model
from agent.sandbox.objects import ObjectStore, StoredObject
from agent.sandbox.outbox import WebhookOutbox, research_webhook
from agent.sandbox.records import Entity
from agent.sandbox.settings import BUCKET, REGION, SandboxSettings
from agent.sandbox.tokens import Principal, Tokens
from agent.sandbox.uploads import Uploads
from agent.sandbox.webhooks import WebhookSender

# what may be called from another process, through POST /_sandbox/admin/{name}
REMOTE = frozenset(
    {
        "create_user",
        "create_organization",
        "add_member",
        "create_project",
        "create_activity",
        "create_source",
        "create_revision",
        "in_progress_revision",
        "failed_revision",
        "old_revision",
        "missing_revision",
        "remote_revision",
        "second_head",
        "link",
        "unlink",
        "entity",
        "trash",
        "purge",
        "delete_object",
        "create_webhook",
        "delete_webhook",
        "emit_lab_event",
        "store_environment",
        "deliveries",
        "pending_deliveries",
    }
)


class Admin:
    """Every method takes and returns JSON (bytes apart), and entities are returned as the API shows them."""

    def __init__(
        self,
        model: Model,
        uploads: Uploads,
        store: ObjectStore,
        tokens: Tokens,
        outbox: WebhookOutbox,
        sender: WebhookSender,
        settings: SandboxSettings,
    ) -> None:
        self._model = model
        self._uploads = uploads
        self._store = store
        self._tokens = tokens
        self._outbox = outbox
        self._sender = sender
        self._settings = settings
        self.service = Principal(
            tokens.service_user_id, service=True, scopes=frozenset({"read:global", "write:global"})
        )

    def create_user(self, email: str, name: str = "") -> dict[str, Any]:
        """Return the person with that address, made if need be: id and a token."""
        user = self._model.records.user_by_email(email)
        if user is None:
            attributes = {"email": email, "name": name or email.partition("@")[0]}
            user = self._model.add(self.service, 0, "User", attributes, [])
        token = self._tokens.for_user(user.id, email, self._settings.token_seconds)
        return {"id": user.id, "token": token}

    def principal(self, email: str | None) -> Principal:
        """Return the caller that a person's token stands for; the service account without an address."""
        return self.service if email is None else Principal(self.create_user(email)["id"], service=False)

    def create_organization(self, name: str) -> dict[str, Any]:
        """Return a new organization's id and name."""
        with self._model.records.transaction():
            self._model.records.write("INSERT INTO organizations (name) VALUES (?)", name)
            organization = self._model.records.rows("SELECT last_insert_rowid()")[0][0]
        return {"id": int(organization), "name": name}

    def add_member(self, project_id: str, email: str, role: str = "member") -> None:
        """Give a person access to a Project: `member` reads and writes, `reader` only reads."""
        self._model.set_member(project_id, str(self.create_user(email)["id"]), role)

    def create_project(self, name: str, organization: int = 0, owner: str | None = None) -> dict[str, Any]:
        """Return a new Project; `owner` is a person's address."""
        return self._shown(self._model.add(self.principal(owner), organization, "Project", {"name": name}, []))

    def create_activity(
        self,
        project_id: str,
        name: str,
        inputs: list[str] | None = None,
        related: list[str] | None = None,
        owner: str | None = None,
    ) -> dict[str, Any]:
        """Return a new Activity of the Project with those inputs and related files."""
        project = self._entity(project_id)
        new = {"type": "Activity", "attributes": {"name": name}}
        with self._model.records.transaction():
            activity, _ = self._model.add_child(self.principal(owner), project, new)
            for one in inputs or []:
                self._model.link(self.service, activity, "inputs", one, "activities")
            for one in related or []:
                self._model.link(self.service, activity, "actions", one, "procedures")
        return self._shown(activity)

    def create_source(
        self, name: str, attributes: dict[str, Any] | None = None, project_id: str = ""
    ) -> dict[str, Any]:
        """Return a new Source, seen by the Project's members when one is given."""
        roots = [project_id] if project_id else []
        organization = self._entity(project_id).organization if project_id else 0
        named = {**(attributes or {}), "name": name}
        return self._shown(self._model.add(self.service, organization, "Source", named, roots))

    def create_revision(
        self,
        parent_id: str,
        name: str,
        content: bytes | str = b"",
        content_type: str = "application/octet-stream",
        content_base64: str = "",
    ) -> dict[str, Any]:
        """Return a complete Revision with those bytes, of a new File under a Project or Folder, or of a File."""
        revision = self._new_revision(parent_id, {"name": name, "content_type": content_type})
        data = content.encode() if isinstance(content, str) else content
        self._write(revision, base64.b64decode(content_base64) if content_base64 else data)
        return self._shown(self._uploads.complete(self.service, revision))

    def in_progress_revision(self, parent_id: str, name: str) -> dict[str, Any]:
        """Return a Revision whose upload never ends."""
        return self._shown(self._new_revision(parent_id, {"name": name, "content_type": "text/plain"}))

    def failed_revision(self, parent_id: str, name: str) -> dict[str, Any]:
        """Return a Revision whose upload failed."""
        revision = self._new_revision(parent_id, {"name": name, "content_type": "text/plain"})
        return self._shown(self._uploads.fail(self.service, revision)[0])

    def old_revision(self, parent_id: str, name: str, content: str = "old") -> dict[str, Any]:
        """Return a Revision from before there was an upload-status; it is complete."""
        made = self._entity(self.create_revision(parent_id, name, content)["_id"])
        for attribute in ("upload-status", "content_length", "version"):
            del made.attributes[attribute]
        self._model.records.save(made)
        return self._shown(made)

    def missing_revision(self, parent_id: str, name: str) -> dict[str, Any]:
        """Return a complete Revision whose object is not in the store."""
        made = self.create_revision(parent_id, name, "gone")
        self.delete_object(made["_id"])
        return made

    def remote_revision(
        self, parent_id: str, name: str, url: str, content_type: str = "application/octet-stream"
    ) -> dict[str, Any]:
        """Return a Revision whose bytes are at an address elsewhere."""
        return self._shown(self._new_revision(parent_id, {"name": name, "content_type": content_type, "url": url}))

    def second_head(self, file_id: str, content: str = "another") -> dict[str, Any]:
        """Return a further head of a File that has a Revision; from then on the File takes no more of them (409)."""
        head = self._uploads.heads(self._entity(file_id))[0]
        made = self._entity(self.create_revision(file_id, str(head.attributes["name"]), content)["_id"])
        made.attributes["previous"] = head.attributes["previous"]
        self._model.records.save(made)
        return self._shown(made)

    def link(self, source_id: str, rel: str, target_id: str, inverse_rel: str | None = None) -> str:
        """Make a link from either end; return its id."""
        return self._model.link(self.service, self._entity(source_id), rel, target_id, inverse_rel).id

    def unlink(self, relation_id: str, organization: int = 0) -> None:
        """Delete a link."""
        relation = self._model.records.relation(organization, relation_id)
        if relation is None:
            raise not_found()
        self._model.unlink(self.service, relation)

    def entity(self, entity_id: str) -> dict[str, Any]:
        """Return any entity, trashed or not."""
        return self._shown(self._entity(entity_id))

    def trash(self, entity_id: str) -> dict[str, Any]:
        """Put an entity in the trash; for webhooks that is an update."""
        return self._shown(self._model.trash(self.service, self._entity(entity_id)))

    def purge(self, entity_id: str) -> None:
        """Delete an entity for good; for webhooks that is a deletion."""
        entity = self._entity(entity_id)
        with self._model.records.transaction():
            self._model.records.erase(entity_id)
            self._outbox.changed("deleted", self._shown(entity))

    def delete_object(self, revision_id: str) -> None:
        """Take a Revision's bytes out of the store."""
        self._store.delete(BUCKET, str(self._entity(revision_id).object_key))

    def create_webhook(self, url: str, trigger_type: str = "Relation", **options: Any) -> str:
        """Add a research webhook; options as in `research_webhook`. Return its id."""
        return self._outbox.subscribe(research_webhook(url, trigger_type, **options))

    def delete_webhook(self, webhook_id: str) -> None:
        """Delete a webhook of either generation; what is on its way still goes."""
        self._model.records.write("DELETE FROM webhooks WHERE id = ?", webhook_id)

    def emit_lab_event(self, template_id: str, event: str, body: dict[str, Any]) -> None:
        """Send an event of the lab's own."""
        self._outbox.emit(template_id, event, body)

    def deliveries(self) -> list[dict[str, Any]]:
        """Return every webhook attempt, oldest first."""
        return self._sender.log()

    def pending_deliveries(self) -> int:
        """Return how many webhooks are still to be delivered."""
        return self._sender.pending()

    def store_environment(self) -> dict[str, str]:
        """Return the environment in which AWS tools may do everything in the store."""
        credential = self._uploads.store_credential()
        return {
            "AWS_ACCESS_KEY_ID": credential.access_key,
            "AWS_SECRET_ACCESS_KEY": credential.secret_key,
            "AWS_SESSION_TOKEN": credential.session_token,
            "AWS_ENDPOINT_URL_S3": self._uploads.s3_url,
            "AWS_DEFAULT_REGION": REGION,
        }

    def _entity(self, entity_id: str) -> Entity:
        found = self._model.records.entity(entity_id)
        if found is None:
            raise not_found()
        return found

    def _shown(self, entity: Entity) -> dict[str, Any]:
        return self._model.document(self._entity_now(entity))

    def _entity_now(self, entity: Entity) -> Entity:
        return self._model.records.entity(entity.id) or entity

    def _new_revision(self, parent_id: str, attributes: dict[str, Any]) -> Entity:
        parent = self._entity(parent_id)
        if parent.type != "File":
            new = {"type": "File", "attributes": {"name": attributes["name"]}}
            parent, _ = self._model.add_child(self.service, parent, new)
        revision, _, _ = self._uploads.create(self.service, parent, {"type": "Revision", "attributes": attributes})
        return self._entity(revision.id)

    def _write(self, revision: Entity, content: bytes) -> None:
        with self._store.writer() as writer:
            writer.write(content)
            blob = writer.finish()
        headers = {"content-type": revision.attributes["content_type"], "x-amz-server-side-encryption": "AES256"}
        self._store.put(
            StoredObject(
                bucket=BUCKET,
                key=str(revision.object_key),
                etag=blob.md5,
                size=blob.size,
                version=secrets.token_urlsafe(24),
                modified=self._settings.clock(),
                headers=headers,
                checksums={},
                blobs=(blob,),
            )
        )
