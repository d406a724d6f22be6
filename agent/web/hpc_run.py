"""`POST /hpc_run`: a person asks for a run, as with the first compute manager."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jwt
from aiohttp import hdrs, web

from agent.adapters.ovation import Ovation
from agent.domain.activity import Activity, NotReady, readiness
from agent.errors import OvationError, OvationNotFound, OvationRefused
from agent.logs import logger
from agent.settings import JwtSettings
from agent.web.state import SERVICES, bearer, failure, read_json

routes = web.RouteTableDef()
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
        await _may_read(services.ovation.as_user(token), wish)
        activity = await services.ovation.activity(wish.organization, wish.activity_id)
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
    if made:
        logger().info("job_made", job_id=job.id, activity_id=activity.id, run=job.run, requested_by=person)
        services.on_job()
    answer = {"job_id": job.id, "activity_id": job.activity_id, "run": job.run, "state": job.state}
    return web.json_response(answer, status=201, headers={hdrs.LOCATION: f"/api/jobs/{job.id}"})


async def _may_read(ovation: Ovation, wish: _Wish) -> Activity:
    activity = await ovation.activity(wish.organization, wish.activity_id)
    for entity in activity.inputs:
        await ovation.entity(wish.organization, entity.id)
    return activity


def _wish(body: Any) -> _Wish:
    if not isinstance(body, dict):
        raise failure(400, "the body is not a JSON object")
    for name in ("activity_id", "image_name"):
        if not isinstance(body.get(name), str) or not body[name]:
            raise failure(400, f"missing parameter: {name}")
    try:
        organization = int(body.get("organization", 0))
    except (TypeError, ValueError):
        raise failure(400, "the parameter organization is not a number") from None
    return _Wish(body["activity_id"], body["image_name"], organization)


def _person(token: str, settings: JwtSettings) -> str | None:
    """Check a token where there is something to check it with, and return whose it says it is."""
    if settings.secret is not None:
        key, algorithms = settings.secret.get_secret_value(), ["HS256"]
    elif settings.public_key is not None:
        key, algorithms = settings.public_key, ["RS256"]
    else:
        key, algorithms = "", []
    try:
        # Without a key Ovation's answer to the token decides alone; what it says of its owner is then only a name.
        options: Any = {"verify_aud": False, "verify_signature": bool(algorithms)}
        claims = jwt.decode(token, key, algorithms=algorithms or None, options=options)
    except jwt.PyJWTError:
        if algorithms:
            raise failure(401, "the token is not valid", _CHALLENGE) from None
        return None
    person = claims.get("email") or claims.get("sub")
    return str(person)[:200] if person else None
