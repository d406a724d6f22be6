"""Launching: find the job's container by its name, or start it."""

from __future__ import annotations

from agent.adapters.executor import NotStarted
from agent.db.jobs import Claim
from agent.domain.job import Done, Failed, Fault, FaultClass, Outcome, Verdict
from agent.errors import ImageError
from agent.pipeline.context import Context, Control


async def launch(context: Context, claim: Claim, control: Control) -> Outcome:
    """Start the container once; the next state watches it, also when it has ended already."""
    request = context.run_request(claim.job)
    if isinstance(await context.executor.status(request), NotStarted):
        try:
            if not control.cancelled.is_set():
                await context.executor.inspect(request.image)
        except ImageError as error:
            return Failed(Fault(FaultClass.IMAGE, f"{claim.job.plan.image.name}: {error}"), final=True)
        if control.cancelled.is_set():
            return Done(verdict=Verdict.CANCELLED)
    status = await context.executor.start(request)
    native_id = getattr(status, "native_id", None)
    return Done(native_id=native_id, started_at=status.started_at)
