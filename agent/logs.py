"""The agent's own log: JSON lines in production, colours on a terminal, and never a secret."""

from __future__ import annotations

import logging
import re
import secrets
import sys
from collections import deque
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import structlog

REDACTED = "[redacted]"
_SECRET_KEYS = re.compile(r"token|secret|password|authorization|credential|api_key|signature", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(?P<bearer>bearer\s+)[\w.~+/=-]+"
    r"|(?P<basic>authorization\W{1,6}basic\s+)[\w+/=-]+"
    r"|(?P<query>[?&](?:token|access_token|password|sslpassword|X-Amz-[\w-]+|AWSAccessKeyId|Signature)=)[^&\s\"']+"
    r"|(?P<userinfo>://[^\s/:@]*:)[^\s/]+(?=@)"
    r"|(?P<pair>\w*(?:token|secret|password|api_key|secret_access_key)(?:=|[\"']\s*:\s*[\"']))[^\s\"'&,;]+"
    r"|(?P<jwt>)eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    re.IGNORECASE,
)
# Shorter ones stand in the middle of ordinary words.
_HIDDEN_LEAST_CHARACTERS = 6
_MOST_DEPTH = 20
_hidden: set[str] = set()


@dataclass(frozen=True, slots=True)
class Line:
    """A line of this process's log, as it was written, and its number from 1."""

    number: int
    event: Mapping[str, Any]


class Recent:
    """The last lines of this process's log, for whoever follows it from outside."""

    def __init__(self, most: int = 2000) -> None:
        self.process = secrets.token_hex(8)
        """Names the process that numbers the lines."""
        self._lines: deque[Line] = deque(maxlen=most)
        self._count = 0

    def __call__(self, _: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Keep a line on its way; nothing secret is in it any more."""
        self._count += 1
        self._lines.append(Line(self._count, dict(event)))
        return event

    def after(self, number: int) -> list[Line]:
        """Return the lines that are kept and came after that one."""
        return [line for line in tuple(self._lines) if line.number > number]


recent = Recent()


def hide(values: Iterable[str]) -> None:
    """Keep these very values out of the log, wherever they may turn up; only from 6 characters on."""
    _hidden.update(secret for secret in values if len(secret) >= _HIDDEN_LEAST_CHARACTERS)


def redact(text: str) -> str:
    """Return `text` without bearer tokens, JWTs, passwords in addresses and the signed part of presigned URLs."""
    for secret in sorted(_hidden, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return _SECRET_TEXT.sub(lambda match: f"{match[match.lastgroup] if match.lastgroup else ''}{REDACTED}", text)


def printable(text: str, keep: str = "") -> str:
    """Return `text` without control characters: names come from strangers, and a terminal obeys what it reads."""
    return "".join(
        character if character.isprintable() or character in keep else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _clean(value: Any, key: str = "", depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if key and _SECRET_KEYS.search(key):
        return REDACTED if value else value
    if depth < _MOST_DEPTH:
        if isinstance(value, Mapping):
            return {redact(str(name)): _clean(inner, str(name), depth + 1) for name, inner in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [_clean(inner, depth=depth + 1) for inner in value]
    return redact(value if isinstance(value, str) else str(value))


def _redact_event(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        event[key] = _clean(value, key)
    return event


def _for_terminals(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if not isinstance(value, bool | int | float | None):
            event[key] = printable(str(value), keep="\n" if key == "exception" else "")
    return event


def configure(
    log_format: Literal["auto", "json", "console"] = "auto",
    level: Literal["debug", "info", "warning", "error"] = "info",
) -> None:
    """Set structlog up for the process; what libraries log and warn of goes the same way."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks become text before they are redacted, and show no local variables: secrets are among them.
    last: list[structlog.typing.Processor]
    if console:
        shared.append(structlog.processors.format_exc_info)
        plain = structlog.dev.plain_traceback
        last = [
            _redact_event,
            recent,
            _for_terminals,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain),
        ]
    else:
        transform = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        shared.append(structlog.processors.ExceptionRenderer(transform))
        last = [_redact_event, recent, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(logging.WARNING, logging.getLevelName(level.upper())), force=True)
    # Its pool complains at each try while PostgreSQL is away; the worker tells of that, once.
    logging.getLogger("asyncpg").setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)


def logger() -> structlog.typing.FilteringBoundLogger:
    """Return the process's logger; bind values with `structlog.contextvars`."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return bound
