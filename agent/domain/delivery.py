"""What the front door hands to the inbox, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agent.domain.webhook import Hint


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook: what it says may have changed, and the id under which its sender would repeat it."""

    hints: tuple[Hint, ...]
    message_id: str | None = None  # only where a signature vouches for it


class Receipt(StrEnum):
    """What became of a delivery. Only the first two are committed; the others are to be sent again."""

    STORED = "stored"
    REPEATED = "repeated"  # this message was stored before, and changed nothing now
    FULL = "full"
    STOPPING = "stopping"
