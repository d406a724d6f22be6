"""How far a step is, how fast its bytes pass, and how long the rest of them will take."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

_OVER_SECONDS = 10.0


@dataclass(slots=True)
class Progress:
    """How far a step is; the worker writes it down now and then."""

    files_total: int = 0
    bytes_total: int = 0
    files_done: int = 0
    bytes_done: int = 0
    waiting_for: str | None = None  # what a batch system keeps a run waiting for

    def document(self) -> dict[str, Any]:
        """Return how far the step is; nothing while it has not begun."""
        found = asdict(self)
        if found["waiting_for"] is None:
            del found["waiting_for"]
        return found if any(found.values()) else {}

    def add_bytes(self, count: int) -> None:
        """Count bytes that passed."""
        self.bytes_done += count


class Meter:
    """Measures a step's progress over the last ten seconds."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seen: deque[tuple[float, int]] = deque()

    def read(self, now: float) -> dict[str, Any]:
        """Return how far the step is at the time `now`, in seconds; nothing while it has not begun.

        `bytes_per_second` and `seconds_left` are there while bytes pass.
        """
        progress = self._progress
        found = progress.document()
        if not found:
            return {}
        self._seen.append((now, progress.bytes_done))
        while now - self._seen[0][0] > _OVER_SECONDS:
            self._seen.popleft()
        then, before = self._seen[0]
        passed = progress.bytes_done - before
        if now > then and passed > 0:
            found["bytes_per_second"] = round(passed / (now - then))
            left = max(0, progress.bytes_total - progress.bytes_done)
            found["seconds_left"] = round(left * (now - then) / passed)
        return found
