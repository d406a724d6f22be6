"""The page: what runs, why something waits, one job live. Rendered here; the browser asks nobody else for anything.

Behind the admin token, which a person shows once in a form; a signed cookie stands for it afterwards. Every address but
`/` is below `/page`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from importlib import resources
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web

from agent.adapters.log_file import Begin
from agent.db.work import Day
from agent.domain.job import TERMINAL, Job, State
from agent.errors import DatabaseError
from agent.web import charts, sessions
from agent.web.health import troubles
from agent.web.jobs import cancel_job, flag, number, rerun_job, send_log
from agent.web.rendering import HEADERS, charts_of, html, render, see_other
from agent.web.state import SERVICES, Handler, failure, read_body, same

if TYPE_CHECKING:
    pass

routes = web.RouteTableDef()
_TICK_SECONDS = 1.0
_SIGN_OF_LIFE_SECONDS = 15.0
_MOST_FOLLOWED = 32
_MOST_JOBS = 100
_DRAINED = "No queued job is let in here: `ovation-agent drain --off` ends that."
_DAYS_SECONDS = 15.0
_WRONG_TOKEN_SECONDS = 1.0
_MOST_TAIL_BYTES = 1 << 20
_STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


@dataclass(slots=True)
class Page:
    """What the page keeps between requests."""

    followed: int = 0
    days: Sequence[Day] = ()
    days_at: float = float("-inf")
    listed: dict[str, Any] = field(default_factory=dict)
    listed_at: float = float("-inf")
    wrong: asyncio.Lock | None = None  # wrong tokens wait for each other


PAGE = web.AppKey("page", Page)


def _for_people(handler: Handler) -> Handler:
    """Show what stands against a request as a page, and have whoever is not signed in sign in."""

    @wraps(handler)
    async def shown(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except DatabaseError:
            words = "The agent's database is away. Containers go on; look again in a moment."
            return html("problem.html", status=503, title="The database is away", text=words)
        except web.HTTPUnauthorized:
            return _to_login(request)
        except web.HTTPException as refusal:
            return html("problem.html", status=refusal.status, title="That was not done", text=_detail(refusal))

    return shown


@routes.get("/")
@_for_people
async def home(request: web.Request) -> web.StreamResponse:
    """Answer as the first compute manager did; a browser gets the page."""
    if "text/html" not in request.headers.get(hdrs.ACCEPT, ""):
        return web.json_response({"status": "alive"}, headers={hdrs.VARY: hdrs.ACCEPT})
    if not _signed_in(request):
        return _to_login(request)
    return html("jobs.html", **await _jobs(request), form_token=_form_token(request))


@routes.get("/page/jobs/{id}")
@_for_people
async def show_job(request: web.Request) -> web.StreamResponse:
    """Show one job, with one of its logs."""
    if not _signed_in(request):
        return _to_login(request)
    stream = request.query.get("log", "stdout")
    return html("job.html", **await _job(request, request.match_info["id"]), stream=_stream(stream))


@routes.get("/page/login")
async def login_form(request: web.Request) -> web.Response:
    """Ask for the admin token."""
    return html("login.html", next=_inside(request.query.get("next")), form_token=None)


@routes.post("/page/login")
@_for_people
async def login(request: web.Request) -> web.Response:
    """Take the admin token, once, for a cookie."""
    _refuse_strangers(request)
    form = await _form(request)
    page, services = request.app[PAGE], request.app[SERVICES]
    target = _inside(form.get("next"))
    if not same(form.get("token", "").strip(), services.admin_token):
        page.wrong = page.wrong or asyncio.Lock()
        async with page.wrong:
            await asyncio.sleep(_WRONG_TOKEN_SECONDS)
        return html("login.html", status=403, wrong="That is not the admin token.", next=target, form_token=None)
    answer = see_other(target)
    answer.set_cookie(
        sessions.COOKIE,
        sessions.issue(services.admin_token),
        max_age=sessions.SESSION_SECONDS,
        httponly=True,
        samesite="Lax",
        secure=_is_https(request),
    )
    return answer


@routes.post("/page/logout")
@_for_people
async def logout(request: web.Request) -> web.Response:
    """End the session in this browser."""
    await _own_form(request)
    answer = see_other("/page/login")
    answer.del_cookie(sessions.COOKIE)
    return answer


@routes.post("/page/jobs/{id}/cancel")
@_for_people
async def cancel(request: web.Request) -> web.Response:
    """Ask for a job's end."""
    await _own_form(request)
    job = await _find(request, request.match_info["id"])
    return await _done(job, cancel_job(request.app[SERVICES], job))


