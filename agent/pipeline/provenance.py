"""The crate of a run: its facts gathered from where they lie."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent import __version__
from agent.adapters import runner
from agent.adapters.disk import write_whole
from agent.adapters.executor import Ended, ImageFacts, RunRequest
from agent.adapters.upload import content_type
from agent.db.outputs import Kind, Output
from agent.domain.job import Job, PlannedFile, Verdict
from agent.domain.provenance import Image, Person, Result, Run, Source, crate
from agent.errors import OvationNotFound, OvationRefused
from agent.pipeline.context import Context
from agent.pipeline.staged import Record, read_record

_IMAGE = "image.json"
_AMOUNTS = {
    ("granted", "cpus"): ("CPUs granted", "CPU"),
    ("granted", "memory_bytes"): ("memory granted", "byte"),
    ("granted", "gpus"): ("GPUs granted", "GPU"),
    ("granted", "time_seconds"): ("time limit", "second"),
    ("used", "wall_seconds"): ("wall time", "second"),
    ("used", "user_seconds"): ("user processor time", "second"),
    ("used", "system_seconds"): ("system processor time", "second"),
    ("used", "peak_memory_bytes"): ("peak resident memory", "byte"),
}


def keep_image_facts(root: Path, facts: ImageFacts) -> None:
    """Keep what an image says of itself with the job's files, before it runs."""
    write_whole(root / _IMAGE, json.dumps(asdict(facts), ensure_ascii=False).encode())


async def make_crate(
    context: Context, job: Job, request: RunRequest, outputs: Iterable[Output], activity: Mapping[str, Any]
) -> bytes:
    """Return the crate of a run whose outputs are delivered. The same run makes the same bytes.

    Args:
        context: what every step is given.
        job: the run.
        request: its last container.
        outputs: what it has put into Ovation.
        activity: the Activity's document.
    """
    status = await context.executor.status(request)
    operators = await _operators(context, activity)
    root = Path(context.layout(job).root)

    def make() -> bytes:
        run = _run(context, job, root, request, status if isinstance(status, Ended) else None, outputs, operators)
        return json.dumps(crate(run), indent=2, ensure_ascii=False).encode()

    return await asyncio.to_thread(make)


async def _operators(context: Context, activity: Mapping[str, Any]) -> list[Person]:
    """Return the Activity's operators as far as the agent may see them."""
    try:
        return [Person(id_, name) for id_, name in await context.ovation.operators(activity)]
    except (OvationNotFound, OvationRefused):
        return []


def _run(
    context: Context,
    job: Job,
    root: Path,
    request: RunRequest,
    ended: Ended | None,
    outputs: Iterable[Output],
    operators: Sequence[Person],
) -> Run:
    record, plan = read_record(root), job.plan
    return Run(
        api_url=context.ovation.api_url,
        organization=job.organization,
        activity_id=job.activity_id,
        activity_name=job.activity_name,
        number=job.run,
        job_id=job.id,
        launch=job.launch,
        trigger=job.trigger,
        verdict=job.verdict or Verdict.FAILED,
        fault=job.fault,
        exit_code=job.exit_code,
        created_at=job.created_at,
        started_at=(ended.started_at if ended else None) or job.started_at,
        finished_at=ended.finished_at if ended else None,
        inputs=[_source(record, "inputs", file) for file in plan.inputs],
        related=[_source(record, "related", file) for file in plan.related],
        image=_source(record, "related", plan.image),
        image_facts=_image(root),
        results=sorted(_results(outputs), key=lambda result: result.path),
        agent_version=__version__,
        executor=context.settings.executor,
        native_id=job.native_id,
        requested_by=Person(job.requested_by) if job.requested_by else None,
        operators=operators,
        command=_command(root, request),
        amounts=list(_amounts(job)),
        notes=[str(note) for note in _listed(job.resources.get("notes"))],
    )


def _source(record: Record, folder: str, file: PlannedFile) -> Source:
    staged = record.get((folder, file.file_name))
    size, sha256 = (staged.size, staged.sha256) if staged else (None, None)
    return Source(file.entity_id, file.type, file.name, size, sha256)


def _image(root: Path) -> Image:
    with suppress(OSError, ValueError, TypeError):
        found = json.loads((root / _IMAGE).read_bytes())
        return Image(found["labels"], found["runscript"], found["definition"], found["runtime"])
    return Image({})


def _results(outputs: Iterable[Output]) -> Iterator[Result]:
    for output in outputs:
        if output.kind not in {Kind.OUTPUT, Kind.LOG} or not output.uploaded:
            continue
        if output.revision_id is None or output.size is None or output.sha256 is None:
            continue
        kind = content_type(output.path.rpartition("/")[2])
        yield Result(output.path, output.revision_id, output.size, output.sha256, kind, is_log=output.kind is Kind.LOG)


def _command(root: Path, request: RunRequest) -> list[str]:
    """Return the command line, with no path of this machine in it."""
    spec = runner.read_json(str(request.directory), runner.SPEC)
    if spec is None:
        return []
    program, *words = spec["argv"]
    return [Path(program).name, *(word.replace(f"{root}/", "") for word in words)]


def _amounts(job: Job) -> Iterator[tuple[str, float, str]]:
    for (group, name), (title, unit) in _AMOUNTS.items():
        found = job.resources.get(group)
        value = found.get(name) if isinstance(found, dict) else None
        if isinstance(value, int | float):
            yield title, value, unit


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []
