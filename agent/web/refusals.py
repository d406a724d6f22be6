"""Requests that were refused leave a number and a line a minute: whoever sends many fills no log."""

from __future__ import annotations

import asyncio
from collections import Counter

from agent.logs import logger, printable

_QUIET_SECONDS = 60.0
_MOST_CHARACTERS = 200


class Refusals:
    """How many webhooks were refused, by status; told at once and then at most once a minute."""

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter()
        self._untold = 0
        self._last = ""
        self._quiet: asyncio.TimerHandle | None = None

    @property
    def total(self) -> int:
        """How many were refused since the agent started."""
        return self.by_status.total()

    def count(self, status: int, reason: str, remote: str | None) -> None:
        """Count a refusal; `reason` and where it came from stand in the next line if no other follows."""
        self.by_status[status] += 1
        self._untold += 1
        self._last = f"{status} to {remote}: {reason}"
        if self._quiet is None:
            self._speak()

    def close(self) -> None:
        """Tell of the last ones."""
        if self._quiet is not None:
            self._quiet.cancel()
        if self._untold:
            self._tell()

    def _tell(self) -> None:
        last = printable(self._last)[:_MOST_CHARACTERS]
        logger().warning("webhooks_refused", refused=self._untold, total=self.total, last=last)
        self._untold = 0

    def _be_quiet(self) -> None:
        self._quiet = asyncio.get_running_loop().call_later(_QUIET_SECONDS, self._speak)

    def _speak(self) -> None:
        self._quiet = None
        if self._untold:
            self._tell()
            self._be_quiet()
