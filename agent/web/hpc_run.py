"""`POST /hpc_run`: a person asks for a run, as with the first compute manager."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jwt
from aiohttp import hdrs, web

from agent.adapters.ovation import Ovation
from agent.domain.activity import Activity, NotReady, readiness
from agent.errors import OvationError, OvationNotFound, OvationRefused
from agent.logs import logger, printable
from agent.settings import JwtSettings
from agent.web.state import MOST_ORGANIZATION, SERVICES, bearer, failure, is_id, read_json

routes = web.RouteTableDef()
_ORGANIZATION = re.compile(r"[0-9]{1,10}")
_CLOCK_SKEW_SECONDS = 30
_MOST_CHARACTERS = 200
_CHALLENGE = {hdrs.WWW_AUTHENTICATE: 'Bearer realm="ovation-agent", error="invalid_token"'}


@dataclass(frozen=True, slots=True)
class _Wish:
    activity_id: str
    image_name: str
    organization: int


@routes.post("/hpc_run")
async def hpc_run(request: web.Request) -> web.Response:
    """Start a run for whoever can read the Activity and each of its inputs; their token is used once and forgotten."""
    services = request.app[SERVICES]
    token = bearer(request)
    if token is None:
        raise failure(401, "a bearer token is needed", {hdrs.WWW_AUTHENTICATE: 'Bearer realm="ovation-agent"'})
    person = _person(token, services.settings.jwt)
    wish = _wish(await read_json(request))
    try:
        activity = await _activity(services.ovation, services.ovation.as_user(token), wish)
    except OvationNotFound:
        raise failure(404, "no such Activity, or it or one of its inputs is not for this token") from None
    except OvationRefused:
        raise failure(401, "Ovation does not accept the token", _CHALLENGE) from None
    except OvationError as error:
        logger().warning("hpc_run_failed", activity_id=wish.activity_id, error=str(error))
        raise failure(503, "Ovation cannot be asked now; try again", {hdrs.RETRY_AFTER: "10"}) from None
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
    answer = {"job_id": job.id, "activity_id": job.activity_id, "run": job.run, "state": job.state}
    return web.json_response(answer, status=201, headers={hdrs.LOCATION: f"/api/jobs/{job.id}"})


async def _activity(agent: Ovation, person: Ovation, wish: _Wish) -> Activity:
    """Read the Activity as the agent, once the person can read it and each of its inputs.

    Ovation leaves out of an Activity's links what the caller may not read: the inputs that count are the agent's.
    """
    await person.entity(wish.organization, wish.activity_id)
    activity = await agent.activity(wish.organization, wish.activity_id)
    for entity in activity.inputs:
        await person.entity(wish.organization, entity.id)
    return activity


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
