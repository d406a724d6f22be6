"""Reporting: tell of the run beside its outputs and on its Activity, and close it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.adapters.files import remove_tree
from agent.db.jobs import Claim
from agent.db.outputs import Kind
from agent.domain.job import Done, Job, Outcome, Verdict
from agent.domain.provenance import FILE_NAME
from agent.errors import OvationError, OvationUnavailable, StorageError, StorageUnavailable
from agent.pipeline.annotate import annotate
from agent.pipeline.context import Context, Control
from agent.pipeline.delivery import Delivery, Item
from agent.pipeline.provenance import make_crate
from agent.pipeline.staged import remove_work


async def report(context: Context, claim: Claim, control: Control) -> Outcome:
    """Put the crate beside the outputs, tell of the run on its Activity, and remove what was delivered.

    What Ovation refuses of this is said in the job's story and holds nothing up; an outage is waited out.
    """
    notes: list[str | None] = []
    if claim.job.folder_id is not None:  # else it ended before anything of it was delivered, perhaps without Ovation
        notes.append(await _describe(context, claim, control))
        if context.settings.annotate:
            notes.append(await annotate(context, claim))
    notes.append(await close(context, claim.job))
    return Done(note="; ".join(filter(None, notes)) or None)


async def _describe(context: Context, claim: Claim, control: Control) -> str | None:
    """Put the crate beside the outputs that it tells of; return why it is not there, if it is not."""
    job = claim.job
    outputs = await context.outputs.of(job.id)
    if (before := outputs.get((Kind.CRATE, FILE_NAME))) and before.linked:
        return None
    try:
        delivery = await Delivery.begin(context, claim, control)
        request = await asyncio.to_thread(context.last_run, job)
        crate = await make_crate(context, job, request, outputs.values(), delivery.activity)
        # Not by way of the disk: the end of a run is what makes room on a full one.
        await delivery.deliver([Item(Kind.CRATE, Path(), FILE_NAME, FILE_NAME, len(crate), crate)])
        delivery.check()
        await delivery.end()
    except (OvationUnavailable, StorageUnavailable):
        raise
    except (OvationError, StorageError) as error:
        if error.transient:
            raise
        return f"the provenance ({FILE_NAME}) is not on the Activity: {error}"
    return None


async def close(context: Context, job: Job) -> str | None:
    """Remove what was delivered or can be fetched again; of a failed run all stays for a while, for whoever looks.

    What stays for longer is the logs and the runner's record. Returns what could not be removed, in words.
    """
    settings = context.settings
    context.room.forget(job.id)
    failed = job.verdict not in {Verdict.SUCCEEDED, Verdict.CANCELLED}
    root = Path(context.layout(job).root)
    try:
        if failed and settings.keep_failed_seconds > 0:
            await asyncio.to_thread(remove_tree, root / "uploads")  # credentials are for nobody who looks
        elif settings.keep_seconds > 0:
            await asyncio.to_thread(remove_work, root)
        else:
            await asyncio.to_thread(remove_tree, root)
    except OSError as error:  # the run is over and delivered: what is left is the sweep's
        return f"not all of its files could be removed from the agent's disk: {error.strerror}"
    return None
