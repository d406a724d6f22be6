"""`POST` and `DELETE /webhooks/ovation`: check who sends, have the hint stored, answer. Nothing is decided here."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace

from aiohttp import hdrs, web

from agent.domain.delivery import Delivery, Receipt
from agent.domain.webhook import Hint, Unreadable, parse
from agent.errors import DatabaseError
from agent.settings import AgentSettings
from agent.web import signatures
from agent.web.state import MOST_ORGANIZATION, SERVICES, failure, parse_json, read_body, same

routes = web.RouteTableDef()
_NO_ROOM = {
    Receipt.FULL: "more webhooks wait than the database takes; send this again",
    Receipt.STOPPING: "the agent is stopping; send this again",
}


@routes.post("/webhooks/ovation")
@routes.post(r"/webhooks/ovation/{org:\d{1,10}}")
@routes.delete("/webhooks/ovation")
@routes.delete(r"/webhooks/ovation/{org:\d{1,10}}")
async def webhook(request: web.Request) -> web.Response:
    """Store what may have changed; 202 once it is committed."""
    services = request.app[SERVICES]
    try:
        delivery = await _delivery(request, services.settings.agent)
    except web.HTTPException as refusal:
        detail = json.loads(refusal.text or "{}").get("errors", {}).get("detail", refusal.reason)
        services.refusals.count(refusal.status, detail, request.remote)
        services.metrics.refusal(refusal.status)
        raise
    if not delivery.hints:
        services.metrics.delivery(None)
        return _accepted(0)
    try:
        receipt = await services.inbox.store(delivery)
    except DatabaseError:
        services.metrics.delivery_lost()
        raise
    services.metrics.delivery(receipt)
    if receipt in _NO_ROOM:
        raise failure(503, _NO_ROOM[receipt], {hdrs.RETRY_AFTER: "5"})
    return _accepted(0 if receipt is Receipt.REPEATED else len(delivery.hints))


def _accepted(count: int) -> web.Response:
    return web.json_response({"accepted": count}, status=202)


async def _delivery(request: web.Request, settings: AgentSettings) -> Delivery:
    """Return what a request delivers.

    Raises:
        web.HTTPException: 401 before the body is read, or once it proves to be signed by nobody; 400, 408, 413, 415.
    """
    signed = _credentials(request, settings)
    body = await read_body(request)
    if signed is not None and not signed.vouched(body, settings.webhook_keys):
        raise _unauthorized(settings, "no signature is made with the agent's secret")
    hints = parse(parse_json(body))
    if isinstance(hints, Unreadable):
        raise failure(400, f"the payload cannot be read: {hints.where}")
    return Delivery(_completed(request, hints), None if signed is None else signed.message_id)


def _completed(request: web.Request, hints: tuple[Hint, ...]) -> tuple[Hint, ...]:
    """Add to the hints what the request's method and address say."""
    if request.method == hdrs.METH_DELETE:  # a link that went is no reason for a run
        hints = tuple(replace(hint, gained=None) for hint in hints)
    if organization := request.match_info.get("org"):
        hints = tuple(replace(hint, organization=int(organization)) for hint in hints)
    if not all(hint.organization is None or 0 <= hint.organization <= MOST_ORGANIZATION for hint in hints):
        raise failure(400, f"the organization is not a number from 0 to {MOST_ORGANIZATION}")
    return hints


def _credentials(request: web.Request, settings: AgentSettings) -> signatures.Signed | None:
    """Check the user name and password; without them, return what the request's signature claims."""
    if settings.webhook_username is None and not settings.webhook_secret:
        return None  # `serve` starts so only where anonymous webhooks were asked for
    if _basic_auth_is_right(request, settings):
        return None
    if not settings.webhook_secret:
        raise _unauthorized(settings, "the webhook's user name and password are not the agent's")
    if signatures.SIGNATURE not in request.headers:
        wanted = (
            "a signature" if settings.webhook_username is None else "the agent's user name and password, or a signature"
        )
        raise _unauthorized(settings, f"the webhook does not carry {wanted}")
    try:
        return signatures.read(request.headers, time.time())
    except signatures.Unsigned as problem:
        raise _unauthorized(settings, str(problem)) from None


def _basic_auth_is_right(request: web.Request, settings: AgentSettings) -> bool:
    if settings.webhook_username is None or settings.webhook_password is None:
        return False
    name, password = _basic_auth(request)
    name_matches = same(name, settings.webhook_username.get_secret_value())
    password_matches = same(password, settings.webhook_password.get_secret_value())
    return name_matches and password_matches


def _unauthorized(settings: AgentSettings, detail: str) -> web.HTTPException:
    challenges = []
    if settings.webhook_username is not None:
        challenges.append('Basic realm="ovation-agent", charset="UTF-8"')
    if settings.webhook_secret:
        challenges.append('StandardWebhooks realm="ovation-agent"')
    return failure(401, detail, {hdrs.WWW_AUTHENTICATE: ", ".join(challenges), hdrs.CONNECTION: "close"})


def _basic_auth(request: web.Request) -> tuple[str, str]:
    """Return the user name and the password that a request carries; empty ones if it carries none."""
    scheme, _, encoded = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True)
    except ValueError:
        return "", ""
    try:
        text = decoded.decode()
    except UnicodeDecodeError:
        text = decoded.decode("latin-1")  # older senders know nothing else
    name, _, password = text.partition(":")
    return name, password
