"""The types that settings are made of: what each refuses, and in which words. No message repeats a value."""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode
from yarl import URL

_DAY_SECONDS = 86_400
_HOST = re.compile(r"(\*\.)?[0-9A-Za-z]([0-9A-Za-z.-]{0,251}[0-9A-Za-z])?")
# What stands between `@` and the database's name: hosts with ports, several of them separated by commas, or nothing.
_HOST_AND_PORT = r"(?:\[[^\]\s]*\]|[^:,\[\]/?#@\s]*)(?::\d{1,5})?"
_POSTGRES = re.compile(
    r"postgres(?:ql)?://(?:[^@/?#\s]*@)?"
    rf"{_HOST_AND_PORT}(?:,{_HOST_AND_PORT})*"
    r"(?:/[^/?#@\s]*)?(?:\?[^#\s]*)?"
)
_MOST_ORGANIZATION = 2**31 - 1
_KEY_LEAST_BYTES = 16
_NOT_A_KEY = (
    "must be whsec_ and at least 16 bytes in base64, or several of these separated by commas;"
    ' `echo "whsec_$(openssl rand -base64 32)"` makes one'
)


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004 pydantic reports ValueError
    return value


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("must name a directory; . is the working directory")
    return value


def _a_file(value: object) -> object:
    if value == "":
        raise ValueError("must name a file")
    return value


def _url(value: str) -> URL:
    try:
        url = URL(value)
        url.port  # noqa: B018 reading it raises when it is no number
    except ValueError:
        url = URL()
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("must be an address such as https://api.ovation.io")
    if url.user or url.password:
        raise ValueError("must not carry a user name or password")
    if url.query_string or url.fragment:
        raise ValueError("must not carry a query or a fragment")
    return url


def _web_address(value: str) -> str:
    _url(value)
    return value.rstrip("/")


def _origin(value: str) -> str:
    if _url(value).path not in {"", "/"}:
        raise ValueError("must end after the host and its port: paths are the agent's own business")
    return value.rstrip("/")


def _host_or_origin(value: str) -> str:
    return _origin(value) if "://" in value else _host(value)


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError("must be a host name, *.domain, or scheme://host:port")
    return value.lower()


def _plain_host(value: str) -> str:
    if not re.fullmatch(r"[^\s/@*]+", value) or "://" in value:
        raise ValueError("must be a host name or an address, without scheme and port")
    return value.lower()


def _postgres_address(value: SecretStr) -> SecretStr:
    dsn = value.get_secret_value()
    if not dsn.startswith(("postgresql://", "postgres://")):
        raise ValueError("must start with postgresql://, for instance postgresql://agent@db.example.org/agent")
    if not _POSTGRES.fullmatch(dsn):
        raise ValueError(
            "cannot be read as postgresql://user:password@host:port/database; in the user's name and the password"
            " write / as %2F, @ as %40, ? as %3F, # as %23, % as %25, and a space as %20"
        )
    return value


def _header_token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError("must be one word of printable ASCII: is there a space or a line's end in it?")
    return value


def _credential(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().isprintable():
        raise ValueError("must not carry control characters: is there a line's end in it?")
    return value


def _user_name(value: SecretStr) -> SecretStr:
    if ":" in _credential(value).get_secret_value():
        raise ValueError("must not carry a colon: basic auth ends the user name there")
    return value


def webhook_key(secret: str) -> bytes | None:
    """Return the key in a secret of Standard Webhooks, or nothing when there is none or too short a one."""
    encoded = secret.removeprefix("whsec_").rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        return None
    return key if len(key) >= _KEY_LEAST_BYTES else None


def _webhook_secret(value: SecretStr) -> SecretStr:
    if webhook_key(value.get_secret_value()) is None:
        raise ValueError(_NOT_A_KEY)
    return value


def _split_webhook_secrets(value: object) -> object:
    split = _split(value)
    if isinstance(value, str) and not split:
        raise ValueError(_NOT_A_KEY)
    return split


def _public_key(value: str) -> str:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    pem = value.replace("\\n", "\n")  # how one line of an environment file carries several
    try:
        key = load_pem_public_key(pem.encode())
    except ValueError:
        key = None
    if not isinstance(key, RSAPublicKey):
        raise ValueError("must be an RSA public key in PEM: -----BEGIN PUBLIC KEY----- and so on")  # noqa: TRY004 as above
    return pem


def _words(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return tuple(shlex.split(value))
    except ValueError:
        raise ValueError("cannot be read as words of a shell: is a quote not closed?") from None


Text = Annotated[str, Field(min_length=1)]
Words = Annotated[tuple[Text, ...], NoDecode, BeforeValidator(_words)]
Secret = Annotated[SecretStr, Field(min_length=1)]
HeaderToken = Annotated[Secret, AfterValidator(_header_token)]
Password = Annotated[Secret, AfterValidator(_credential)]
UserName = Annotated[Secret, AfterValidator(_user_name)]
DatabaseAddress = Annotated[SecretStr, AfterValidator(_postgres_address)]
PublicKey = Annotated[str, AfterValidator(_public_key)]

WebhookSecrets = Annotated[
    tuple[Annotated[Secret, AfterValidator(_webhook_secret)], ...], NoDecode, BeforeValidator(_split_webhook_secrets)
]

Address = Annotated[str, AfterValidator(_web_address)]
Origin = Annotated[str, AfterValidator(_origin)]
HostsOrOrigins = Annotated[
    tuple[Annotated[str, AfterValidator(_host_or_origin)], ...], NoDecode, BeforeValidator(_split)
]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(_plain_host)], ...], NoDecode, BeforeValidator(_split)]
Suffixes = Annotated[
    tuple[Annotated[Text, AfterValidator(str.lower)], ...], NoDecode, BeforeValidator(_split), Field(min_length=1)
]
Organization = Annotated[int, BeforeValidator(_no_boolean), Field(ge=0, le=_MOST_ORGANIZATION)]
Organizations = Annotated[tuple[Organization, ...], NoDecode, BeforeValidator(_split), Field(min_length=1)]

File = Annotated[Path, BeforeValidator(_a_file)]
Directory = Annotated[Path, BeforeValidator(_not_empty)]
Port = Annotated[int, BeforeValidator(_no_boolean), Field(ge=0, le=65_535)]
Bytes = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=2**63 - 1)]
Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=10_000)]
Seconds = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0, le=3650 * _DAY_SECONDS, allow_inf_nan=False)]
SomeSeconds = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=3650 * _DAY_SECONDS, allow_inf_nan=False)]
