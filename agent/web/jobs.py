"""`/api`: what the command line and programs read and do. Behind the admin token."""

from __future__ import annotations

import asyncio
import contextlib
import re
from datetime import datetime
from pathlib import Path

from aiohttp import hdrs, web

from agent.db.jobs import Jobs
from agent.domain.activity import Activity, NotReady, readiness
from agent.domain.job import TERMINAL, Job, State
from agent.domain.workdir import Layout
from agent.errors import DatabaseError, OvationError, OvationNotFound
from agent.web.answers import ActivityAnswer, EventList, JobAnswer, JobList
from agent.web.state import MAX_LISTED, SERVICES, Services, bearer, failure, is_id, read_json, same

routes = web.RouteTableDef()
_FOLLOW_SECONDS = 0.2
_LOG_FOLLOWED_STATES = frozenset({State.QUEUED, State.STAGING, State.LAUNCHING, State.RUNNING})


def authorize(request: web.Request) -> None:
    """Raise 401 unless the request carries the admin token."""
    token = bearer(request)
    if token is None or not same(token, request.app[SERVICES].admin_token):
        raise failure(401, "the admin token is needed", {hdrs.WWW_AUTHENTICATE: 'Bearer realm="ovation-agent"'})


@routes.get("/api/jobs")
async def list_jobs(request: web.Request) -> web.Response:
    """List jobs, newest first; `activity_id`, `state` and `limit` narrow it."""
    authorize(request)
    state, limit = request.query.get("state"), request.query.get("limit", "100")
    if state is not None and state not in set(State):
        raise failure(400, f"no such state: the states are {', '.join(State)}")
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= MAX_LISTED:
        raise failure(400, f"limit is not a number from 1 to {MAX_LISTED}")
    activity_id = request.query.get("activity_id")
    if activity_id is not None and not is_id(activity_id):
        raise failure(400, "activity_id is not an Ovation id")
    jobs = await request.app[SERVICES].jobs.newest(
        activity_id=activity_id, state=State(state) if state else None, most=int(limit)
    )
    return web.json_response(JobList(jobs=[as_json(job) for job in jobs]))


@routes.get("/api/jobs/{id}")
async def get_job(request: web.Request) -> web.Response:
    """Show one job."""
    return web.json_response(as_json(await find_job(request)))


@routes.get("/api/jobs/{id}/events")
async def list_events(request: web.Request) -> web.Response:
    """Tell a job's story: every move with its time."""
    job = await find_job(request)
    events = await request.app[SERVICES].jobs.events(job.id)
    answer: EventList = {
        "events": [
            {
                "id": each.id,
                "at": each.at.isoformat(),
                "state": each.state,
                "attempt": each.attempt,
                "note": each.note,
                "done": None if each.done is None else dict(each.done),
            }
            for each in events
        ]
    }
    return web.json_response(answer)


@routes.get("/api/activities/{id}")
async def get_activity(request: web.Request) -> web.Response:
    """Say what led to an Activity's runs, or why there is none."""
    authorize(request)
    services, activity_id = request.app[SERVICES], request.match_info["id"]
    if not is_id(activity_id):
        raise failure(404, "that is not an Ovation id")
    look = await services.watch_list.last_look(activity_id)
    jobs = await services.jobs.newest(activity_id=activity_id)
    if look is None and not jobs:
        raise failure(404, "no webhook and no person has named this Activity")
    answer: ActivityAnswer = {
        "id": activity_id,
        "organization": look.organization if look else jobs[0].organization,
        "judged_at": time_of(look.judged_at) if look else None,
        "reasons": list(look.reasons) if look else [],
        "due_at": time_of(look.due_at) if look else None,
        "deliveries": [{"at": at.isoformat(), "source": source} for at, source in look.deliveries] if look else [],
        "jobs": [as_json(job) for job in jobs],
    }
    return web.json_response(answer)


@routes.post("/api/jobs/{id}/cancel")
async def cancel(request: web.Request) -> web.Response:
    """Ask for a job's end; what it wrote so far is still delivered."""
    job = await find_job(request)
    services = request.app[SERVICES]
    if not await services.jobs.cancel(job.id):
        raise failure(409, f"the job has ended already: {job.state}")
    services.on_cancel(job.id)
    return web.json_response(as_json(await find_job(request)), status=202)


@routes.post("/api/jobs/{id}/rerun")
async def rerun(request: web.Request) -> web.Response:
    """Run the Activity again with the same image name, as it stands in Ovation now; `exact=1`: as it stood then."""
    job = await find_job(request)
    services = request.app[SERVICES]
    if request.can_read_body:
        await read_json(request)
    exact = request.query.get("exact", "0")
    if exact not in {"0", "1"}:
        raise failure(400, "exact is 0 or 1")
    if exact == "1":
        return await _rerun_exactly(services, job)
    try:
        activity = await services.ovation.activity(job.organization, job.activity_id)
    except OvationNotFound:
        raise failure(404, "the Activity is no longer in Ovation") from None
    except OvationError as error:
        raise failure(503, str(error), {hdrs.RETRY_AFTER: "10"}) from None
    judgement = readiness(activity, services.settings.agent.image_suffixes, image_name=job.plan.image.name)
    if isinstance(judgement, NotReady):
        raise failure(409, "; ".join(judgement.reasons))
    again, made = await services.watch_list.start(activity, judgement.plan, "rerun")
    if made:
        services.on_job()
    return web.json_response(as_json(again), status=201 if made else 200)


