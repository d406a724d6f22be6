"""What a sandbox can be told, and the few names that its parts share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

REGION = "us-east-1"
BUCKET = "ovation-sandbox"
MEBIBYTE = 1024 * 1024

Clock = Callable[[], float]


def research_backoff_seconds(attempt: int) -> float:
    """Return the wait after the given failed attempt (counted from 1) of a document-change webhook."""
    return float(min(60, 2 ** (attempt - 1)))


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """How webhooks are sent; the lab figures are those of Ovation's support article 350."""

    research_backoff_seconds: Callable[[int], float] = research_backoff_seconds
    research_timeout_seconds: float = 30.0
    lab_retry_seconds: tuple[float, ...] = (64.0, 729.0)
    lab_timeout_seconds: float = 10.0
    concurrency: int = 16


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """Lifetimes and limits. `clock` gives the time in seconds since the epoch."""

    token_seconds: float = 86_400.0
    presigned_seconds: int = 3_600
    upload_credentials_seconds: float = 3_600.0
    minimum_part_bytes: int = 5 * MEBIBYTE
    # one origin for API and files when false; Ovation itself serves files from a host of their own
    separate_services: bool = True
    webhooks: WebhookSettings = field(default_factory=WebhookSettings)
    clock: Clock = time.time