@routes.post("/page/jobs/{id}/rerun")
@_for_people
async def rerun(request: web.Request) -> web.Response:
    """Run the job's Activity again."""
    await _own_form(request)
    job = await _find(request, request.match_info["id"])
    return await _done(job, rerun_job(request.app[SERVICES], job))


@routes.get("/page/jobs/{id}/log/{stream}")
async def log(request: web.Request) -> web.StreamResponse:
    """Send one of a job's logs; `follow=1`: until its container ends; `tail`: its last bytes only."""
    _need_session(request)
    job = await _find(request, request.match_info["id"])
    begin = Begin(most_bytes=number(request.query, "tail", 0, _MOST_TAIL_BYTES))
    stream, following = _stream(request.match_info["stream"]), flag(request.query, "follow")
    return await send_log(request, job, stream, begin, following=following)


@routes.get("/page/changes")
async def changes(request: web.Request) -> web.StreamResponse:
    """Send what the page shows, each time it has changed (server-sent events)."""
    _need_session(request)
    page = request.app[PAGE]
    if page.followed >= _MOST_FOLLOWED:
        raise failure(503, "too many pages are open", {hdrs.RETRY_AFTER: "10"})
    job_id = request.query.get("job")
    if job_id is not None:
        await _find(request, job_id)
    response = web.StreamResponse(
        headers={
            **HEADERS,
            hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
            "X-Accel-Buffering": "no",  # nginx would keep them until there are many
        }
    )
    await response.prepare(request)
    if request.method == hdrs.METH_HEAD:
        return response
    page.followed += 1
    try:
        await _send_changes(request, response, job_id)
    finally:
        page.followed -= 1
    return response


@routes.get("/page/static/{name}")
async def static(request: web.Request) -> web.Response:
    """Send a file that the page is made of."""
    name = request.match_info["name"]
    if name not in _STATIC:
        raise failure(404, "there is no such file")
    content = resources.files("agent.web").joinpath("static", name).read_bytes()
    headers = {**HEADERS, hdrs.CONTENT_TYPE: f"{_STATIC[name]}; charset=utf-8", hdrs.CACHE_CONTROL: "no-cache"}
    return web.Response(body=content, headers=headers)


async def _send_changes(request: web.Request, response: web.StreamResponse, job_id: str | None) -> None:
    sent, sent_at = "", time.monotonic()
    await response.write(b"retry: 2000\n\n")
    while _signed_in(request):
        with contextlib.suppress(DatabaseError):  # what stands there stays
            shown = await _fragment(request, job_id)
            if shown != sent:
                await response.write(f"event: content\ndata: {json.dumps(shown)}\n\n".encode())
                sent, sent_at = shown, time.monotonic()
        if time.monotonic() - sent_at > _SIGN_OF_LIFE_SECONDS:
            await response.write(b": still here\n\n")
            sent_at = time.monotonic()
        await asyncio.sleep(_TICK_SECONDS)
    await response.write(b"event: over\ndata:\n\n")


async def _fragment(request: web.Request, job_id: str | None) -> str:
    if job_id is None:
        return render("jobs_live.html", **await _jobs(request))
    return render("job_live.html", **await _job(request, job_id))


async def _jobs(request: web.Request) -> dict[str, Any]:
    """Return what the list shows, the same for all that look at the same moment."""
    page = request.app[PAGE]
    if time.monotonic() - page.listed_at > _TICK_SECONDS / 2:
        page.listed, page.listed_at = await _read_jobs(request), time.monotonic()
    return page.listed


