"""`/hpc_run`: a person asks for a run, as with the first compute manager, and sees how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jwt
from aiohttp import hdrs, web

from agent.adapters.ovation import Ovation
from agent.domain.activity import Activity, NotReady, readiness
from agent.domain.job import Job
from agent.errors import OvationError, OvationNotFound, OvationRefused
from agent.logs import logger, printable
from agent.settings import JwtSettings
from agent.web.answers import Started
from agent.web.jobs import as_json
from agent.web.state import MOST_ORGANIZATION, SERVICES, bearer, failure, is_id, read_json

routes = web.RouteTableDef()
_ORGANIZATION = re.compile(r"[0-9]{1,10}")
_CLOCK_SKEW_SECONDS = 30
_MOST_CHARACTERS = 200
_ASKED_AT_ONCE = 8
_REMEMBERED_SECONDS = 60.0
_MOST_REMEMBERED = 1024
_CHALLENGE = {hdrs.WWW_AUTHENTICATE: 'Bearer realm="ovation-agent", error="invalid_token"'}


@dataclass(frozen=True, slots=True)
class _Wish:
    activity_id: str
    image_name: str
    organization: int


class Readers:
    """Who was seen to be able to read what a job works on: for a short time, so that following a job is cheap.

    Of a token only a hash is kept, under a key that ends with the process.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._until: dict[tuple[bytes, str], float] = {}

    def may_read(self, token: str, job_id: str) -> bool:
        """Return whether Ovation said so a moment ago."""
        return self._clock() < self._until.get(self._reader(token, job_id), float("-inf"))

    def remember(self, token: str, job_id: str) -> None:
        """Keep what Ovation said; of too many the oldest are asked for again."""
        reader, now = self._reader(token, job_id), self._clock()
        self._until.pop(reader, None)
        self._until[reader] = now + _REMEMBERED_SECONDS
        for oldest in list(self._until)[:-_MOST_REMEMBERED]:
            del self._until[oldest]
        for past in [each for each, until in self._until.items() if until <= now]:
            del self._until[past]

    def _reader(self, token: str, job_id: str) -> tuple[bytes, str]:
        return hashlib.blake2b(token.encode(), key=self._key, digest_size=32).digest(), job_id


_READERS = Readers()


@routes.post("/hpc_run")
async def hpc_run(request: web.Request) -> web.Response:
    """Start a run for whoever can read the Activity and each of its inputs; their token is used once and forgotten."""
    services = request.app[SERVICES]
    token, person = _caller(request)
    wish = _wish(await read_json(request))
    with _refusals(wish.activity_id, "no such Activity, or it or one of its inputs is not for this token"):
        activity = await _activity(services.ovation, services.ovation.as_user(token), wish)
    judgement = readiness(activity, services.settings.agent.image_suffixes, image_name=wish.image_name)
    if isinstance(judgement, NotReady):
        raise failure(409, "; ".join(judgement.reasons))
    job, made = await services.watch_list.start(activity, judgement.plan, "hpc_run", person)
    if not made and job.plan.image.name != wish.image_name:
        raise failure(
            409, f"run {job.run} with the image {job.plan.image.name} is under way; ask again when it has ended"
        )
    if made:
        logger().info("job_made", job_id=job.id, activity_id=activity.id, run=job.run, requested_by=person)
        services.on_job()
    if _inputs(job) <= {entity.id for entity in activity.inputs}:
        _READERS.remember(token, job.id)
    answer: Started = {"job_id": job.id, "activity_id": job.activity_id, "run": job.run, "state": job.state}
    return web.json_response(answer, status=201, headers={hdrs.LOCATION: f"/hpc_run/{job.id}"})


@routes.get("/hpc_run/{job_id}")
async def hpc_run_status(request: web.Request) -> web.Response:
    """Show a job to whoever can read its Activity and each of its inputs, checked with their own token."""
    services = request.app[SERVICES]
    token, _ = _caller(request)
    job = await services.jobs.get(request.match_info["job_id"])
    hidden = "no such job, or its Activity or one of its inputs is not for this token"
    if job is None:
        raise failure(404, hidden)
    if not _READERS.may_read(token, job.id):
        person = services.ovation.as_user(token)
        with _refusals(job.activity_id, hidden):
            await _check(person, job.organization, {job.activity_id, *_inputs(job)})
        _READERS.remember(token, job.id)
    return web.json_response(as_json(job))


