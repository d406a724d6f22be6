"""`POST` and `DELETE /webhooks/ovation`: check who sends, store the hint, answer. Nothing is decided here."""

from __future__ import annotations

from dataclasses import replace

from aiohttp import BasicAuth, hdrs, web

from agent.domain.webhook import Unreadable, parse
from agent.web.state import SERVICES, failure, read_json, same

routes = web.RouteTableDef()


@routes.post("/webhooks/ovation")
@routes.post(r"/webhooks/ovation/{org:\d{1,9}}")
@routes.delete("/webhooks/ovation")
@routes.delete(r"/webhooks/ovation/{org:\d{1,9}}")
async def webhook(request: web.Request) -> web.Response:
    """Store what may have changed; 202 once it is committed."""
    services = request.app[SERVICES]
    _check_credentials(request)
    hints = parse(await read_json(request))
    if isinstance(hints, Unreadable):
        raise failure(400, f"the payload cannot be read: {hints.where}")
    if organization := request.match_info.get("org"):
        hints = tuple(replace(hint, organization=int(organization)) for hint in hints)
    if hints:
        await services.watch_list.hint(hints, services.settings.agent.settle_seconds)
        services.on_hint()
    return web.json_response({"accepted": len(hints)}, status=202)


def _check_credentials(request: web.Request) -> None:
    settings = request.app[SERVICES].settings.agent
    if settings.webhook_username is None or settings.webhook_password is None:
        return  # `serve` starts so only where anonymous webhooks were asked for
    try:
        given = BasicAuth.decode(request.headers.get(hdrs.AUTHORIZATION, ""), encoding="utf-8")
    except ValueError:
        given = BasicAuth("")
    expected = settings.webhook_password.get_secret_value()
    name_matches, password_matches = same(given.login, settings.webhook_username), same(given.password, expected)
    if not (name_matches and password_matches):
        challenge = {hdrs.WWW_AUTHENTICATE: 'Basic realm="ovation-agent", charset="UTF-8"', hdrs.CONNECTION: "close"}
        raise failure(401, "the webhook's user name and password are not the agent's", challenge)