async def _read_jobs(request: web.Request) -> dict[str, Any]:
    services, page = request.app[SERVICES], request.app[PAGE]
    jobs = await services.jobs.newest(most=_MOST_JOBS)
    jobs.sort(key=lambda job: job.state in TERMINAL)  # what is under way comes first
    if time.monotonic() - page.days_at > _DAYS_SECONDS:
        page.days, page.days_at = await services.work.last_days(), time.monotonic()
    live = Counter({State(state): count for state, count in (await services.work.numbers()).live.items()})
    return {
        "jobs": jobs,
        "more": len(jobs) == _MOST_JOBS,
        "waiting": await services.work.waiting_activities(),
        "counts": [(state, live[state]) for state in State if live[state]],
        "charts": charts_of(page.days),
        "troubles": [*await troubles(services), *([] if services.worker.admits else [_DRAINED])],
        "now": _now(),
        "host": socket.gethostname(),
    }


async def _job(request: web.Request, job_id: str) -> dict[str, Any]:
    job, now = await _find(request, job_id), _now()
    events = await request.app[SERVICES].jobs.events(job.id)
    return {
        "job": job,
        "events": events,
        "stages": charts.stages(job, events, now),
        "now": now,
        "form_token": _form_token(request),
        "host": socket.gethostname(),
    }


async def _done(job: Job, work: Awaitable[Job]) -> web.Response:
    """Do what a button asks for; what stands against it is shown as a page."""
    try:
        found = await work
    except web.HTTPException as refusal:
        back = f"/page/jobs/{job.id}"
        return html("problem.html", status=refusal.status, title="That was not done", text=_detail(refusal), back=back)
    return see_other(f"/page/jobs/{found.id}")


def _detail(refusal: web.HTTPException) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(refusal.text or "")["errors"]["detail"])
    return refusal.reason


async def _find(request: web.Request, job_id: str) -> Job:
    job = await request.app[SERVICES].jobs.get(job_id)
    if job is None:
        raise failure(404, "no such job")
    return job


def _signed_in(request: web.Request) -> bool:
    return sessions.is_good(request.app[SERVICES].admin_token, request.cookies.get(sessions.COOKIE))


def _need_session(request: web.Request) -> None:
    if not _signed_in(request):
        raise failure(401, "sign in again", {hdrs.WWW_AUTHENTICATE: 'Cookie realm="ovation-agent"'})


def _form_token(request: web.Request) -> str:
    return sessions.form_token(request.app[SERVICES].admin_token, request.cookies[sessions.COOKIE])


async def _own_form(request: web.Request) -> None:
    """Go on only with a form that this agent has made for this session."""
    _refuse_strangers(request)
    _need_session(request)
    token = (await _form(request)).get("form_token", "")
    if not sessions.is_form_token(request.app[SERVICES].admin_token, request.cookies[sessions.COOKIE], token):
        raise failure(403, "this form is not of this session: load the page again")


def _refuse_strangers(request: web.Request) -> None:
    """Refuse what a browser sends because another site told it to."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
        raise failure(403, "another site has sent this")


async def _form(request: web.Request) -> dict[str, str]:
    from urllib.parse import parse_qsl

    if request.content_type != "application/x-www-form-urlencoded":
        raise failure(415, "this is not a form")
    try:
        return dict(parse_qsl((await read_body(request)).decode(), max_num_fields=10))
    except ValueError:
        raise failure(400, "the form cannot be read") from None


def _inside(target: str | None) -> str:
    """Return an address of this page, whatever was asked for: nobody is sent elsewhere."""
    is_ours = target is not None and target.startswith("/page/jobs/") and target.isprintable() and "\\" not in target
    return str(target) if is_ours else "/"


def _stream(name: str) -> str:
    if name not in {"stdout", "stderr"}:
        raise failure(404, "there are stdout and stderr")
    return name


def _to_login(request: web.Request) -> web.Response:
    from urllib.parse import urlencode

    return see_other(f"/page/login?{urlencode({'next': _inside(request.path)})}")


def _is_https(request: web.Request) -> bool:
    """Say whether the browser came by HTTPS, to a proxy before the agent."""
    return request.secure or request.headers.get("X-Forwarded-Proto", "") == "https"


def _now() -> datetime:
    return datetime.now(UTC)
