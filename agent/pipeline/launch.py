"""Launching: find the job's container by its name, or start it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

from agent.adapters.executor import Executor, ImageFacts, NotStarted
from agent.db.jobs import Claim
from agent.domain.job import Done, Failed, Fault, FaultClass, Job, Outcome, Verdict
from agent.domain.resources import Granted, grant
from agent.errors import ImageError
from agent.pipeline.context import Context, Control
from agent.pipeline.provenance import keep_image_facts
from agent.pipeline.staged import read_record

_KNOWN_MOST = 1000
_known: WeakKeyDictionary[Executor, dict[str, ImageFacts]] = WeakKeyDictionary()
"""What each executor has found images to be, by SHA-256: to inspect one starts Apptainer twice."""


async def launch(context: Context, claim: Claim, control: Control) -> Outcome:
    """Find the container of this launch or start it, with what it is given; a job cancelled before it has none."""
    request, resources = context.run_request(claim.job), None
    if isinstance(await context.executor.status(request), NotStarted):
        if control.cancelled.is_set():
            return Done(verdict=Verdict.CANCELLED)
        granted = await grant_to(context, claim.job)
        if isinstance(granted, Failed):
            return granted
        if control.cancelled.is_set():
            return Done(verdict=Verdict.CANCELLED)
        resources = granted.document()
        request = context.run_request(replace(claim.job, resources=resources))
    status = await context.executor.start(request)
    native_id = getattr(status, "native_id", None)
    return Done(native_id=native_id, started_at=status.started_at, resources=resources)


async def grant_to(context: Context, job: Job) -> Granted | Failed:
    """Return what a run is given, once its image has been looked at; or why that cannot run."""
    try:
        facts = await _facts(context.executor, context.run_request(job).image)
    except ImageError as error:
        return Failed(Fault(FaultClass.IMAGE, f"{job.plan.image.name}: {error}"), final=True)
    granted = grant(facts.labels, job.plan.wishes, context.settings.given, context.settings.most)
    cannot = await context.executor.cannot_keep(granted.given)
    await asyncio.to_thread(keep_image_facts, Path(context.layout(job).root), facts)
    return replace(granted, notes=(*granted.notes, *cannot))


async def _facts(executor: Executor, image: Path) -> ImageFacts:
    """Have the image inspected, unless the same bytes were found to be good before.

    Raises:
        ImageError: it cannot run.
    """
    known = _known.setdefault(executor, {})
    record = await asyncio.to_thread(read_record, image.parent.parent)
    staged = record.get((image.parent.name, image.name))
    if staged is not None and staged.sha256 in known:
        return known[staged.sha256]
    facts = await executor.inspect(image)
    if staged is not None:
        known[staged.sha256] = facts
        if len(known) > _KNOWN_MOST:
            del known[next(iter(known))]
    return facts
