"""Launching: find the job's container by its name, or start it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from weakref import WeakKeyDictionary

from agent.adapters.executor import Executor, NotStarted
from agent.db.jobs import Claim
from agent.domain.job import Done, Failed, Fault, FaultClass, Outcome, Verdict
from agent.errors import ImageError
from agent.pipeline.context import Context, Control
from agent.pipeline.staged import read_record

_GOOD_MOST = 1000
_good: WeakKeyDictionary[Executor, dict[str, None]] = WeakKeyDictionary()
"""The images, by SHA-256, that each executor has found to be good: to inspect one starts Apptainer twice."""


async def launch(context: Context, claim: Claim, control: Control) -> Outcome:
    """Start the container once; the next state watches it, also when it has ended already."""
    request = context.run_request(claim.job)
    if isinstance(await context.executor.status(request), NotStarted):
        try:
            if not control.cancelled.is_set():
                await _inspect(context.executor, request.image)
        except ImageError as error:
            return Failed(Fault(FaultClass.IMAGE, f"{claim.job.plan.image.name}: {error}"), final=True)
        if control.cancelled.is_set():
            return Done(verdict=Verdict.CANCELLED)
    status = await context.executor.start(request)
    native_id = getattr(status, "native_id", None)
    return Done(native_id=native_id, started_at=status.started_at)


async def _inspect(executor: Executor, image: Path) -> None:
    """Have the image inspected, unless the same bytes were found to be good before.

    Raises:
        ImageError: it cannot run.
    """
    good = _good.setdefault(executor, {})
    record = await asyncio.to_thread(read_record, image.parent.parent)
    staged = record.get((image.parent.name, image.name))
    if staged is not None and staged.sha256 in good:
        return
    await executor.inspect(image)
    if staged is not None:
        good[staged.sha256] = None
        if len(good) > _GOOD_MOST:
            del good[next(iter(good))]
