"""What a seed decides.

A draw depends on the seed, on what it is for, and on how often that was drawn before, but on no other draw. So the
order in which the parts of a simulation happen to ask, which Python does not promise, changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Chance:
    """Draws from one seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: Counter[str] = Counter()

    def draw(self, what: str) -> float:
        """Return a number from 0 to below 1."""
        self._drawn[what] += 1
        text = f"{self._seed}/{what}/{self._drawn[what]}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / (1 << 48)

    def happens(self, probability: float, what: str) -> bool:
        """Return whether something of this probability happens."""
        return self.draw(what) < probability

    def between(self, low: float, high: float, what: str) -> float:
        """Return a number from `low` to below `high`."""
        return low + (high - low) * self.draw(what)

    def count(self, low: int, high: int, what: str) -> int:
        """Return a whole number from `low` to `high`."""
        return low + int((high - low + 1) * self.draw(what))

    def one_of(self, choices: Sequence[_T], what: str) -> _T:
        """Return one of these."""
        return choices[int(len(choices) * self.draw(what))]
