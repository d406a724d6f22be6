"""Which changes interest which webhooks, and what is to be sent of them (ovation-api.md section 7).

A change and the deliveries that it causes are written in one transaction, so that none is lost and none is sent
before its time.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any
from urllib.parse import quote

from agent.sandbox.faults import FaultBook, FaultKind
from agent.sandbox.records import Records
from agent.sandbox.settings import Clock

RELATION_MAPPING = {
    "rel": "rel",
    "inverse_rel": "inverse_rel",
    "user_id": "owner_id",
    "source_id": "entity_id",
    "target_id": "target_id",
}
"""What a Relation becomes where the webhook names no mapping: the document's field, and what the body calls it."""

_FIELD = re.compile(r":([A-Za-z_]\w*)")


class WebhookOutbox:
    """Writes a delivery for each webhook that a change interests."""

    def __init__(self, records: Records, faults: FaultBook, clock: Clock) -> None:
        self.records = records
        self.faults = faults
        self.clock = clock

    def subscribe(self, document: dict[str, Any]) -> str:
        """Keep a research webhook; return its id. See `research_webhook` for the document."""
        webhook_id = str(uuid.uuid4())
        self.records.write("INSERT INTO webhooks VALUES (?, 'research', NULL, ?)", webhook_id, json.dumps(document))
        return webhook_id

    def changed(self, action: str, document: dict[str, Any]) -> None:
        """Take note of a change: `created`, `updated` or `deleted`."""
        for row in self.records.rows("SELECT * FROM webhooks ORDER BY rowid"):
            webhook = json.loads(row["document"])
            if row["generation"] == "research":
                body = _mapped(webhook, document)
                if _interested(webhook, document, body):
                    url = substituted(webhook["url"], document)
                    self._enqueue_research(row["id"], webhook, action, url, body)
            else:
                for event, notice in self._notices(action, document):
                    if webhook["event"] == event:
                        self._enqueue_lab(row["id"], webhook, notice)

    def emit(self, template_id: str, event: str, body: dict[str, Any]) -> None:
        """Send an event of the lab's own to the template's subscriptions."""
        with self.records.transaction():
            for row in self.records.rows("SELECT * FROM webhooks WHERE template_id = ?", template_id):
                webhook = json.loads(row["document"])
                if webhook["event"] == event:
                    self._enqueue_lab(row["id"], webhook, {"event": event, **body})

    def _notices(self, action: str, document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Return the lab events of a change; a link is news of the Activity that it belongs to."""
        if document["type"] == "Annotation":
            return []
        if document["type"] != "Relation":
            subjects = [(document["_id"], document["type"], action)]
        else:
            ends = (self.records.entity(document[end]) for end in ("source_id", "target_id"))
            subjects = [(one.id, "Activity", "updated") for one in ends if one is not None and one.type == "Activity"]
        notices = []
        for subject_id, type_, what in subjects:
            event = f"{type_.lower()}.{what}"
            body = {"event": event, "id": subject_id, "type": type_, "organization": document["organization_id"]}
            notices.append((event, body))
        return notices

    def _enqueue_research(
        self, webhook_id: str, webhook: dict[str, Any], action: str, url: str, body: dict[str, Any]
    ) -> None:
        key = webhook.get("api_key")
        method = "DELETE" if action == "deleted" else "POST"
        self._enqueue(webhook_id, "research", method, url, {}, (key, key), body)

    def _enqueue_lab(self, webhook_id: str, webhook: dict[str, Any], body: dict[str, Any]) -> None:
        credentials = (webhook.get("username"), webhook.get("password"))
        headers = webhook.get("requestHeaders") or {}
        self._enqueue(webhook_id, "lab", "POST", webhook["target_url"], headers, credentials, body)

    def _enqueue(
        self,
        webhook_id: str,
        generation: str,
        method: str,
        url: str,
        headers: dict[str, str],
        credentials: tuple[str | None, str | None],
        body: dict[str, Any],
    ) -> None:
        now = due_at = self.clock()
        copies = 1
        fault = self.faults.match("webhooks", method, url)
        if fault is not None:
            copies = {FaultKind.DROP: 0, FaultKind.DUPLICATE: 2}.get(fault.kind, 1)
            due_at += fault.seconds or 0 if fault.kind is FaultKind.LATENCY else 0
        for _ in range(copies):
            self.records.write(
                "INSERT INTO deliveries (webhook_id, generation, method, url, headers, username, password, body, state,"
                " attempt, due_at, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'pending', 0, ?, ?)",
                *(webhook_id, generation, method, url, json.dumps(headers), *credentials, json.dumps(body)),
                *(due_at, now),
            )


def research_webhook(
    url: str,
    trigger_type: str = "Relation",
    *,
    api_key: str | None = None,
    filter_: list[tuple[str, str]] | None = None,
    mapping: dict[str, str] | None = None,
    organization: int | None = None,
) -> dict[str, Any]:
    """Return the document of a research webhook.

    `mapping` names fields of the changed document (dots lead into it) and what the body calls each. `filter_` pairs a
    field of the body with a regular expression that its whole value must match.
    """
    return {
        "url": url,
        "trigger_type": trigger_type,
        "api_key": api_key,
        "filter": filter_ or [],
        "mapping": mapping,
        "organization": organization,
    }


def substituted(url: str, document: dict[str, Any]) -> str:
    """Replace each `:field` in the URL's path by the document's field; a port stays what it is."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    filled = _FIELD.sub(lambda found: _value(document, found), path)
    return f"{scheme}{separator}{host}{slash}{filled}"


def _value(document: dict[str, Any], found: re.Match[str]) -> str:
    value = document.get(found[1])
    return found[0] if value is None else quote(str(value), safe="")


def _mapped(webhook: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    mapping = webhook.get("mapping")
    if mapping is None and document["type"] == "Relation":
        mapping = RELATION_MAPPING
    return document if mapping is None else {name: _field(document, field) for field, name in mapping.items()}


def _interested(webhook: dict[str, Any], document: dict[str, Any], body: dict[str, Any]) -> bool:
    if webhook["trigger_type"] != document["type"]:
        return False
    if webhook["organization"] not in {None, document.get("organization_id")}:
        return False
    return all(
        (value := _field(body, name)) is not None and re.fullmatch(pattern, str(value)) is not None
        for name, pattern in webhook["filter"]
    )


def _field(document: dict[str, Any], path: str) -> Any:
    found: Any = document
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
