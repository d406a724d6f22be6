"""One file's bytes into Ovation: a Revision of its File, the upload, and what both sides say arrived.

A Revision's upload is gone on with by whichever process comes next, for as long as its credentials are good. When they
are not, or other bytes arrived than were sent, that Revision is marked failed and the File gets another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from agent.adapters import documents
from agent.adapters.multipart import Parts
from agent.adapters.ovation import Ovation
from agent.adapters.upload import Uploader, content_type, goes_in_parts, part_bytes
from agent.db.outputs import Output
from agent.domain.activity import Upload
from agent.errors import OvationNotFound, StorageExpired, StorageMismatch
from agent.pipeline.progress import Progress
from agent.pipeline.under_way import UnderWay, UploadsUnderWay

_REVISIONS_MOST = 3  # of one File in one try of the step: credentials may expire in the middle of a large upload
_READ_BYTES = 1 << 20


@dataclass(slots=True)
class _Try:
    """One Revision that is to get the bytes."""

    output: Output
    revision: Mapping[str, Any]
    under_way: UnderWay
    is_new: bool  # made just now; else an earlier process, or try of the step, has begun with it
    can_go_on: bool  # what it takes to go on with it is on the disk
    sent: int = 0  # bytes that the store has taken


class Transfers:
    """Brings the files of one job to Ovation."""

    def __init__(
        self,
        organization: int,
        ovation: Ovation,
        uploader: Uploader,
        uploads: UploadsUnderWay,
        progress: Progress,
        save: Callable[[Output], Awaitable[None]],
    ) -> None:
        self._organization = organization
        self._ovation = ovation
        self._uploader = uploader
        self._uploads = uploads
        self._progress = progress
        self._save = save

    async def there(self, entity_id: str) -> dict[str, Any] | None:
        """Return an entity, or nothing when somebody took it away."""
        try:
            return await self._ovation.entity(self._organization, entity_id)
        except OvationNotFound:
            return None

    async def bring(self, output: Output, file: Mapping[str, Any], descriptor: int) -> Output:
        """Bring an open file's bytes to a Revision of `file`, and return the record of it, which is written.

        Raises:
            OvationError, StorageError: see `agent.errors`; what was done by then is on record.
        """
        size = os.fstat(descriptor).st_size
        under_way = await self._uploads.read(output)
        if under_way is not None:
            output = replace(output, revision_id=under_way.revision_id)
        await self._fail_strays(file, output.revision_id)
        revision = None if output.revision_id is None else await self.there(output.revision_id)
        if revision is not None and _status(revision) is Upload.COMPLETE and _length(revision) == size:
            sha256 = await asyncio.to_thread(_sha256, descriptor)  # only the answer, or the record, was lost
            return await self._arrived(replace(output, size=size), sha256)
        attempt = None
        if under_way and revision and under_way.size == size and _status(revision) is Upload.IN_PROGRESS:
            attempt = _Try(replace(output, size=size), revision, under_way, is_new=False, can_go_on=True)
        else:
            await self._give_up(output, revision, under_way)
        for _ in range(_REVISIONS_MOST):
            if attempt is None:
                attempt = await self._new(output, file, size)
            try:
                return await self._send(attempt, descriptor)
            except StorageMismatch:
                await self._give_up(attempt.output, attempt.revision, attempt.under_way)
                raise
            except StorageExpired as error:
                # New ones that never were good are another matter: more of them would leave failed Revisions, no more.
                if attempt.is_new and not attempt.sent:
                    raise
                refused = error
            await self._give_up(attempt.output, attempt.revision, attempt.under_way)
            attempt = None
        raise refused

    async def forget(self, output: Output) -> None:
        """Give up what was begun for an output that cannot be brought any more."""
        under_way = await self._uploads.read(output)
        revision_id = output.revision_id if under_way is None else under_way.revision_id
        revision = None if revision_id is None else await self.there(revision_id)
        await self._give_up(output, revision, under_way)

    async def _new(self, output: Output, file: Mapping[str, Any], size: int) -> _Try:
        name = output.path.rpartition("/")[2]
        revision, credentials = await self._ovation.create_revision(file, name, content_type(name))
        length = part_bytes(size) if goes_in_parts(size) else None
        under_way = UnderWay(documents.identifier(revision), size, length, credentials)
        output = replace(output, revision_id=under_way.revision_id, size=size)
        await self._save(output)  # first, because it fails when the job is another's by now
        is_kept = await self._uploads.try_write(output, under_way)
        return _Try(output, revision, under_way, is_new=True, can_go_on=is_kept)

    async def _send(self, attempt: _Try, descriptor: int) -> Output:
        """Upload, have both sides confirm, and record it."""
        output, under_way = attempt.output, attempt.under_way

        def sent(count: int) -> None:
            attempt.sent += count
            self._progress.add_bytes(count)

        async def keep(upload_id: str) -> None:
            attempt.under_way = replace(under_way, upload_id=upload_id)
            await self._uploads.write(output, attempt.under_way)

        parts = None
        if under_way.part_bytes is not None and attempt.can_go_on:
            parts = Parts(under_way.part_bytes, under_way.upload_id, keep, attempt.is_new)
        kind = content_type(output.path.rpartition("/")[2])
        try:
            sha256 = await self._uploader.upload(
                descriptor, under_way.size, under_way.credentials, kind, sent, parts=parts
            )
            _check_length(output, await self._ovation.upload_complete(attempt.revision))
        except BaseException:
            self._progress.add_bytes(-attempt.sent)
            raise
        return await self._arrived(output, sha256)

    async def _arrived(self, output: Output, sha256: str) -> Output:
        output = replace(output, sha256=sha256, uploaded=True)
        await self._save(output)
        await self._uploads.remove(output)
        return output

    async def _give_up(self, output: Output, revision: Mapping[str, Any] | None, under_way: UnderWay | None) -> None:
        """Leave nothing of an upload behind: no parts in the store, and no Revision that still waits for bytes."""
        if under_way is not None and under_way.part_bytes is not None:
            await self._uploader.abort(under_way.credentials, under_way.upload_id)
        if revision is not None and _status(revision) is not Upload.ERROR:
            await self._fail(revision)
        if under_way is not None:
            await self._uploads.remove(output)

    async def _fail(self, revision: Mapping[str, Any]) -> None:
        with suppress(OvationNotFound):
            await self._ovation.upload_failed(revision)

    async def _fail_strays(self, file: Mapping[str, Any], current: str | None) -> None:
        """Mark Revisions as failed that were made while nobody was left to hear of it: nothing will ever fill them."""
        listed = file.get("revisions")
        for revision_id, state in listed.items() if isinstance(listed, dict) else ():
            waits = isinstance(state, dict) and state.get("status") == Upload.IN_PROGRESS
            if waits and revision_id != current and (revision := await self.there(revision_id)):
                await self._fail(revision)


def _status(revision: Mapping[str, Any]) -> Upload:
    return documents.entity(revision).upload


def _check_length(output: Output, complete: Mapping[str, Any]) -> None:
    found = _length(complete)
    if found != output.size:
        told = "does not say how many" if found is None else f"says that {found}"
        raise StorageMismatch(f"{output.path}: Ovation {told} of {output.size} bytes arrived")


def _length(revision: Mapping[str, Any]) -> int | None:
    """Return how many bytes Ovation has found."""
    length = documents.attributes(revision).get("content_length")
    return int(length) if isinstance(length, int) or (isinstance(length, str) and length.isdecimal()) else None


def _sha256(descriptor: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while some := os.pread(descriptor, _READ_BYTES, offset):
        digest.update(some)
        offset += len(some)
    return digest.hexdigest()
