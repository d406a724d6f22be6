"""`POST` and `DELETE /webhooks/ovation`: check who sends, store the hint, answer. Nothing is decided here."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from aiohttp import BasicAuth, hdrs, web

from agent.domain.webhook import Hint, Unreadable, parse
from agent.errors import DatabaseError
from agent.logs import logger
from agent.web.state import MOST_ORGANIZATION, SERVICES, Services, failure, read_json, same

routes = web.RouteTableDef()
# Ovation's senders wait ten seconds for an answer; a clear 503 has them send again.
_STORE_SECONDS = 7.0


@routes.post("/webhooks/ovation")
@routes.post(r"/webhooks/ovation/{org:\d{1,10}}")
@routes.delete("/webhooks/ovation")
@routes.delete(r"/webhooks/ovation/{org:\d{1,10}}")
async def webhook(request: web.Request) -> web.Response:
    """Store what may have changed; 202 once it is committed."""
    services = request.app[SERVICES]
    _check_credentials(request)
    hints = parse(await read_json(request))
    if isinstance(hints, Unreadable):
        raise failure(400, f"the payload cannot be read: {hints.where}")
    if request.method == hdrs.METH_DELETE:  # a link that went is no reason for a run
        hints = tuple(replace(hint, gained=False) for hint in hints)
    if organization := request.match_info.get("org"):
        hints = tuple(replace(hint, organization=int(organization)) for hint in hints)
    if not all(hint.organization is None or 0 <= hint.organization <= MOST_ORGANIZATION for hint in hints):
        raise failure(400, f"the organization is not a number from 0 to {MOST_ORGANIZATION}")
    if hints:
        await _store(services, hints)
        services.on_hint()
    return web.json_response({"accepted": len(hints)}, status=202)


async def _store(services: Services, hints: tuple[Hint, ...]) -> None:
    """Commit the hints, or raise `DatabaseError` while the sender still waits.

    The task is left to end by itself: a database that hangs also hangs whoever waits for the statement's cancellation.
    """
    settings = services.settings.agent
    storing = asyncio.create_task(services.watch_list.hint(hints, settings.settle_seconds, settings.settle_max_seconds))
    done, _ = await asyncio.wait({storing}, timeout=_STORE_SECONDS)
    if not done:
        storing.add_done_callback(_end_quietly)
        storing.cancel()
        raise DatabaseError("PostgreSQL does not answer in time for the webhook's sender")
    await storing


def _end_quietly(storing: asyncio.Task[None]) -> None:
    if not storing.cancelled() and (error := storing.exception()):
        logger().debug("webhook_given_up", error=type(error).__name__)


def _check_credentials(request: web.Request) -> None:
    settings = request.app[SERVICES].settings.agent
    if settings.webhook_username is None or settings.webhook_password is None:
        return  # `serve` starts so only where anonymous webhooks were asked for
    given = _basic_auth(request)
    name_matches = same(given.login, settings.webhook_username.get_secret_value())
    password_matches = same(given.password, settings.webhook_password.get_secret_value())
    if not (name_matches and password_matches):
        challenge = {hdrs.WWW_AUTHENTICATE: 'Basic realm="ovation-agent", charset="UTF-8"', hdrs.CONNECTION: "close"}
        raise failure(401, "the webhook's user name and password are not the agent's", challenge)


def _basic_auth(request: web.Request) -> BasicAuth:
    for encoding in ("utf-8", "latin-1"):  # older senders know only the latter
        try:
            return BasicAuth.decode(request.headers.get(hdrs.AUTHORIZATION, ""), encoding=encoding)
        except ValueError:
            continue
    return BasicAuth("")
