"""`webhooks`: the subscriptions and documents that have Ovation tell the agent of changes."""

from __future__ import annotations

import sys
from typing import Any

from agent import console
from agent.adapters.lab import Subscription, Subscriptions
from agent.client import web_address
from agent.errors import ConfigurationError
from agent.logs import printable, redact
from agent.probe import credentials
from agent.settings import AgentSettings, Settings

KEY = "YOUR-API-KEY"
_TRIGGER_TYPES = ("Relation", "Revision", "Activity")
_RELATIONS = "^(inputs|actions|activities|procedures)$"


def documents(url: str) -> list[dict[str, Any]]:
    """Return the webhook documents for the research service.

    They have no field mapping: the service maps a Relation by itself into the form that the agent reads. Its filter
    looks at that form and wants the whole field to match. Source: physion/osiris and physion/iris on GitHub.
    """
    found: list[dict[str, Any]] = [
        {"type": "webhook", "trigger_type": kind, "url": url, "api_key": KEY} for kind in _TRIGGER_TYPES
    ]
    found[0]["filter"] = [["rel", _RELATIONS]]
    return found


def explanation(settings: AgentSettings) -> list[str]:
    """Return what a person is to know who installs the documents."""
    key = (
        f"Put your key in place of {KEY}. The service sends it as user name and as password: set AGENT_WEBHOOK_USERNAME"
    )
    which = "Relation is the one that is needed. Revision tells when an upload ends, sooner than the agent's own look"
    lines = [
        f"{key} and AGENT_WEBHOOK_PASSWORD of the agent both to that same word.",
        f"{which} every 15 s; Activity tells of an Activity that was changed.",
    ]
    pair = credentials(settings)
    if pair is None:
        lines.append("This agent's settings here have no AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD yet.")
    elif pair[0] != pair[1]:
        lines.append(
            "WARNING: AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD differ here: the agent would refuse the key."
        )
    return lines


def shown(subscription: Subscription, settings: AgentSettings) -> dict[str, str]:
    """Return what may be seen of a subscription: never a user name or password, which may be one word."""
    pair = credentials(settings)
    whose = "none" if subscription.username is None else "another's"
    if pair is not None and subscription.username == pair[0]:
        whose = "the agent's"
    url = redact(subscription.target_url)
    return {"id": subscription.id, "event": subscription.event, "target_url": url, "user_name": whose}


async def show_all(settings: Settings, template_id: str, *, as_json: bool) -> None:
    """List a template's subscriptions."""
    async with Subscriptions.open(settings.ovation, template_id) as subscriptions:
        found = [shown(each, settings.agent) for each in await subscriptions.all()]
    if as_json:
        console.show_json(found)
        return
    console.show_table(("id", "event", "target", "user name"), [tuple(each.values()) for each in found])


async def add(settings: Settings, template_id: str, url: str, events: tuple[str, ...], *, as_json: bool) -> None:
    """Subscribe to events; what is there already gets the agent's credentials and is not doubled.

    Raises:
        ConfigurationError: there are no credentials to give them.
    """
    pair = credentials(settings.agent)
    if pair is None and not settings.agent.webhook_anonymous:
        raise ConfigurationError(
            "subscriptions carry a user name and password, which the agent then checks: set AGENT_WEBHOOK_USERNAME and"
            " AGENT_WEBHOOK_PASSWORD to what the agent runs with"
        )
    parsed = web_address(url)
    if parsed.scheme == "http" and parsed.host not in {"127.0.0.1", "::1", "localhost"}:
        _say("WARNING: over http the user name and password can be read on the way; use https")
    done = []
    async with Subscriptions.open(settings.ovation, template_id) as subscriptions:
        for event in dict.fromkeys(events):
            subscription, made, others = await subscriptions.add(url, event, pair)
            done.append({**shown(subscription, settings.agent), "made": made})
            if not as_json:
                what = "added" if made else "was there already; it has the agent's user name and password now:"
                print(printable(f"{what} {_in_words(subscription)}"))  # noqa: T201 this is what the command is for
            for other in others:
                command = f"ovation-agent webhooks remove --template {template_id} {other.id}"
                _say(f"the same again: remove it with `{command}`")
    if as_json:
        console.show_json(done)


async def remove(settings: Settings, template_id: str, subscription_id: str, *, as_json: bool) -> None:
    """Remove a subscription and say which it was."""
    async with Subscriptions.open(settings.ovation, template_id) as subscriptions:
        removed = await subscriptions.remove(subscription_id)
    if as_json:
        console.show_json(shown(removed, settings.agent))
    else:
        print(printable(f"removed {_in_words(removed)}"))  # noqa: T201 this is what the command is for


def _in_words(subscription: Subscription) -> str:
    return f"{subscription.id}: {subscription.event} to {redact(subscription.target_url)}"


def _say(text: str) -> None:
    print(f"ovation-agent: {printable(text)}", file=sys.stderr)  # noqa: T201 standard output is for the answer
