"""What every step is given."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from agent.adapters.cache import Cache
from agent.adapters.disk import Room
from agent.adapters.download import Downloader
from agent.adapters.executor import Executor, RunRequest
from agent.adapters.ovation import Ovation
from agent.adapters.upload import Uploader
from agent.db.jobs import Claim, Jobs
from agent.db.outputs import Outputs
from agent.domain.job import Job, Outcome
from agent.domain.resources import NOTHING_SAID, Resources
from agent.domain.workdir import Layout
from agent.metrics import Metrics
from agent.pipeline.progress import Progress
from agent.settings import AgentSettings


@dataclass(frozen=True, slots=True)
class Context:
    """The parties that steps work with. `hands_over`: compute nodes stage, run and collect."""

    settings: AgentSettings
    jobs: Jobs
    outputs: Outputs
    ovation: Ovation
    downloader: Downloader
    uploader: Uploader
    executor: Executor
    room: Room
    cache: Cache
    metrics: Metrics = field(default_factory=Metrics)
    hands_over: bool = False

    def layout(self, job: Job) -> Layout:
        """Return where the job's files are."""
        return Layout(Path(self.settings.data_dir).absolute(), job.id)

    def last_run(self, job: Job) -> RunRequest:
        """Return the job's last container that has left anything: a launch that never came about has not."""
        for launch in range(job.launch, 1, -1):
            request = self.run_request(replace(job, launch=launch))
            if request.directory.is_dir():
                return request
        return self.run_request(replace(job, launch=1))

    def run_request(self, job: Job) -> RunRequest:
        """Return the job's container; the same for the same launch of the job, however often it is asked for."""
        layout, granted = self.layout(job), granted_to(job)
        return RunRequest(
            name=f"ovation-{job.id}-{job.launch}",
            directory=Path(layout.run(job.launch)),
            native_id=job.native_id,
            image=Path(layout.related) / job.plan.image.file_name,
            inputs=Path(layout.inputs),
            related=Path(layout.related),
            time_limit_seconds=granted.time_seconds or self.settings.time_limit_seconds,
            network=self.settings.network,
            max_log_bytes=self.settings.max_log_bytes,
            resources=granted,
        )


def granted_to(job: Job) -> Resources:
    """Return what a job was given; nothing before it is launched."""
    granted = job.resources.get("granted")
    return Resources(**granted) if isinstance(granted, dict) else NOTHING_SAID


@dataclass(slots=True)
class Control:
    """What a step tells the worker, and the worker the step, while it runs.

    `alone`: the job's work may be what ends the process, so that nothing else is worked at beside it. `is_over`: the
    step has ended, and what came of it is being written.
    """

    progress: Progress = field(default_factory=Progress)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    alone: bool = False
    is_over: bool = False


class Step(Protocol):
    """Does the work of one state. Its one contract: it may be repeated."""

    def __call__(self, context: Context, claim: Claim, control: Control) -> Awaitable[Outcome]:
        """Do the work and return what came of it."""
        ...
