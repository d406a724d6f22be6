"""Sees to the batch jobs that do the rest of a run on a compute node: each submitted once, taken back when it fails.

The worker on the node moves the job itself, under its own lease. What is here begins it, tells what it waits for, and
waits for its end. Only when Slurm says that it is over, its own records do not say otherwise, and its lease has run
out, the job is taken back under a lease of this agent's: then nothing that is still alive on the node counts.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from agent.adapters.executor import Ended, Executor, NotStarted, Running
from agent.adapters.files import remove_tree, tail
from agent.adapters.node import NodeRequest
from agent.db.jobs import LeaseLost
from agent.db.node_runs import NodeRun, NodeRuns
from agent.domain.decide import Limits, decide
from agent.domain.node import asked_for, node_over
from agent.domain.resources import NOTHING_SAID, Resources
from agent.domain.workdir import Layout
from agent.errors import DatabaseError, ExecutorUnavailable
from agent.logs import logger
from agent.pipeline.context import Context
from agent.pipeline.perform import LEASE_SECONDS, within_lease

FOLDER = "nodes"
NODE_LOG = "node.log"
"""What the agent's program on the node wrote, beside the container's own logs."""

_TICK_SECONDS = 1.0
_LOOK_SECONDS = 10.0
_AGAIN_SECONDS = 5.0
_LEAVES_SECONDS = 30.0
_TAIL_BYTES = 2048


class NodeKeeper:
    """Sees to what this agent has handed over.

    Args:
        context: what the agent works with.
        runs: the table of what is handed over.
        programs: starts the program on a node, and finds it again.
        orders: what that is to do.
        on_job: called when a job may be claimed here.
        beat: called each time that the loop comes round.
    """

    def __init__(
        self,
        context: Context,
        runs: NodeRuns,
        programs: Executor,
        orders: Callable[[NodeRun], dict[str, object]],
        *,
        on_job: Callable[[], None] = lambda: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._context = context
        self._runs = runs
        self._programs = programs
        self._orders = orders
        self._on_job = on_job
        self._beat = beat
        self._limits = Limits(node_retries=context.settings.node_retries)
        self._data_dir = Path(context.settings.data_dir).absolute()
        self._now: dict[str, NodeRun] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """See to them until cancelled; batch jobs go on, and are found again."""
        try:
            while True:
                self._beat()
                with suppress(DatabaseError):  # the worker tells of it, once
                    self._take_note({run.place: run for run in await self._runs.mine()})
                await asyncio.sleep(_TICK_SECONDS)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _take_note(self, now: dict[str, NodeRun]) -> None:
        before, self._now = self._now, now
        for place, run in now.items():
            if place not in self._tasks:
                self._changed[place] = asyncio.Event()
                self._tasks[place] = asyncio.create_task(self._guarded(place), name=f"node run {place}")
            elif before.get(place) != run:
                self._changed[place].set()
        for place in before.keys() - now.keys() & self._changed.keys():
            self._changed[place].set()

    async def _guarded(self, place: str) -> None:
        try:
            await self._see_to(place)
        except (DatabaseError, LeaseLost):
            pass  # the next look begins anew
        except Exception:  # noqa: BLE001 a bug: loud, and the others go on
            logger().exception("node_run_failed", place=place)
            await asyncio.sleep(_AGAIN_SECONDS)
        finally:
            del self._tasks[place], self._changed[place]

    async def _see_to(self, place: str) -> None:
        """See to one until nothing of it is left."""
        over_at = None
        while run := self._now.get(place):
            directory = run.directory or await self._runs.place(run, self._data_dir / FOLDER / place)
            if directory is None:
                return
            request = self._request(run, directory)
            try:
                wanted = not run.over and not run.cancel_requested
                status = await (self._programs.start(request) if wanted else self._programs.status(request))
                if isinstance(status, Running):
                    if run.over and over_at is None:
                        over_at = time.monotonic()
                    await self._while_it_runs(run, request, status, over_at)
                elif run.over:
                    await self._close(run, request)
                    return
                elif run.held:
                    await self._wait(place, _LOOK_SECONDS)  # its lease runs out, if nobody is there
                else:
                    await self._take_back(run, request, status)
                    await self._wait(place, _LOOK_SECONDS)
            except ExecutorUnavailable:
                await self._wait(place, _AGAIN_SECONDS)  # told where it was found out

    async def _while_it_runs(self, run: NodeRun, request: NodeRequest, status: Running, over_at: float | None) -> None:
        """Wait for its end or for news of the job; what is not wanted, and does not end by itself, is ended."""
        not_begun = status.started_at is None
        leaves_late = over_at is not None and time.monotonic() - over_at > _LEAVES_SECONDS
        if (not_begun and (run.cancel_requested or run.over)) or leaves_late:
            await self._programs.cancel(request)
        elif not_begun and status.waiting_for:
            await self._runs.waits(run, status.waiting_for)
        changed = asyncio.create_task(self._changed[run.place].wait())
        ends = asyncio.create_task(self._programs.wait(request, _LOOK_SECONDS, status))
        try:
            await asyncio.wait({changed, ends}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._changed[run.place].clear()
            for task in (changed, ends):
                task.cancel()
            await asyncio.gather(changed, ends, return_exceptions=True)

    async def _wait(self, place: str, seconds: float) -> None:
        """Wait for news of the job."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed[place].wait()
        self._changed[place].clear()

    async def _take_back(self, run: NodeRun, request: NodeRequest, status: NotStarted | Ended) -> None:
        """Move a job on whose batch job is over, under a lease of this agent's."""
        claim = await self._runs.take(run, LEASE_SECONDS)
        if claim is None:
            return
        ended = status if isinstance(status, Ended) else None
        outcome = node_over(
            None if ended is None else ended.ending,
            None if ended is None else ended.exit_code,
            None if ended is None else ended.detail,
            _last_line(tail(request.stderr, _TAIL_BYTES)),
            request.time_limit_seconds,
        )
        move = decide(claim.job, outcome, self._limits)
        await within_lease(lambda: self._context.jobs.move(claim, move, note=outcome.fault.message))
        logger().warning(
            "node_run_over",
            job_id=run.job_id,
            activity_id=claim.job.activity_id,
            state=str(claim.job.state),
            next_state=str(move.state),
            message=outcome.fault.message,
        )
        self._on_job()

    async def _close(self, run: NodeRun, request: NodeRequest) -> None:
        """Keep the program's log with the run's, remove the rest, and forget the batch job."""
        await asyncio.to_thread(self._keep_log, run, request)
        await asyncio.to_thread(_removed, request.directory)
        if await self._runs.close(run) and run.verdict is not None:
            self._context.metrics.ended(run.verdict, run.fault_class)

    def _keep_log(self, run: NodeRun, request: NodeRequest) -> None:
        kept = Path(Layout(self._data_dir, run.job_id).run(run.launch))
        if kept.is_dir() and request.stderr.is_file():
            shutil.copyfile(request.stderr, kept / NODE_LOG)
            (kept / NODE_LOG).chmod(0o600)

    def _request(self, run: NodeRun, directory: Path) -> NodeRequest:
        granted = run.resources.get("granted")
        resources = Resources(**granted) if isinstance(granted, dict) else NOTHING_SAID
        settings = self._context.settings
        resources, seconds = asked_for(resources, settings.time_limit_seconds, settings.node_margin_seconds)
        return NodeRequest(
            name=f"ovation-{run.job_id}-{run.place[:8]}",
            directory=directory,
            image=directory,
            inputs=directory,
            related=directory,
            time_limit_seconds=seconds,
            max_log_bytes=settings.max_log_bytes,
            resources=resources,
            orders=self._orders(replace(run, directory=directory)),
        )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [""])[-1][:300]


def _removed(directory: Path) -> None:
    with suppress(FileNotFoundError):
        remove_tree(directory)
