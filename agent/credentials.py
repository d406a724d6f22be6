"""Whose Ovation token a person's command carries, and where it was found. Never taken from a command line."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt

from agent.errors import ConfigurationError

VARIABLE = "OVATION_TOKEN"
_FILE = ".ovation/credentials.json"  # where the released client, ovation 1.26.0, keeps tokens
_TOKEN = re.compile(r"[!-~]+")
_MOST_BYTES = 1 << 20
_OTHERS = 0o077


@dataclass(frozen=True, slots=True)
class PersonToken:
    """A person's token. `found` says where, for messages; `warning` is for the person to read."""

    token: str = field(repr=False)
    found: str
    warning: str | None = None


def person_token(api_url: str, user: str | None, environment: Mapping[str, str], home: Path) -> PersonToken:
    """Return the token to ask with: `user`'s of the credentials file, else OVATION_TOKEN, else the file's only one.

    Args:
        api_url: Ovation's API; the file lists tokens by its host.
        user: an email address of the file.
        environment: where OVATION_TOKEN may be.
        home: below which the file is.

    Raises:
        ConfigurationError: there is none, or it is not clear which; never repeats a token.
    """
    given = environment.get(VARIABLE, "").strip()
    if given and user is None:
        if _is_service(given):
            raise ConfigurationError(
                f"{VARIABLE} is a service account's, and a run is asked for by a person: unset it, or name yourself"
                f" with --user EMAIL to use ~/{_FILE}"
            )
        return PersonToken(_usable(given, VARIABLE), VARIABLE)
    path = home / _FILE
    content, warning = _read(path)
    host = urlsplit(api_url).netloc
    token, email = _chosen(content, host, user, path)
    return PersonToken(_usable(token, f"{path}: the token of {email}"), f"{path}, {email}", warning)


def _read(path: Path) -> tuple[Any, str | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
                raise ConfigurationError(f"{path}: is not a file of credentials")
            content = json.loads(file.read(_MOST_BYTES))
    except FileNotFoundError:
        raise ConfigurationError(
            f"no token of yours: neither {VARIABLE} nor {path}; put"
            f' {{"HOST OF THE API": {{"EMAIL": "TOKEN"}}}} there, mode 0600'
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "its text"
        raise ConfigurationError(f"{path}: is not JSON: {where}") from None
    shared = stat.S_IMODE(status.st_mode) & _OTHERS
    return content, f"{path} is open to others: chmod 600 {path}" if shared else None


def _chosen(content: Any, host: str, user: str | None, path: Path) -> tuple[str, str]:
    if not isinstance(content, dict) or not all(isinstance(users, dict) for users in content.values()):
        raise ConfigurationError(f'{path}: must be {{"{host}": {{"EMAIL": "TOKEN"}}}}')
    users: dict[str, Any] = content.get(host, {})
    if not users:
        hosts = ", ".join(sorted(content)) or "none"
        raise ConfigurationError(f"{path}: has no token for {host} (OVATION_API_URL); the hosts there are: {hosts}")
    listed = ", ".join(sorted(users))
    if user is None and len(users) > 1:
        raise ConfigurationError(f"{path}: has several users of {host}: choose one with --user: {listed}")
    email = next(iter(users)) if user is None else user
    if email not in users:
        raise ConfigurationError(f"{path}: has no token of {email} for {host}; the users there are: {listed}")
    token = users[email]
    if not isinstance(token, str) or not token:
        raise ConfigurationError(f"{path}: the token of {email} is not a string")
    return token, email


def _usable(token: str, where: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ConfigurationError(f"{where}: has spaces, line breaks or other characters that no token has")
    return token


def _is_service(token: str) -> bool:
    """Say whether a token's own words name a service account (`sub` ends in `@clients`)."""
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError):
        return False
    return str(claims.get("sub", "")).endswith("@clients")
