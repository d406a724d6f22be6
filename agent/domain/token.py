"""What a token says of itself → whether the agent can do its work with it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

_NEEDED = ("read:global", "write:global")
_SERVICE = "@clients"
_SCOPES = ("scope", "https://ovation.io/scope")
SOON = timedelta(days=7)


def trouble_with(claims: Mapping[str, Any], now: datetime, *, is_renewed: bool) -> str | None:
    """Return why the agent cannot work with a token, or soon no more; nothing when it can.

    Args:
        claims: what the token says, as `ovation-api.md` has it.
        now: the time, with its zone.
        is_renewed: another one is fetched before this one expires.
    """
    if str(claims.get("sub", "")).endswith(_SERVICE):
        granted = _scopes(claims)
        if lacking := [scope for scope in _NEEDED if scope not in granted]:
            return f"a service account without {' and '.join(lacking)}: it may not do what the agent has to"
    expires = expiry(claims)
    if expires is None or is_renewed:
        return None
    if expires <= now:
        return f"it has expired on {expires:%Y-%m-%d %H:%M} UTC"
    if expires - now < SOON:
        return f"it expires on {expires:%Y-%m-%d %H:%M} UTC, and nothing works from then on"
    return None


def expiry(claims: Mapping[str, Any]) -> datetime | None:
    """Return when a token expires; nothing where it does not say so."""
    seconds = claims.get("exp")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def words(claims: Mapping[str, Any], *, is_renewed: bool) -> str:
    """Say whose a good token is, and for how long it is good."""
    service = str(claims.get("sub", "")).endswith(_SERVICE)
    whose = f"of a service account with {', '.join(_NEEDED)}" if service else "of a person"
    expires = expiry(claims)
    if is_renewed:
        return f"{whose}, renewed by itself"
    return f"{whose}, {'without an end' if expires is None else f'good until {expires:%Y-%m-%d}'}"


def _scopes(claims: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for name in _SCOPES:
        given = claims.get(name)
        found |= set(given.split() if isinstance(given, str) else map(str, given) if isinstance(given, list) else ())
    return found
