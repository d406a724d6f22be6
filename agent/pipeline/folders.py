"""A run's Folder in Ovation and what stands in it: each Folder and File once.

An answer that was lost hides what it made. So when a delivery goes on, the record is believed, and what it lacks is
looked for by name before it is made. What a person took away meanwhile is made anew, for what is not linked yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agent.adapters import documents
from agent.adapters.ovation import Ovation
from agent.db.jobs import Claim, Jobs
from agent.db.outputs import Kind, Ledger, Output
from agent.pipeline.transfer import Transfers


class Folders:
    """The Folders of one run, by the path below the run's own; that one is the empty path.

    Args:
        ovation: where they are.
        jobs: where the run's own is recorded.
        claim: whose run it is.
        ledger: where the others are recorded.
        transfers: gives up what was under way to a Folder that is gone.
        is_repeated: an earlier try may have made what no record tells of.
    """

    def __init__(
        self, ovation: Ovation, jobs: Jobs, claim: Claim, ledger: Ledger, transfers: Transfers, *, is_repeated: bool
    ) -> None:
        self._ovation = ovation
        self._jobs = jobs
        self._claim = claim
        self._ledger = ledger
        self._transfers = transfers
        self._is_repeated = is_repeated
        self._documents: dict[str, Mapping[str, Any]] = {}
        self._standing: dict[str, list[dict[str, Any]]] = {}
        self.remade: list[str] = []  # those that somebody took away

    def __contains__(self, path: str) -> bool:
        return path in self._documents

    async def open(self) -> None:
        """Find the run's Folder: the one on record, or one that was made just before a crash; or make it."""
        job = self._claim.job
        if job.folder_id is not None:
            there = await self._transfers.there(job.folder_id)
            if there is not None:
                self._documents[""] = there
                return
            await self._detach("")
        project = await self._ovation.entity(job.organization, job.project_id)
        name = f"{job.activity_name} run {job.run}"
        folder = await self._empty_folder(project, name) if self._is_repeated else None
        if folder is None:
            folder = await self._ovation.create(project, "Folder", name)
        await self._jobs.set_folder(self._claim, documents.identifier(folder))
        self._documents[""] = folder

    async def make(self, path: str) -> None:
        """Find or make a Folder in one that is there."""
        parent, _, name = path.rpartition("/")
        record = self._ledger.get(Kind.FOLDER, path)
        folder: Mapping[str, Any] | None = None
        if record.entity_id is not None:
            folder = await self._transfers.there(record.entity_id)
            if folder is None:
                await self._detach(path)
        if folder is None:
            folder = await self._found_or_made(parent, "Folder", name)
            await self._ledger.save(replace(record, entity_id=documents.identifier(folder)))
        self._documents[path] = folder

    async def file(self, output: Output) -> tuple[Output, Mapping[str, Any]]:
        """Find or make an output's File; return it with the record that names it."""
        file: Mapping[str, Any] | None = None
        if output.entity_id is not None:
            file = await self._transfers.there(output.entity_id)
            if file is None:
                await self._transfers.forget(output)
                output = Output(output.kind, output.path)
        if file is None:
            folder, _, name = output.path.rpartition("/")
            file = await self._found_or_made("" if output.kind in {Kind.LOG, Kind.CRATE} else folder, "File", name)
            output = replace(output, entity_id=documents.identifier(file))
            await self._ledger.save(output)
        return output, file

    async def _found_or_made(self, parent: str, kind: str, name: str) -> Mapping[str, Any]:
        if self._is_repeated:
            if parent not in self._standing:
                self._standing[parent] = await self._ovation.children(self._documents[parent])
            for document in self._standing[parent]:
                entity = documents.entity(document)
                # What has Revisions and is on no record is not ours: ours gets them when it is on record.
                is_free = not document.get("revisions") and not self._ledger.has(entity.id)
                if (entity.type, entity.name) == (kind, name) and is_free:
                    return document
        return await self._ovation.create(self._documents[parent], kind, name)

    async def _empty_folder(self, project: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """Return a Folder of this name with nothing in it: nothing is put into a run's Folder that is on no record.

        One with something in it belongs to the run of another Activity of that name.
        """
        for document in await self._ovation.children(project):
            entity = documents.entity(document)
            if (entity.type, entity.name) == ("Folder", name) and not await self._ovation.children(document):
                return document
        return None

    async def _detach(self, folder: str) -> None:
        """Forget what stands in a Folder that is gone, but for what is on the Activity: it is all made anew."""
        self.remade.append(folder)
        for output in self._ledger:
            is_inside = not folder or (output.kind is not Kind.LOG and output.path.startswith(f"{folder}/"))
            if is_inside and output.entity_id is not None and not output.linked:
                if not output.uploaded:
                    await self._transfers.forget(output)
                await self._ledger.save(Output(output.kind, output.path))
