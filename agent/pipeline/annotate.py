"""Telling of a run on its Activity: each annotation once, although reporting may be done again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.adapters.executor import Ended, RunRequest
from agent.adapters.files import tail
from agent.db.jobs import Claim
from agent.domain.annotations import Told, event, mark, note, properties
from agent.domain.job import Job, Verdict
from agent.errors import OvationError, OvationNotFound, OvationUnavailable
from agent.logs import redact
from agent.pipeline.context import Context
from agent.pipeline.staged import read_record

EVENTS = "timeline-events"
PROPERTIES = "properties"
NOTES = "notes"
_TAIL_BYTES = 8192


async def annotate(context: Context, claim: Claim) -> str | None:
    """Tell of the run on its Activity; return why that could not be done, if it could not.

    Raises:
        OvationUnavailable: Ovation is away; what is told already is not told again.
    """
    job = claim.job
    request = await asyncio.to_thread(context.last_run, job)
    status = await context.executor.status(request)
    told = await asyncio.to_thread(_told, context, job, request, status if isinstance(status, Ended) else None)
    done = set(await context.jobs.annotated(job.id))
    try:
        activity = await context.ovation.entity(job.organization, job.activity_id)
        for kind, tell in _KINDS.items():
            if kind not in done:
                await tell(context, activity, told)
                await context.jobs.set_annotated(claim, kind)
    except OvationUnavailable:
        raise
    except OvationError as error:
        return f"the run is not told of on the Activity: {error}"
    return None


def _told(context: Context, job: Job, request: RunRequest, ended: Ended | None) -> Told:
    image = read_record(Path(context.layout(job).root)).get(("related", job.plan.image.file_name))
    started = (ended.started_at if ended else None) or job.started_at or job.created_at
    return Told(
        job_id=job.id,
        number=job.run,
        image_name=job.plan.image.name,
        image_sha256=image.sha256 if image else None,
        verdict=job.verdict or Verdict.FAILED,
        fault=job.fault,
        exit_code=job.exit_code,
        started_at=started,
        finished_at=ended.finished_at if ended and ended.finished_at else datetime.now(UTC),
        stderr_tail=redact(tail(request.stderr, _TAIL_BYTES)),
    )


async def _tell_event(context: Context, activity: Mapping[str, Any], told: Told) -> None:
    ovation, said = context.ovation, event(told)
    if not any(mark(told.job_id) in str(each.get("notes")) for _, each in await ovation.annotations(activity, EVENTS)):
        await ovation.annotate(activity, EVENTS, [said])


async def _tell_note(context: Context, activity: Mapping[str, Any], told: Told) -> None:
    ovation, said = context.ovation, note(told)
    if said is None:
        return
    if not any(mark(told.job_id) in str(each.get("text")) for _, each in await ovation.annotations(activity, NOTES)):
        await ovation.annotate(activity, NOTES, [said])


async def _tell_properties(context: Context, activity: Mapping[str, Any], told: Told) -> None:
    """Set the properties to this run's values; the agent's own earlier ones go, and nobody else's."""
    ovation, wanted = context.ovation, properties(told)
    made = await ovation.annotate(activity, PROPERTIES, [{"key": key, "value": wanted[key]} for key in wanted])
    ours, ids = {each.get("user") for each in made}, {each.get("_id") for each in made}
    for document, said in await ovation.annotations(activity, PROPERTIES):
        is_old = document.get("user") in ours and document.get("_id") not in ids
        if is_old and said.get("key") in _KEYS:
            try:
                await ovation.remove_annotation(activity, PROPERTIES, str(document.get("_id")))
            except OvationNotFound:
                continue


_KEYS = frozenset({"compute.run", "compute.status", "compute.image.sha256", "compute.exit_code"})
_KINDS: Mapping[str, Callable[[Context, Mapping[str, Any], Told], Awaitable[None]]] = {
    EVENTS: _tell_event,
    PROPERTIES: _tell_properties,
    NOTES: _tell_note,
}
