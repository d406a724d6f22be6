"""`webhooks test`: send a delivery through the front door, as Ovation would, and see what becomes of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
import uuid
from dataclasses import asdict, dataclass, replace
from typing import Any

import aiohttp

from agent import console
from agent.client import AgentRefused, Client, web_address
from agent.errors import AgentError, ConfigurationError
from agent.logs import printable, redact
from agent.settings import AgentSettings, Settings

PATH = "/webhooks/ovation"
_LOOK_SECONDS = 0.2
_MORE_SECONDS = 5.0
_MOST_BYTES = 2000
_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)


class DeliveryFailed(AgentError):
    """The front door did not take the delivery, or nothing came of it; the message has the remedy."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of a delivery. `judged_at` is None when that cannot be known here or has not happened yet."""

    address: str
    activity_id: str
    status: int
    answer: str
    judged_at: str | None = None
    reasons: tuple[str, ...] = ()
    jobs: tuple[dict[str, Any], ...] = ()
    note: str | None = None


def target(text: str, organization: int | None = None) -> str:
    """Return where webhooks go, of the agent's address with or without the path.

    Raises:
        ConfigurationError: it is not an address, or names an organization already.
    """
    address = str(web_address(text)).rstrip("/")
    if PATH not in address:
        address += PATH
    if organization is None:
        return address
    if not address.endswith(PATH):
        raise ConfigurationError(f"the address goes on after {PATH}: leave --organization out")
    return f"{address}/{organization}"


def credentials(settings: AgentSettings) -> tuple[str, str] | None:
    """Return the user name and password that webhooks must carry, if the settings have them."""
    if settings.webhook_username is None or settings.webhook_password is None:
        return None
    return settings.webhook_username.get_secret_value(), settings.webhook_password.get_secret_value()


async def probe(
    settings: Settings, address: str, activity_id: str | None, organization: int | None, *, as_json: bool
) -> None:
    """Send a delivery through the front door and show what became of it.

    Raises:
        DeliveryFailed: it was not taken, or not judged in time; the message has the remedy.
    """
    made_up = activity_id is None
    about = activity_id or str(uuid.uuid4())
    try:
        client: Client | None = Client.find(settings)
        note = None
    except AgentError as error:
        client, note = None, f"what became of it cannot be seen from here: {error}"
    if client is None:
        delivered = await _deliver(settings.agent, address, about, organization, note=note)
    else:
        async with client:
            before = await _judged_at(client, about)
            delivered = await _deliver(settings.agent, address, about, organization)
            delivered = await _judged(client, delivered, before, settings.agent.settle_seconds + _MORE_SECONDS)
    _show(delivered, made_up=made_up, as_json=as_json)
    if client is not None and delivered.judged_at is None:
        raise DeliveryFailed(delivered.note or "not judged")


async def _deliver(
    settings: AgentSettings, address: str, activity_id: str, organization: int | None, note: str | None = None
) -> Delivered:
    notice: dict[str, Any] = {"id": activity_id, "type": "Activity"}
    if organization is not None:
        notice["organization"] = organization
    body = json.dumps(notice).encode()
    headers = {"Content-Type": "application/json", **_proof(settings, body)}
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT, cookie_jar=aiohttp.DummyCookieJar()) as http,
            http.post(address, data=body, headers=headers, allow_redirects=False) as response,
        ):
            status, text = response.status, (await response.content.read(_MOST_BYTES)).decode(errors="replace")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise DeliveryFailed(
            f"{address} cannot be reached ({_reason(error)}): is the agent running, and does the proxy or the firewall"
            " in front of it let this machine, and Ovation, through?"
        ) from None
    if status != 202:  # noqa: PLR2004 HTTP's own number
        raise DeliveryFailed(f"{address} answers {status}: {printable(redact(_detail(text)))}{_remedy(status)}")
    return Delivered(address, activity_id, status, redact(text), note=note)


def _proof(settings: AgentSettings, body: bytes) -> dict[str, str]:
    """Return the headers that say that the agent may trust a delivery."""
    if pair := credentials(settings):
        return {"Authorization": aiohttp.encode_basic_auth(*pair)}
    if not settings.webhook_keys:
        return {}
    message_id, moment = f"msg_{uuid.uuid4().hex}", str(int(time.time()))
    signed = hmac.new(settings.webhook_keys[0], f"{message_id}.{moment}.".encode() + body, hashlib.sha256).digest()
    signature = f"v1,{base64.b64encode(signed).decode()}"
    return {"webhook-id": message_id, "webhook-timestamp": moment, "webhook-signature": signature}


def _remedy(status: int) -> str:
    remedies = {
        401: "; the agent there runs with other credentials; AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD here"
        " and there, and what Ovation sends, must be the same",
        404: f"; the address must end in {PATH}; is it the agent that answers there?",
        503: "; its database is away; `ovation-agent doctor` on its machine says why",
    }
    return remedies.get(status, "; is it the agent that answers there?" if status < 400 else "")  # noqa: PLR2004


async def _judged_at(client: Client, activity_id: str) -> str | None:
    try:
        found = await client.get("api", "activities", activity_id)
    except AgentRefused as error:
        if error.status == 404:  # noqa: PLR2004 HTTP's own number: nobody has named it yet
            return None
        raise
    at: str | None = found["judged_at"]
    return at


async def _judged(client: Client, delivered: Delivered, before: str | None, seconds: float) -> Delivered:
    """Wait until the Activity has been judged since, and return the judgement."""
    deadline = time.monotonic() + seconds
    while True:
        at = await _judged_at(client, delivered.activity_id)
        if at is not None and at != before:
            break
        if time.monotonic() > deadline:
            return replace(
                delivered,
                note=f"stored, but not judged within {seconds:.0f} s: `ovation-agent why {delivered.activity_id}` tells"
                " when; is this the agent that answers there?",
            )
        await asyncio.sleep(_LOOK_SECONDS)
    found = await client.get("api", "activities", delivered.activity_id)
    return replace(delivered, judged_at=at, reasons=tuple(found["reasons"]), jobs=tuple(found["jobs"]))


def _show(delivered: Delivered, *, made_up: bool, as_json: bool) -> None:
    if as_json:
        console.show_json({**asdict(delivered), "answer": _parsed(delivered.answer), "made_up": made_up})
        return
    kind = "an id made up for this test" if made_up else "as named"
    rows = [
        ("sent to", delivered.address),
        ("about", f"Activity {delivered.activity_id} ({kind})"),
        ("answer", f"{delivered.status} {delivered.answer}"),
    ]
    if delivered.judged_at is not None:
        rows += [("judged", reason) for reason in delivered.reasons] or [("judged", "ready")]
        rows += [("run", f"{job['run']}: {job['state']}, job {job['id']}") for job in delivered.jobs[:1]]
        if made_up:
            rows.append(("so", "it came in, and the agent asked Ovation: of an id made up, that is all there can be"))
    elif delivered.note:
        rows.append(("note", delivered.note))
    console.show_table(("", ""), rows)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _detail(text: str) -> str:
    parsed = _parsed(text)
    try:
        return str(parsed["errors"]["detail"])
    except (KeyError, TypeError):
        return " ".join(text.split())[:100]


def _reason(error: Exception) -> str:
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return (inner.strerror if isinstance(inner, OSError) else None) or type(error).__name__
