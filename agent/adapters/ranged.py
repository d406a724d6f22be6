"""One large object to disk: in ranges over several connections, hashed on the way, gone on with after a crash.

One connection to S3 is slow, and a machine's own cores are what several fast ones would fight for. So it begins with a
few, and takes more for as long as each of them is slow.
"""

from __future__ import annotations

import asyncio
import http.client
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import tenacity
from yarl import URL

from agent.adapters.circuit import PATIENCE_SECONDS
from agent.adapters.lane import Broken, Lane
from agent.adapters.lanes import Lanes, in_thread, to_its_end
from agent.adapters.objects import ERROR_BYTES, AddressExpired, refuse
from agent.adapters.part import Part, Range
from agent.adapters.traffic import Traffic
from agent.errors import StorageMismatch, StorageUnavailable

_FIRST_AT_ONCE = {"http": 1, "https": 2}  # what a machine's own cores are best used with; TLS takes more of one
FAR_SECONDS = 0.01
"""A server that takes longer than this to answer is far away, and one connection to it is slow."""
_FAST_BYTES_PER_SECOND = 100_000_000  # of one connection: with more of them nothing would be won
_LEAST_RANGE_BYTES = 4 << 20
_MOST_RANGE_BYTES = 32 << 20
_RANGES_EACH = 3  # for each connection, so that they end together
_TICK_SECONDS = 0.05
_CHECKPOINT_SECONDS = 2.0
_WINDOW_BYTES = 1 << 30  # so far the ranges may be ahead of the digests, that these find their bytes in memory
_ATTEMPTS = 4  # of one range without any progress
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_OK, _PARTIAL, _CHANGED = 200, 206, 412


@dataclass(slots=True)
class Address:
    """A presigned address, which expires, and how to get the next one."""

    url: URL
    renew: Callable[[], Awaitable[URL]] | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def renewed(self, expired: URL) -> None:
        """See that the address is another than the one that has expired, where another can be had."""
        async with self._lock:
            if self.url == expired and self.renew is not None:
                self.url = await self.renew()


