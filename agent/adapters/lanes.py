"""The connections that carry large bodies, each with a thread of its own while it is used (`agent.adapters.lane`)."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from yarl import URL

from agent.adapters.lane import CONNECT_SECONDS, KEPT_SECONDS, STALL_SECONDS, Lane

_T = TypeVar("_T")


class Lanes:
    """The lanes of one process. How many are used at once is the callers' business (`agent.adapters.traffic`)."""

    def __init__(
        self, most: int, *, connect_seconds: float = CONNECT_SECONDS, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self._connect_seconds = connect_seconds
        self._stall_seconds = stall_seconds
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="lane")
        self._idle: defaultdict[URL, list[Lane]] = defaultdict(list)
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    async def use(self, origin: URL, work: Callable[[Lane], _T]) -> _T:
        """Have work done with a connection to an origin, in a thread. Cancelled, it is cut before this returns.

        Raises:
            Broken: the connection failed.
        """
        lane = self._take(origin)
        doing = asyncio.get_running_loop().run_in_executor(self._threads, self._do, lane, work)
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            lane.cut()
            await to_its_end(doing)
            raise

    def close(self) -> None:
        """Close every connection."""
        for lanes in self._idle.values():
            for lane in lanes:
                lane.close()
        self._idle.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _do(self, lane: Lane, work: Callable[[Lane], _T]) -> _T:
        try:
            return work(lane)
        finally:
            if lane.is_free:
                lane.idle_since = time.monotonic()
                with self._lock:
                    self._idle[lane.origin].append(lane)
            else:
                lane.close()

    def _take(self, origin: URL) -> Lane:
        """Return the lane that was used last, or a new one; close those that have been idle for long."""
        expired = time.monotonic() - KEPT_SECONDS
        with self._lock:
            kept = self._idle[origin]
            old = [lane for lane in kept if lane.idle_since < expired]
            fresh = [lane for lane in kept if lane.idle_since >= expired]
            self._idle[origin] = fresh
            found = fresh.pop() if fresh else None
        for lane in old:
            lane.close()
        return found or Lane(origin, self._tls(origin), self._connect_seconds, self._stall_seconds)

    def _tls(self, origin: URL) -> ssl.SSLContext | None:
        if origin.scheme != "https":
            return None
        if self._context is None:
            self._context = ssl.create_default_context()
        return self._context


async def in_thread(work: Callable[..., _T], *arguments: object) -> _T:
    """Do work on an open file in a thread. Cancelled, this waits for its end: the file is about to be closed."""
    doing = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await to_its_end(doing)
        raise


async def to_its_end(doing: asyncio.Future[_T]) -> None:
    """Wait for the end of a thread's work, however often this is cancelled: its file is about to be closed."""
    while not doing.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({doing})
    if not doing.cancelled():
        doing.exception()
