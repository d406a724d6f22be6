"""Reporting: close the run. What stays on this machine for a while is its logs and the runner's record."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.adapters.files import remove_tree
from agent.db.jobs import Claim
from agent.domain.job import Done, Outcome, Verdict
from agent.pipeline.context import Context, Control
from agent.pipeline.staged import remove_work


async def report(context: Context, claim: Claim, control: Control) -> Outcome:
    """Remove what was delivered or can be fetched again; of a failed run all stays for a while, for whoever looks."""
    del control
    job, settings = claim.job, context.settings
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
        return Done(note=f"not all of its files could be removed from the agent's disk: {error.strerror}")
    return Done()
