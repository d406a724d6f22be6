"""`/api`: what the command line and programs read and do. Behind the admin token."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from datetime import datetime, timedelta

from aiohttp import hdrs, web

from agent.adapters.log_file import Begin
from agent.db.jobs import Jobs
from agent.domain.activity import Activity, NotReady, readiness
from agent.domain.job import TERMINAL, Job, State, Verdict
from agent.errors import DatabaseError, OvationError, OvationNotFound
from agent.web.answers import ActivityAnswer, EventList, JobAnswer, JobList
from agent.web.log_sources import source_of
from agent.web.state import (
    MAX_LISTED,
    MAX_LOG_OFFSET,
    MAX_SINCE_SECONDS,
    MAX_TAIL,
    SERVICES,
    Services,
    bearer,
    failure,
    is_id,
    read_json,
    same,
)

routes = web.RouteTableDef()
_FOLLOW_SECONDS = 0.2
_LISTED = 100
_LOG_FOLLOWED_STATES = frozenset({State.QUEUED, State.STAGING, State.LAUNCHING, State.RUNNING})


def authorize(request: web.Request) -> None:
    """Raise 401 unless the request carries the admin token."""
    token = bearer(request)
    if token is None or not same(token, request.app[SERVICES].admin_token):
        raise failure(401, "the admin token is needed", {hdrs.WWW_AUTHENTICATE: 'Bearer realm="ovation-agent"'})


@routes.get("/api/jobs")
async def list_jobs(request: web.Request) -> web.Response:
    """List jobs, newest first; parameters narrow it."""
    authorize(request)
    query = request.query
    state, verdict = query.get("state"), query.get("verdict")
    if state is not None and state not in set(State):
        raise failure(400, f"no such state: the states are {', '.join(State)}")
    if verdict is not None and verdict not in set(Verdict):
        raise failure(400, f"no such verdict: the verdicts are {', '.join(Verdict)}")
    for name in ("activity_id", "project_id"):
        if name in query and not is_id(query[name]):
            raise failure(400, f"{name} is not an Ovation id")
    jobs = await request.app[SERVICES].jobs.newest(
        activity_id=query.get("activity_id"),
        state=State(state) if state else None,
        most=number(query, "limit", 1, MAX_LISTED) or _LISTED,
        project_id=query.get("project_id"),
        verdict=Verdict(verdict) if verdict else None,
        since=None if (seconds := number(query, "since", 1, MAX_SINCE_SECONDS)) is None else timedelta(seconds=seconds),
        stuck=flag(query, "stuck"),
    )
    return web.json_response(JobList(jobs=[as_json(job) for job in jobs]))


def number(query: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    """Return a number that the address carries.

    Raises:
        web.HTTPException: 400 when it is none, or too small or too large.
    """
    if name not in query:
        return None
    text = query[name]
    if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
        raise failure(400, f"{name} is not a number from {least} to {most}")
    return int(text)


def flag(query: Mapping[str, str], name: str) -> bool:
    """Return a yes or no that the address carries, as 1 or 0.

    Raises:
        web.HTTPException: 400 when it is neither.
    """
    if query.get(name, "0") not in {"0", "1"}:
        raise failure(400, f"{name} is neither 0 nor 1")
    return query.get(name) == "1"


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
    return web.json_response(as_json(await cancel_job(request.app[SERVICES], job)), status=202)


async def cancel_job(services: Services, job: Job) -> Job:
    """Ask for a job's end, and return it as it is now.

    Raises:
        web.HTTPException: 409 when it has ended.
    """
    if not await services.jobs.cancel(job.id):
        raise failure(409, f"the job has ended already: {job.state}")
    services.on_cancel(job.id)
    return await services.jobs.get(job.id) or job


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
    again, made = await _rerun(services, job)
    return web.json_response(as_json(again), status=201 if made else 200)


async def rerun_job(services: Services, job: Job) -> Job:
    """Run a job's Activity again, as it stands in Ovation now, and return the new job, or the one that is under way.

    Raises:
        web.HTTPException: 404, 409 or 503; its text says why.
    """
    return (await _rerun(services, job))[0]


async def _rerun(services: Services, job: Job) -> tuple[Job, bool]:
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
    return again, made


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
    begin = Begin(
        offset=number(request.query, "offset", 0, MAX_LOG_OFFSET) or 0, lines=number(request.query, "tail", 0, MAX_TAIL)
    )
    following = flag(request.query, "follow")
    return await send_log(request, job, request.match_info["stream"], begin, following=following)


async def send_log(request: web.Request, job: Job, stream: str, begin: Begin, *, following: bool) -> web.StreamResponse:
    """Send a log of a job, from where it is to begin; `Log-Offset` tells of which byte that is.

    A log on another agent's disk comes through the database.

    Raises:
        web.HTTPException: 404 when it is not to be had.
    """
    services = request.app[SERVICES]
    source = source_of(services.log_questions, services.data_dir, job, stream)
    live = job.state in _LOG_FOLLOWED_STATES
    position = await source.begin(begin)
    if position is None:
        if not (following and live):
            raise failure(404, _no_log(services, job))
        position = begin.offset
    response = web.StreamResponse(
        headers={
            hdrs.CONTENT_TYPE: "text/plain; charset=utf-8",
            "X-Content-Type-Options": "nosniff",
            "Log-Offset": str(position),
        }
    )
    await response.prepare(request)
    if request.method == hdrs.METH_HEAD:
        return response  # aiohttp would send what is written, and the connection's next answer be taken for garbage
    while True:
        ended = not following or await _has_ended(services.jobs, job.id)
        while piece := await source.read(position):
            await response.write(piece)
            position += len(piece)
        if ended and piece is None and request.transport is not None:
            request.transport.abort()  # there may be more: whoever reads is not to take this for the end
            return response
        if ended:
            break
        await asyncio.sleep(_FOLLOW_SECONDS)
    await response.write_eof()
    return response


def _no_log(services: Services, job: Job) -> str:
    if job.place is not None and job.place != services.log_questions.place:
        return f"the agent on {job.host} has no such log any more, or does not answer: its logs are in Ovation"
    return "there is no such log on this machine: the run has not begun, or its logs are in Ovation"


async def _has_ended(jobs: Jobs, job_id: str) -> bool:
    with contextlib.suppress(DatabaseError):  # the container goes on without it
        found = await jobs.get(job_id)
        return found is None or found.state not in _LOG_FOLLOWED_STATES
    return False


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
        "waiting_for": waits(job),
        "due_at": None if job.state in TERMINAL else time_of(job.due_at),
        "held_until": time_of(job.held_until),
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


def waits(job: Job) -> str | None:
    """Say what a job waits for; where its files are on a machine whose agent is gone, that is it.

    What its last attempt waited for is over once bytes pass in this one.
    """
    if not job.host_is_gone or job.state in TERMINAL:
        waits = job.progress.get("waiting_for")
        is_over = job.held_until is not None and job.progress.get("bytes_per_second")
        return (None if is_over else job.waiting_for) or (str(waits) if waits else None)
    seen = f"last seen {job.host_seen_at:%Y-%m-%d %H:%M} UTC" if job.host_seen_at else "not seen yet"
    return f"waiting for the agent on {job.host}, which has the run's files ({seen})"


def time_of(at: datetime | None) -> str | None:
    """Return a time as programs read it."""
    return at.isoformat() if at else None
