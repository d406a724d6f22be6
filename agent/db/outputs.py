"""What a job has put into Ovation, each fact written before the next call is made."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum

from agent.db.database import Database
from agent.db.jobs import Claim, LeaseLost


class Kind(StrEnum):
    """What an output is. Logs go first and do not depend on the rest."""

    LOG = "log"
    FOLDER = "folder"
    OUTPUT = "output"
    CRATE = "crate"  # what tells of all the others; goes last


@dataclass(frozen=True, slots=True)
class Output:
    """How far the delivery of one output is."""

    kind: Kind
    path: str
    size: int | None = None  # bytes
    sha256: str | None = None
    entity_id: str | None = None  # the File, or the Folder
    revision_id: str | None = None
    uploaded: bool = False
    linked: bool = False


class Outputs:
    """The table of outputs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of(self, job_id: str) -> dict[tuple[Kind, str], Output]:
        """Return what a job has delivered so far, by kind and path."""
        async with self._database.queries() as queries:
            rows = await queries.rows("list_outputs", job_id=uuid.UUID(job_id))
        found = [
            Output(
                kind=Kind(row["kind"]),
                path=row["path"],
                size=row["size"],
                sha256=row["sha256"],
                entity_id=row["entity_id"],
                revision_id=row["revision_id"],
                uploaded=row["uploaded"],
                linked=row["linked"],
            )
            for row in rows
        ]
        return {(output.kind, output.path): output for output in found}

    async def makers(self, revision_ids: Iterable[str]) -> dict[str, str]:
        """Return the job that has made each of these Revisions, by Revision; of others nothing is said."""
        async with self._database.queries() as queries:
            rows = await queries.rows("makers", revision_ids=list(revision_ids))
        return {row["revision_id"]: str(row["job_id"]) for row in rows}

    async def save(self, claim: Claim, output: Output) -> None:
        """Record how far an output is.

        Raises:
            LeaseLost: another worker holds the job; nothing is written.
        """
        async with self._database.queries() as queries:
            saved = await queries.value("save_output", job_id=claim.job.id, lease_token=claim.token, **asdict(output))
        if saved is None:
            raise LeaseLost(f"the lease of job {claim.job.id} is another's")

    async def ledger(self, claim: Claim) -> Ledger:
        """Open a job's record for the worker that holds it."""
        return Ledger(self, claim, await self.of(claim.job.id))


class Ledger:
    """What a job has put into Ovation, as its worker reads and writes it: memory and table say the same."""

    def __init__(self, outputs: Outputs, claim: Claim, written: dict[tuple[Kind, str], Output]) -> None:
        self._outputs = outputs
        self._claim = claim
        self._written = written
        self._entities = {output.entity_id for output in written.values()}

    def __iter__(self) -> Iterator[Output]:
        return iter(list(self._written.values()))

    def get(self, kind: Kind, path: str) -> Output:
        """Return how far an output is; one of which nothing is written has not begun."""
        return self._written.get((kind, path)) or Output(kind, path)

    def has(self, entity_id: str) -> bool:
        """Say whether a Folder or File is, or was, one of the job's own."""
        return entity_id in self._entities

    async def save(self, output: Output) -> None:
        """Record how far an output is.

        Raises:
            LeaseLost: another worker holds the job; nothing is written.
        """
        await self._outputs.save(self._claim, output)
        self._written[output.kind, output.path] = output
        self._entities.add(output.entity_id)
