"""The objects on disk. An object is a list of immutable files, one for each part that it was uploaded in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.sandbox.records import open_database

SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    bucket TEXT NOT NULL, key TEXT NOT NULL, document TEXT NOT NULL, PRIMARY KEY (bucket, key));
CREATE TABLE IF NOT EXISTS uploads (
    id TEXT PRIMARY KEY, bucket TEXT NOT NULL, key TEXT NOT NULL, initiated REAL NOT NULL,
    headers TEXT NOT NULL, completed TEXT);
CREATE TABLE IF NOT EXISTS parts (
    upload_id TEXT NOT NULL, number INTEGER NOT NULL, document TEXT NOT NULL, PRIMARY KEY (upload_id, number));
"""


@dataclass(frozen=True, slots=True)
class Blob:
    """One immutable file of bytes; `md5` in hexadecimal."""

    file: str
    size: int
    md5: str


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a multipart upload."""

    number: int
    blob: Blob
    modified: float
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Upload:
    """One multipart upload; `completed` is the ETag of the object that it became."""

    id: str
    bucket: str
    key: str
    initiated: float
    headers: dict[str, str]
    completed: str | None


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object: its bytes are those of `blobs`, one after the other. `etag` is without quotes."""

    bucket: str
    key: str
    etag: str
    size: int
    version: str
    modified: float
    headers: dict[str, str]
    checksums: dict[str, str]
    blobs: tuple[Blob, ...]


class BlobWriter:
    """Takes bytes into a `.part` file; `finish` makes it a blob, anything else leaves nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_suffix(".part")
        self._file = self._partial.open("wb", buffering=1024 * 1024)
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Append bytes."""
        self.store(chunk)
        self.digest(chunk)

    def store(self, chunk: bytes | bytearray) -> None:
        """Append bytes to the file alone: `digest` must see them too, before or after or at the same time."""
        self._file.write(chunk)
        self.size += len(chunk)

    def digest(self, chunk: bytes | bytearray) -> None:
        """Let the MD5 see bytes."""
        self._md5.update(chunk)

    @property
    def md5(self) -> bytes:
        """The MD5 of what was written so far."""
        return self._md5.digest()

    def finish(self) -> Blob:
        """Give the file its name; from here on it is complete and never changes."""
        self._file.close()
        self._partial.rename(self._path)
        return Blob(self._path.name, self.size, self._md5.hexdigest())


