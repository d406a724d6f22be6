"""The agent's own log: JSON lines in production, colours on a terminal, and never a secret."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

_SECRET_KEYS = re.compile(r"token|secret|password|authorization|credential|api_key|signature", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(?P<bearer>bearer\s+)[\w.~+/=-]+"
    r"|(?P<query>[?&](?:token|access_token|X-Amz-[\w-]+|AWSAccessKeyId|Signature)=)[^&\s\"']+"
    r"|(?P<userinfo>://[^\s/:@]*:)[^\s/@]+(?=@)"
    r"|(?P<jwt>)eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    re.IGNORECASE,
)
REDACTED = "[redacted]"


def redact(text: str) -> str:
    """Return `text` without bearer tokens, JWTs, passwords in addresses and the signed part of presigned URLs."""
    return _SECRET_TEXT.sub(lambda match: f"{match[match.lastgroup] if match.lastgroup else ''}{REDACTED}", text)


def _redact_event(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = REDACTED if _SECRET_KEYS.search(key) and value else redact(value)
    return event


def configure(
    log_format: Literal["auto", "json", "console"] = "auto",
    level: Literal["debug", "info", "warning", "error"] = "info",
) -> None:
    """Set structlog up for the process; library warnings go the same way."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not console:
        shared.append(structlog.processors.dict_tracebacks)
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if console else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, _redact_event, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _redact_event, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(logging.WARNING, logging.getLevelName(level.upper())), force=True)


def logger() -> structlog.typing.FilteringBoundLogger:
    """Return the process's logger; bind values with `structlog.contextvars`."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return bound
