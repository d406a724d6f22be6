"""The sandbox's durable memory: one SQLite file, written in transactions that survive a kill of the process."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS organizations (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entities (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, organization INTEGER NOT NULL,
    type TEXT NOT NULL, owner TEXT NOT NULL, email TEXT UNIQUE, document TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS entities_by_type ON entities (organization, type);
CREATE TABLE IF NOT EXISTS relations (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, organization INTEGER NOT NULL,
    source_id TEXT NOT NULL, rel TEXT NOT NULL, target_id TEXT NOT NULL, inverse_rel TEXT, user_id TEXT NOT NULL,
    UNIQUE (organization, id));
CREATE INDEX IF NOT EXISTS relations_by_source ON relations (source_id, rel);
CREATE INDEX IF NOT EXISTS relations_by_target ON relations (target_id, inverse_rel);
CREATE TABLE IF NOT EXISTS annotations (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, entity_id TEXT NOT NULL,
    user_id TEXT NOT NULL, type TEXT NOT NULL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS annotations_by_entity ON annotations (entity_id, type);
CREATE TABLE IF NOT EXISTS members (
    project_id TEXT NOT NULL, user_id TEXT NOT NULL, role TEXT NOT NULL, PRIMARY KEY (project_id, user_id));
CREATE TABLE IF NOT EXISTS credentials (
    access_key TEXT PRIMARY KEY, secret_key TEXT NOT NULL, session_token TEXT NOT NULL,
    bucket TEXT, key TEXT, expires_at REAL);
CREATE TABLE IF NOT EXISTS webhooks (
    id TEXT PRIMARY KEY, generation TEXT NOT NULL, template_id TEXT, document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, webhook_id TEXT NOT NULL, generation TEXT NOT NULL, method TEXT NOT NULL,
    url TEXT NOT NULL, headers TEXT NOT NULL, username TEXT, password TEXT, body TEXT NOT NULL,
    state TEXT NOT NULL, attempt INTEGER NOT NULL, due_at REAL NOT NULL, created_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (state, due_at);
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, delivery_id INTEGER NOT NULL, attempt INTEGER NOT NULL,
    started_at REAL NOT NULL, seconds REAL NOT NULL, status INTEGER, error TEXT);
"""


@dataclass(slots=True)
class Entity:
    """One document of the research database, as it is kept."""

    id: str
    organization: int
    type: str
    owner: str
    attributes: dict[str, Any] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)
    trash_info: dict[str, str] | None = None
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    object_key: str | None = None


@dataclass(frozen=True, slots=True)
class Relation:
    """One link document."""

    organization: int
    source_id: str
    rel: str
    target_id: str
    inverse_rel: str | None
    user_id: str

    @property
    def id(self) -> str:
        """Derived from source, rel and target, so that one link has one document."""
        return f"{self.source_id}--{self.rel}-->{self.target_id}"


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open the SQLite file and make its tables; commits survive a kill of the process."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(schema)
    return connection


