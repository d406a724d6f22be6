"""What a job has put into Ovation, each fact written before the next call is made."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from enum import StrEnum

from agent.db.database import Database
from agent.db.jobs import Claim, LeaseLost


class Kind(StrEnum):
    """What an output is. Logs go first and do not depend on the rest."""

    LOG = "log"
    FOLDER = "folder"
    OUTPUT = "output"


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

    async def save(self, claim: Claim, output: Output) -> None:
        """Record how far an output is.

        Raises:
            LeaseLost: another worker holds the job; nothing is written.
        """
        async with self._database.queries() as queries:
            saved = await queries.value("save_output", job_id=claim.job.id, lease_token=claim.token, **asdict(output))
        if saved is None:
            raise LeaseLost(f"the lease of job {claim.job.id} is another's")