class ObjectStore:
    """Objects and multipart uploads. Survives a kill: bytes get their name first, then the row is written."""

    def __init__(self, directory: Path) -> None:
        self._blobs = directory / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._database = open_database(directory / "objects.sqlite", SCHEMA)
        self._sweep()

    def close(self) -> None:
        """Close the index."""
        self._database.close()

    def writer(self) -> BlobWriter:
        """Return a place for new bytes."""
        name = secrets.token_hex(16)
        directory = self._blobs / name[:2]
        directory.mkdir(exist_ok=True)
        return BlobWriter(directory / name)

    def path(self, blob: Blob) -> Path:
        """Return the blob's file."""
        return self._blobs / blob.file[:2] / blob.file

    def stat(self, bucket: str, key: str) -> StoredObject | None:
        """Return the object, None without one."""
        found = self._rows("SELECT document FROM objects WHERE bucket = ? AND key = ?", bucket, key)
        return _object(found[0]["document"]) if found else None

    def put(self, new: StoredObject) -> None:
        """Make the object visible in place of what was there."""
        old = self.stat(new.bucket, new.key)
        self._database.execute(
            "INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", (new.bucket, new.key, json.dumps(asdict(new)))
        )
        if old is not None:
            self.discard(old.blobs)

    def delete(self, bucket: str, key: str) -> None:
        """Delete the object if it is there."""
        old = self.stat(bucket, key)
        if old is not None:
            self._database.execute("DELETE FROM objects WHERE bucket = ? AND key = ?", (bucket, key))
            self.discard(old.blobs)

    def keys(self, bucket: str, prefix: str, after: str) -> Iterator[StoredObject]:
        """Return the objects whose key begins with `prefix` and sorts after `after`, in the order of S3."""
        start = max(prefix, after)
        query = "SELECT key, document FROM objects WHERE bucket = ? AND key >= ? ORDER BY key"
        for row in self._database.execute(query, (bucket, start)):
            if not row["key"].startswith(prefix):
                return
            if row["key"] > after or not after:
                yield _object(row["document"])

    def discard(self, blobs: Iterable[Blob]) -> None:
        """Delete files that nothing refers to any more; whoever reads them now reads on."""
        for blob in blobs:
            self.path(blob).unlink(missing_ok=True)

    def begin_upload(self, bucket: str, key: str, headers: dict[str, str], now: float) -> Upload:
        """Start a multipart upload."""
        upload = Upload(secrets.token_urlsafe(32), bucket, key, now, headers, None)
        self._database.execute(
            "INSERT INTO uploads VALUES (?, ?, ?, ?, ?, NULL)", (upload.id, bucket, key, now, json.dumps(headers))
        )
        return upload

    def upload(self, upload_id: str) -> Upload | None:
        """Return a multipart upload, completed or not."""
        found = self._rows("SELECT * FROM uploads WHERE id = ?", upload_id)
        return _upload(found[0]) if found else None

    def uploads(self, bucket: str, prefix: str) -> list[Upload]:
        """Return the multipart uploads that are under way, by key."""
        query = "SELECT * FROM uploads WHERE bucket = ? AND completed IS NULL ORDER BY key, initiated"
        return [_upload(row) for row in self._rows(query, bucket) if row["key"].startswith(prefix)]

    def add_part(self, upload_id: str, part: Part) -> None:
        """Write a part in place of any earlier one of that number."""
        old = self._rows("SELECT document FROM parts WHERE upload_id = ? AND number = ?", upload_id, part.number)
        self._database.execute(
            "INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", (upload_id, part.number, json.dumps(asdict(part)))
        )
        self.discard(_part(row["document"]).blob for row in old)

    def parts(self, upload_id: str) -> list[Part]:
        """Return an upload's parts by number."""
        query = "SELECT document FROM parts WHERE upload_id = ? ORDER BY number"
        return [_part(row["document"]) for row in self._rows(query, upload_id)]

    def finish_upload(self, upload: Upload, new: StoredObject) -> None:
        """Make the upload's parts the object, at once; parts that were left out are deleted."""
        kept = {blob.file for blob in new.blobs}
        left_out = [part.blob for part in self.parts(upload.id) if part.blob.file not in kept]
        with self._transaction():
            self.put(new)
            self._database.execute("UPDATE uploads SET completed = ? WHERE id = ?", (new.etag, upload.id))
            self._database.execute("DELETE FROM parts WHERE upload_id = ?", (upload.id,))
        self.discard(left_out)

    def abort_upload(self, upload: Upload) -> None:
        """Forget the upload and its parts."""
        parts = self.parts(upload.id)
        with self._transaction():
            self._database.execute("DELETE FROM parts WHERE upload_id = ?", (upload.id,))
            self._database.execute("DELETE FROM uploads WHERE id = ?", (upload.id,))
        self.discard(part.blob for part in parts)

    def _rows(self, query: str, *parameters: Any) -> list[sqlite3.Row]:
        return self._database.execute(query, parameters).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _sweep(self) -> None:
        # a killed sandbox leaves half-written files, and whole ones whose row was not written
        known = {blob.file for row in self._rows("SELECT document FROM objects") for blob in _object(row[0]).blobs}
        known |= {_part(row[0]).blob.file for row in self._rows("SELECT document FROM parts")}
        for found in self._blobs.glob("*/*"):
            if found.name not in known:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(found)  # noqa: PTH108 - the path is ours, and there may be very many


def _object(document: str) -> StoredObject:
    fields = json.loads(document)
    return StoredObject(**(fields | {"blobs": tuple(Blob(**blob) for blob in fields["blobs"])}))


def _part(document: str) -> Part:
    fields = json.loads(document)
    return Part(**(fields | {"blob": Blob(**fields["blob"])}))


def _upload(row: sqlite3.Row) -> Upload:
    return Upload(
        *(row["id"], row["bucket"], row["key"], row["initiated"], json.loads(row["headers"]), row["completed"])
    )