class Records:
    """Entities, relations and members, and the transactions that everything else is written in."""

    def __init__(self, path: Path) -> None:
        self.connection = open_database(path, SCHEMA)
        self.after_commit: Callable[[], None] = lambda: None
        self.connection.execute("INSERT OR IGNORE INTO organizations VALUES (0, 'Personal Projects')")

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what is written inside, or nothing; then tell whoever waits for commits. Joins an outer one."""
        if self.connection.in_transaction:
            yield
            return
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")
        self.after_commit()

    def rows(self, query: str, *parameters: Any) -> list[sqlite3.Row]:
        """Return all rows of a query."""
        return self.connection.execute(query, parameters).fetchall()

    def write(self, statement: str, *parameters: Any) -> int:
        """Execute one statement; return how many rows it touched."""
        with self.transaction():
            return self.connection.execute(statement, parameters).rowcount

    def remembered(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(32)) -> str:
        """Return a value that is made once and kept, such as a secret."""
        for row in self.rows("SELECT value FROM meta WHERE name = ?", name):
            return str(row["value"])
        value = make()
        self.write("INSERT INTO meta VALUES (?, ?)", name, value)
        return value

    def entity(self, entity_id: str) -> Entity | None:
        """Return the entity, trashed or not."""
        found = self.rows("SELECT * FROM entities WHERE id = ?", entity_id)
        return _entity(found[0]) if found else None

    def entities_of_type(self, organization: int, type_: str) -> list[Entity]:
        """Return an organization's entities of one type, oldest first."""
        query = "SELECT * FROM entities WHERE organization = ? AND type = ? ORDER BY sequence"
        return [_entity(row) for row in self.rows(query, organization, type_)]

    def save(self, entity: Entity) -> None:
        """Write the entity as it now is."""
        document = json.dumps(
            {
                "attributes": entity.attributes,
                "roots": entity.roots,
                "trash_info": entity.trash_info,
                "revisions": entity.revisions,
                "object_key": entity.object_key,
            }
        )
        email = entity.attributes.get("email") if entity.type == "User" else None
        self.write(
            "INSERT INTO entities (id, organization, type, owner, email, document) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET document = excluded.document",
            *(entity.id, entity.organization, entity.type, entity.owner, email, document),
        )

    def erase(self, entity_id: str) -> None:
        """Delete the entity, its links and its annotations for good."""
        with self.transaction():
            self.write("DELETE FROM entities WHERE id = ?", entity_id)
            self.write("DELETE FROM relations WHERE source_id = ? OR target_id = ?", entity_id, entity_id)
            self.write("DELETE FROM annotations WHERE entity_id = ?", entity_id)

    def user_by_email(self, email: str) -> Entity | None:
        """Return the User with that address."""
        found = self.rows("SELECT * FROM entities WHERE email = ?", email)
        return _entity(found[0]) if found else None

    def add_relation(self, relation: Relation) -> bool:
        """Write the link; say whether it is new."""
        return bool(
            self.write(
                "INSERT OR IGNORE INTO relations (id, organization, source_id, rel, target_id, inverse_rel, user_id)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                *(relation.id, relation.organization, relation.source_id, relation.rel),
                *(relation.target_id, relation.inverse_rel, relation.user_id),
            )
        )

    def relation(self, organization: int, relation_id: str) -> Relation | None:
        """Return one link document."""
        query = "SELECT * FROM relations WHERE organization = ? AND id = ?"
        found = self.rows(query, organization, relation_id)
        return _relation(found[0]) if found else None

    def relations(self, entity_id: str, rel: str) -> list[Relation]:
        """Return the links that the entity has under `rel`, whichever end they were made from, oldest first."""
        query = (
            "SELECT * FROM relations WHERE (source_id = ? AND rel = ?) OR (target_id = ? AND inverse_rel = ?)"
            " ORDER BY sequence"
        )
        return [_relation(row) for row in self.rows(query, entity_id, rel, entity_id, rel)]

    def related(self, entity_id: str, rel: str) -> list[Entity]:
        """Return the entities at the other ends of those links, each once, oldest link first."""
        ends = (
            link.target_id if link.source_id == entity_id and link.rel == rel else link.source_id
            for link in self.relations(entity_id, rel)
        )
        return [found for end in dict.fromkeys(ends) if (found := self.entity(end)) is not None]

    def annotations(self, entity_id: str, types: tuple[str, ...]) -> list[tuple[str, str, str, dict[str, Any]]]:
        """Return an entity's annotations, oldest first: id, user, type, body."""
        query = "SELECT * FROM annotations WHERE entity_id = ? ORDER BY sequence"
        rows = [row for row in self.rows(query, entity_id) if row["type"] in types]
        return [(row["id"], row["user_id"], row["type"], json.loads(row["body"])) for row in rows]

    def role(self, project_ids: list[str], user_id: str) -> str | None:
        """Return what the user is in any of the Projects: `member`, `reader` or nothing."""
        marks = ",".join("?" * len(project_ids))
        query = f"SELECT role FROM members WHERE user_id = ? AND project_id IN ({marks}) ORDER BY role"  # noqa: S608 - only question marks are inserted
        found = self.rows(query, user_id, *project_ids)
        return str(found[0]["role"]) if found else None


def _entity(row: sqlite3.Row) -> Entity:
    return Entity(row["id"], row["organization"], row["type"], row["owner"], **json.loads(row["document"]))


def _relation(row: sqlite3.Row) -> Relation:
    return Relation(
        *(row["organization"], row["source_id"], row["rel"], row["target_id"], row["inverse_rel"], row["user_id"])
    )
