"""Staging where a compute node does the rest: learn what the run is to be given, and hand it over."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

from agent.db.jobs import Claim
from agent.domain.job import Done, Failed, HandedOver, Outcome
from agent.pipeline.context import Context, Control
from agent.pipeline.launch import grant_to
from agent.pipeline.stage import stage
from agent.pipeline.staged import remove_work


async def hand_over(context: Context, claim: Claim, control: Control) -> Outcome:
    """Have a batch job do the rest on a node.

    What it is to ask for is in the image's labels, so the image, and nothing else, is fetched here too. A file that is
    none is found out before anything waits for a node.
    """
    job = claim.job
    image = tuple(file for file in job.plan.related if file == job.plan.image)
    only_image = replace(job, plan=replace(job.plan, inputs=(), related=image))
    outcome = await stage(context, replace(claim, job=only_image), control)
    if not isinstance(outcome, Done):
        return outcome
    granted = await grant_to(context, job)
    if isinstance(granted, Failed):
        return granted
    await asyncio.to_thread(remove_work, Path(context.layout(job).root))
    return HandedOver(str(uuid.uuid4()), "Slurm: to be submitted", granted.document())
