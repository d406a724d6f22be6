"""Running: watch the container until it ends, and say what became of it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from agent.adapters.executor import Ended, Ending, NotStarted, Running, Status
from agent.adapters.files import tail
from agent.db.jobs import Claim
from agent.domain.container import judge
from agent.domain.job import Done, Fault, FaultClass, Lost, Outcome
from agent.pipeline.context import Context, Control

_LOOK_SECONDS = 30.0
_STDERR_TAIL_BYTES = 8192


async def watch(context: Context, claim: Claim, control: Control) -> Outcome:
    """Wait for the container's end under the lease; a cancelled job's container is ended first."""
    request = context.run_request(claim.job)
    told = Running(claim.job.native_id or "", None)
    cancelling = asyncio.create_task(control.cancelled.wait())
    try:
        while True:
            waiting = asyncio.create_task(context.executor.wait(request, _LOOK_SECONDS, told))
            try:
                await asyncio.wait({waiting, cancelling}, return_when=asyncio.FIRST_COMPLETED)
                if control.cancelled.is_set():
                    await context.executor.cancel(request)
                status: Status = await waiting
            finally:
                waiting.cancel()
            control.progress.waiting_for = None
            if isinstance(status, Running):
                told = status
                control.progress.waiting_for = status.waiting_for
            if isinstance(status, NotStarted):
                return Lost(Fault(FaultClass.NODE, "The run's files have disappeared from the machine that ran it."))
            if isinstance(status, Ended):
                judgement = judge(
                    status.ending,
                    status.exit_code,
                    tail(request.stderr, _STDERR_TAIL_BYTES),
                    time_limit_seconds=request.time_limit_seconds,
                    max_log_bytes=request.max_log_bytes,
                    detail=status.detail,
                )
                if status.ending is Ending.LOST and judgement.fault is not None:
                    return Lost(judgement.fault)
                return Done(
                    verdict=judgement.verdict,
                    fault=judgement.fault,
                    exit_code=status.exit_code,
                    started_at=status.started_at,
                    resources=None if status.usage is None else {"used": asdict(status.usage)},
                )
    finally:
        cancelling.cancel()