async def _rerun_exactly(services: Services, job: Job) -> web.Response:
    """Run the very Revisions and image of a past run again."""
    activity = Activity(
        id=job.activity_id,
        organization=job.organization,
        name=job.activity_name,
        project_id=job.project_id,
        inputs=(),
        related=(),
    )
    again, made = await services.watch_list.start(activity, job.plan, "rerun", exact_of=job.id)
    if not made and again.exact_of != job.id:
        raise failure(409, f"run {again.run} of the Activity is under way: wait for its end, or cancel it")
    if made:
        services.on_job()
    return web.json_response(as_json(again), status=201 if made else 200)


@routes.get("/api/jobs/{id}/logs/{stream:stdout|stderr}")
async def read_log(request: web.Request) -> web.StreamResponse:
    """Send what the container wrote so far; with `follow=1`, what it writes until it ends."""
    job = await find_job(request)
    services = request.app[SERVICES]
    follow = request.query.get("follow", "0")
    if follow not in {"0", "1"}:
        raise failure(400, "follow is neither 0 nor 1")
    path = Path(Layout(services.data_dir, job.id).log(request.match_info["stream"], job.launch))
    live = job.state in _LOG_FOLLOWED_STATES
    following = follow == "1"
    if not (following and live) and not await asyncio.to_thread(path.exists):
        raise failure(404, "there is no such log on this machine: the run has not begun, or its logs are in Ovation")
    response = web.StreamResponse(
        headers={hdrs.CONTENT_TYPE: "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
    )
    await response.prepare(request)
    if request.method == hdrs.METH_HEAD:
        return response  # aiohttp would send what is written, and the connection's next answer be taken for garbage
    position = 0
    while True:
        ended = not following or await _has_ended(services.jobs, job.id)
        position = await _send_from(response, path, position)
        if ended:
            break
        await asyncio.sleep(_FOLLOW_SECONDS)
    await response.write_eof()
    return response


async def _has_ended(jobs: Jobs, job_id: str) -> bool:
    with contextlib.suppress(DatabaseError):  # the container goes on without it
        found = await jobs.get(job_id)
        return found is None or found.state not in _LOG_FOLLOWED_STATES
    return False


async def _send_from(response: web.StreamResponse, path: Path, position: int) -> int:
    while piece := await asyncio.to_thread(_piece, path, position):
        await response.write(piece)
        position += len(piece)
    return position


def _piece(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as log:
            log.seek(position)
            return log.read(1 << 16)
    except FileNotFoundError:
        return b""


async def find_job(request: web.Request) -> Job:
    """Return the job that the address names; raises 401 and 404."""
    authorize(request)
    job = await request.app[SERVICES].jobs.get(request.match_info["id"])
    if job is None:
        raise failure(404, "no such job")
    return job


def as_json(job: Job) -> JobAnswer:
    """Return a job as programs read it."""
    return {
        "id": job.id,
        "activity_id": job.activity_id,
        "activity_name": job.activity_name,
        "organization": job.organization,
        "image_name": job.plan.image.name,
        "image_revision_id": job.plan.image.entity_id,
        "run": job.run,
        "state": job.state,
        "verdict": job.verdict,
        "fault": {"class": job.fault.cls, "message": job.fault.message} if job.fault else None,
        "exit_code": job.exit_code,
        "trigger": job.trigger,
        "requested_by": job.requested_by,
        "attempt": job.attempt,
        "launch": job.launch,
        "agent": {"host": job.host, "seen_at": time_of(job.host_seen_at)} if job.host else None,
        "waiting_for": _waits(job),
        "cancel_requested": job.cancel_requested,
        "created_at": job.created_at.isoformat(),
        "started_at": time_of(job.started_at),
        "finished_at": time_of(job.finished_at),
        "progress": dict(job.progress),
        "resources": dict(job.resources),
        "exact_of": job.exact_of,
        "native_id": job.native_id,
        "live": job.state not in TERMINAL,
    }


def _waits(job: Job) -> str | None:
    """Say what a job waits for; where its files are on a machine whose agent is gone, that is it."""
    if not job.host_is_gone or job.state in TERMINAL:
        waits = job.progress.get("waiting_for")
        return job.waiting_for or (str(waits) if waits else None)
    seen = f"last seen {job.host_seen_at:%Y-%m-%d %H:%M} UTC" if job.host_seen_at else "not seen yet"
    return f"waiting for the agent on {job.host}, which has the run's files ({seen})"


def time_of(at: datetime | None) -> str | None:
    """Return a time as programs read it."""
    return at.isoformat() if at else None
