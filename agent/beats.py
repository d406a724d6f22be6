"""Whether the agent's loops still come round: each says so itself, and whoever asks learns which has stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

_NORMAL_SECONDS = 90.0  # several times of what a turn takes while PostgreSQL does not answer


class Beats:
    """When each loop came round last.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._longest: dict[str, float] = {}

    def of(self, loop: str, longest_seconds: float = _NORMAL_SECONDS) -> Callable[[], None]:
        """Return what a loop is to call each time it comes round; longer than so many seconds apart, it is stuck."""
        self._longest[loop] = longest_seconds
        self._beat(loop)
        return partial(self._beat, loop)

    def ages(self) -> dict[str, float]:
        """Return how long ago each loop came round, in seconds."""
        now = self._clock()
        return {loop: now - last for loop, last in self._last.items()}

    def stuck(self) -> dict[str, float]:
        """Return the loops that have stopped coming round, and for how many seconds they have not."""
        return {loop: age for loop, age in self.ages().items() if age > self._longest[loop]}

    def _beat(self, loop: str) -> None:
        self._last[loop] = self._clock()
