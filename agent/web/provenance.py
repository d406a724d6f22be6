"""Where a run's inputs came from (`/provenance`), and whether a repetition is the same (`/comparison`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aiohttp import web

from agent.db.outputs import Kind, Output
from agent.domain.job import TERMINAL, Job, PlannedFile
from agent.domain.provenance import compare
from agent.errors import OvationError
from agent.web.answers import Chain, ChainFile, ChainRun, Comparison
from agent.web.jobs import find_job, time_of
from agent.web.state import SERVICES, Services, failure

routes = web.RouteTableDef()
_MOST_RUNS = 200


@routes.get("/api/jobs/{id}/comparison")
async def get_comparison(request: web.Request) -> web.Response:
    """Compare an exact repetition with the run that it repeats, output by output."""
    job, services = await find_job(request), request.app[SERVICES]
    before = None if job.exact_of is None else await services.jobs.get(job.exact_of)
    if before is None:
        raise failure(409, "the job repeats no other: `rerun --exact` makes one that does")
    earlier, later = await services.outputs.of(before.id), await services.outputs.of(job.id)
    found = compare(_digests(earlier), _digests(later))
    answer: Comparison = {
        "job_id": job.id,
        "exact_of": before.id,
        "finished": job.state in TERMINAL and before.state in TERMINAL,
        "identical": all(result == "identical" for result in found.values()),
        "outputs": [{"path": path, "result": result} for path, result in sorted(found.items())],
    }
    return web.json_response(answer)


@routes.get("/api/jobs/{id}/provenance")
async def get_provenance(request: web.Request) -> web.Response:
    """Tell the chain of runs that led to a job's outputs."""
    job, services = await find_job(request), request.app[SERVICES]
    runs: dict[str, ChainRun] = {}
    ahead = [job]
    while ahead and len(runs) < _MOST_RUNS:
        one = ahead.pop(0)
        if one.id in runs:
            continue
        makers = await services.outputs.makers(
            file.entity_id for file in (*one.plan.inputs, one.plan.image) if file.type == "Revision"
        )
        runs[one.id] = await _run(services, one, makers)
        ahead += [found for maker in sorted(set(makers.values())) if (found := await services.jobs.get(maker))]
    answer: Chain = {"runs": list(runs.values())}
    return web.json_response(answer)


async def _run(services: Services, job: Job, makers: Mapping[str, str]) -> ChainRun:
    outputs = (await services.outputs.of(job.id)).values()
    return {
        "job_id": job.id,
        "activity_id": job.activity_id,
        "activity_name": job.activity_name,
        "run": job.run,
        "state": job.state,
        "trigger": job.trigger,
        "requested_by": job.requested_by,
        "started_at": time_of(job.started_at),
        "finished_at": time_of(job.finished_at),
        "image": await _file(services, job, job.plan.image, makers),
        "inputs": [await _file(services, job, file, makers) for file in job.plan.inputs],
        "outputs": [
            {
                "id": output.revision_id,
                "name": output.path,
                "sha256": output.sha256,
                "made_by": job.id,
                "activities": [],
            }
            for output in sorted(outputs, key=lambda output: (output.kind, output.path))
            if output.revision_id is not None and output.linked
        ],
    }


async def _file(services: Services, job: Job, file: PlannedFile, makers: Mapping[str, str]) -> ChainFile:
    maker, activities = makers.get(file.entity_id), []
    if maker is None:
        try:
            around = await services.ovation.came_from(job.organization, file.entity_id)
        except OvationError:
            around = []  # Ovation is away, or the agent may not see it any more; the rest of the chain stands
        activities = sorted({name for id_, name in around if id_ != job.activity_id})
    return {"id": file.entity_id, "name": file.name, "sha256": None, "made_by": maker, "activities": activities}


def _digests(outputs: Mapping[tuple[Kind, str], Output]) -> dict[str, str]:
    """Return the SHA-256 of each output that the container wrote, by its path."""
    written: Iterable[Output] = (output for (kind, _), output in outputs.items() if kind is Kind.OUTPUT)
    return {output.path: output.sha256 for output in written if output.uploaded and output.sha256}