def _caller(request: web.Request) -> tuple[str, str | None]:
    """Return the request's token and whose it says it is, or raise 401."""
    token = bearer(request)
    if token is None:
        raise failure(401, "a bearer token is needed", {hdrs.WWW_AUTHENTICATE: 'Bearer realm="ovation-agent"'})
    return token, _person(token, request.app[SERVICES].settings.jwt)


@contextlib.contextmanager
def _refusals(activity_id: str, hidden: str) -> Iterator[None]:
    """Answer with what Ovation says to the person, and with no more than that."""
    try:
        yield
    except OvationNotFound:
        raise failure(404, hidden) from None
    except OvationRefused:
        raise failure(401, "Ovation does not accept the token", _CHALLENGE) from None
    except OvationError as error:
        logger().warning("hpc_run_failed", activity_id=activity_id, error=str(error))
        raise failure(503, "Ovation cannot be asked now; try again", {hdrs.RETRY_AFTER: "10"}) from None


async def _activity(agent: Ovation, person: Ovation, wish: _Wish) -> Activity:
    """Read the Activity as the agent, once the person can read it and each of its inputs.

    Ovation leaves out of an Activity's links what the caller may not read: the inputs that count are the agent's.
    """
    await person.entity(wish.organization, wish.activity_id)
    try:
        activity = await agent.activity(wish.organization, wish.activity_id)
    except OvationRefused as error:  # that is no fault of the person's token
        raise OvationError(f"the agent's own token: {error}") from None
    await _check(person, wish.organization, {entity.id for entity in activity.inputs})
    return activity


async def _check(person: Ovation, organization: int, entity_ids: Collection[str]) -> None:
    """Read each of these as the person, which raises where they may not."""
    listed = sorted(entity_ids)
    for start in range(0, len(listed), _ASKED_AT_ONCE):
        asked = listed[start : start + _ASKED_AT_ONCE]
        await asyncio.gather(*(person.entity(organization, each) for each in asked))


def _inputs(job: Job) -> set[str]:
    return {file.entity_id for file in job.plan.inputs}


def _wish(body: Any) -> _Wish:
    if not isinstance(body, dict):
        raise failure(400, "the body is not a JSON object")
    for name in ("activity_id", "image_name"):
        if not isinstance(body.get(name), str) or not body[name]:
            raise failure(400, f"missing parameter: {name}")
    if not is_id(body["activity_id"]):
        raise failure(400, "the parameter activity_id is not an Ovation id")
    organization = str(body.get("organization", 0))
    if not _ORGANIZATION.fullmatch(organization) or int(organization) > MOST_ORGANIZATION:
        raise failure(400, f"the parameter organization is not a number from 0 to {MOST_ORGANIZATION}")
    return _Wish(body["activity_id"], body["image_name"], int(organization))


def _person(token: str, settings: JwtSettings) -> str | None:
    """Check a token where there is something to check it with, and return whose it says it is."""
    keys = {}
    if settings.secret is not None:
        keys["HS256"] = settings.secret.get_secret_value()
    if settings.public_key is not None:
        keys["RS256"] = settings.public_key
    # Without a key Ovation's answer to the token decides alone; what it says of its owner is then only a name.
    options: Any = {"verify_aud": False, "verify_sub": False, "verify_signature": bool(keys)}
    try:
        # Each kind of key is good for its own algorithm alone: a public key is no shared secret.
        algorithm = str(jwt.get_unverified_header(token).get("alg"))
        if keys and algorithm not in keys:
            raise failure(401, "the token is not valid", _CHALLENGE)
        claims = jwt.decode(
            token, keys.get(algorithm, ""), algorithms=[algorithm], options=options, leeway=_CLOCK_SKEW_SECONDS
        )
    except (jwt.PyJWTError, ValueError):
        if keys:
            raise failure(401, "the token is not valid", _CHALLENGE) from None
        return None
    person = claims.get("email") or claims.get("sub")
    return printable(str(person))[:_MOST_CHARACTERS] if person else None