def range_bytes(size: int, at_once: int) -> int:
    """Return how long the ranges of an object of `size` bytes are: asking for one is to take no time to speak of."""
    return min(_MOST_RANGE_BYTES, max(_LEAST_RANGE_BYTES, size // (_RANGES_EACH * at_once)))


class RangedDownload:
    """One object on its way into its part-file.

    Args:
        lanes: what carries it.
        traffic: who may use how many of them.
        job: on whose account.
        address: where it is.
        part: where it goes.
        progress: told the number of bytes that arrived, in the event loop.
        is_far: whether to begin with all connections that there may be, instead of seeing first how fast one is.
    """

    def __init__(
        self,
        lanes: Lanes,
        traffic: Traffic,
        job: str,
        address: Address,
        part: Part,
        *,
        progress: Callable[[int], None],
        is_far: bool = False,
    ) -> None:
        self._lanes = lanes
        self._traffic = traffic
        self._job = job
        self._address = address
        self._part = part
        self._progress = progress
        self._is_far = is_far
        self._to_come = [each for each in part.ranges if each.at < each.end]
        self._workers = 0
        self._all_came = asyncio.Event()
        self._lacking = part.lacking

    async def run(self, *algorithms: str) -> list[str]:
        """Fetch what is lacking, and return the digests of the whole.

        Raises:
            StorageError: it cannot be had now, or not as promised; what came stays.
            OSError: the disk refuses.
        """
        loop = asyncio.get_running_loop()
        readers = ThreadPoolExecutor(len(algorithms), thread_name_prefix="digest")
        takes = len(algorithms) == 1
        reading = [partial(self._part.digest, each, takes_pieces=takes) for each in algorithms]
        digests = [loop.run_in_executor(readers, each) for each in reading]
        try:
            if self._to_come:
                await self._fetch()
            return await asyncio.gather(*digests)
        finally:
            self._part.end()
            for digest in digests:
                await to_its_end(digest)
            readers.shutdown(wait=False)

    async def _fetch(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                few = _FIRST_AT_ONCE[self._address.url.scheme]
                self._begin(group, self._traffic.job_connections if self._is_far else few)
                watching = group.create_task(self._watch(group))
                await self._all_came.wait()
                watching.cancel()
            self._tell()
        except ExceptionGroup as errors:
            await in_thread(self._note)
            raise errors.exceptions[0] from None
        except BaseException:
            await in_thread(self._note)
            raise

    def _begin(self, group: asyncio.TaskGroup, count: int) -> None:
        for _ in range(min(count, len(self._to_come), self._traffic.job_connections - self._workers)):
            self._workers += 1
            group.create_task(self._work())

    async def _work(self) -> None:
        while self._to_come:
            if self._is_far_ahead(self._to_come[0]):
                await asyncio.sleep(_TICK_SECONDS)
            else:
                await self._bring(self._to_come.pop(0))
        self._workers -= 1
        if not self._workers:
            self._all_came.set()

    def _is_far_ahead(self, each: Range) -> bool:
        return each.start - min(self._part.digested.values(), default=0) > _WINDOW_BYTES

    async def _watch(self, group: asyncio.TaskGroup) -> None:
        """Tell the progress, take more connections while they are slow, and note now and then what is there."""
        noted_at = told_at = time.monotonic()
        noting = asyncio.create_task(asyncio.sleep(0))
        try:
            while True:
                await asyncio.sleep(_TICK_SECONDS)
                now = time.monotonic()
                speed = self._tell() / (now - told_at)
                told_at = now
                if speed < self._workers * _FAST_BYTES_PER_SECOND:
                    self._begin(group, self._traffic.job_connections)
                if now - noted_at > _CHECKPOINT_SECONDS and noting.done():
                    noting.result()
                    noted_at = now
                    noting = asyncio.create_task(asyncio.to_thread(self._part.checkpoint))
        finally:
            await to_its_end(noting)

    def _tell(self) -> int:
        lacking = self._part.lacking
        arrived, self._lacking = self._lacking - lacking, lacking
        if arrived:
            self._progress(arrived)
        return arrived

    def _note(self) -> None:
        with suppress(OSError):  # whatever ends this says so already
            self._part.checkpoint()

    async def _bring(self, each: Range) -> None:
        """Fetch a range to its end; what fails is tried again, from where it has come to."""
        retrying = tenacity.AsyncRetrying(
            stop=_NoProgress(each),
            wait=_wait_seconds,
            retry=tenacity.retry_if_exception(_soon_passes),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await self._try(each)

    async def _try(self, each: Range) -> None:
        url = self._address.url
        try:
            async with self._traffic.connection(self._job):
                await self._lanes.use(url.origin(), lambda lane: self._carry(lane, url, each))
        except AddressExpired:
            await self._address.renewed(url)
            raise
        except Broken as error:
            raise StorageUnavailable(str(error)) from None

    def _carry(self, lane: Lane, url: URL, each: Range) -> None:
        """Fetch what is lacking of a range, in a lane's thread."""
        headers = {"Range": f"bytes={each.at}-{each.end - 1}", "If-Match": self._part.etag}
        response = lane.get(url.raw_path_qs, headers)
        if response.status in {_OK, _CHANGED}:
            raise StorageMismatch("it was changed in the object store while it was fetched")
        if response.status != _PARTIAL:
            refuse(response.status, response.headers, lane.read_all(response, ERROR_BYTES), remote=False)
        self._check(response, each)
        while each.at < each.end:
            with self._part.buffer() as buffer:
                piece = lane.read(response, each.end - each.at, buffer.bytes)
                if not piece:
                    raise Broken("the transfer broke off (it ended too soon)")
                self._part.write(each, piece, buffer)
            if seconds := self._traffic.delay_seconds(len(piece), "down"):
                lane.pause(seconds)

    def _check(self, response: http.client.HTTPResponse, each: Range) -> None:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        wanted = (each.at, each.end - 1, self._part.size)
        etag = response.headers.get("ETag", self._part.etag)
        if found is None or tuple(map(int, found.groups())) != wanted or etag != self._part.etag:
            raise StorageMismatch("its server sends another range than it was asked for")


_WAIT = tenacity.wait_random_exponential(multiplier=0.2, max=3)


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    """Return how long to wait, and no less than the store asks for."""
    error = state.outcome.exception() if state.outcome else None
    return max(_WAIT(state), getattr(error, "retry_after_seconds", None) or 0.0)


def _soon_passes(error: BaseException) -> bool:
    return isinstance(error, StorageUnavailable) and (error.retry_after_seconds or 0.0) <= PATIENCE_SECONDS


class _NoProgress(tenacity.stop.stop_base):
    """Stops when a range was tried so often without a single byte."""

    def __init__(self, each: Range) -> None:
        self._range = each
        self._reached = each.at
        self._failures = 0

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        del retry_state
        self._failures = 1 if self._range.at > self._reached else self._failures + 1
        self._reached = self._range.at
        return self._failures >= _ATTEMPTS
