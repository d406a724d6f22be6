"""What a failpoint is, how it is called, and what a life is to do when it comes past one."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

_BY_THE_CLOCK = re.compile(
    r"sql:(commit of )?(claim_|lapse_|renew_|set_progress|sweep_|agent_seen)|file:open \S+/lock:",
)
_IDS = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "<id>"),
    (re.compile(r"\b[0-9a-f]{16,}\b"), "<hash>"),
    (re.compile(r"\.\d+\.\d{6,}\b"), ".<any>"),
    # One point for all the files that are there.
    (re.compile(r"(?<=/outputs/).+|(?<= tmp/).+|(?<= data/checks/).+|(?<=/<id>/<id>/)[^/?]+"), "<any>"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a life is to do at its points: note each one in the file `record`, and die at one of them.

    `kill` is the point's name, `occurrence` says which time; without a name it lives on. Only files below `places`
    count, which are named as they are to be called; `hosts` says the same of the addresses' origins.
    """

    record: str = ""
    kill: str = ""
    occurrence: int = 1
    places: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return asdict(self)


def is_by_the_clock(point: str) -> bool:
    """Say whether a point is met by the clock, or at each look for work, and not once for a step of a job."""
    return _BY_THE_CLOCK.match(point) is not None


def without_ids(text: str) -> str:
    """Return text with ids, hashes and names of temporary files taken out."""
    for pattern, sign in _IDS:
        text = pattern.sub(sign, text)
    return text


class Points:
    """Counts the points that are met, notes them, and ends the process where the plan says so."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._record = -1
        if plan.record:
            self._record = os.open(plan.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @contextmanager
    def around(self, what: str) -> Iterator[None]:
        """Meet the point before something is done, and the one after it, unless it fails."""
        point = without_ids(what)
        self._meet(f"{point}:before")
        yield
        self._meet(f"{point}:after")

    def _meet(self, point: str) -> None:
        with self._lock:
            self._counts[point] += 1
            if self._record >= 0:
                os.write(self._record, f"{point}\n".encode())
            if point == self.plan.kill and self._counts[point] == self.plan.occurrence:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # never for long
