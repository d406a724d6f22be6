"""A cache of Revisions, which never change: what a thousand runs want is fetched once, also when they want it at once.

Several agents on one file system may share a cache. Whoever comes first fetches; the others wait for it, and go on with
what it has left when it is killed.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from agent.adapters.download import Fetched, partly_there
from agent.adapters.shelf import Shelf, move

_LOOK_SECONDS = 0.2  # at whether an agent elsewhere has done with a Revision
_Fetch = Callable[[Path], Awaitable[Fetched]]


class Cache:
    """One directory of Revisions, of `max_bytes` at most; 0 keeps nothing."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._shelf = Shelf(directory)
        self._max_bytes = max_bytes
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: defaultdict[str, int] = defaultdict(int)
        self._trimming = asyncio.Lock()

    async def stage(self, revision_id: str, path: Path, fetch: _Fetch, *, name: str = "") -> Fetched:
        """Put a Revision's bytes at `path`, durably, in place of what is there.

        Args:
            revision_id: whose.
            path: where; its directory exists. The file is not to be written to: others may share it.
            fetch: brings the bytes to the path that it is given, whole, verified and synced, and tells what came. It
                may leave beside it what it takes to go on with that; whoever fetches next gets the same path.
            name: what people call it, for the list.

        Raises:
            OSError: the disk refuses; and whatever `fetch` raises.
        """
        if found := await asyncio.to_thread(self._take, revision_id, path):
            return found
        await asyncio.to_thread(self._shelf.prepare)
        async with self._turn(revision_id):
            if found := await asyncio.to_thread(self._take, revision_id, path):
                return found
            incoming = self._shelf.incoming(revision_id)
            fetched = await fetch(incoming)
            if fetched.size > self._max_bytes:
                await asyncio.to_thread(move, incoming, path)
                return fetched
            kept = await asyncio.to_thread(self._shelf.put, revision_id, name, fetched.size, fetched.sha256)
            if kept is None or not await asyncio.to_thread(self._shelf.take, kept, path):
                raise FileNotFoundError(f"{self._shelf.directory} loses what is put there")
        await self.trim()
        return fetched

    def spares(self, revision_id: str, directory: Path) -> int:
        """Return for how many bytes of a Revision there need be no room in a directory, for they are there already."""
        with suppress(FileNotFoundError):
            if self._shelf.directory.stat().st_dev == directory.stat().st_dev:
                found = self._shelf.find(revision_id)
                return partly_there(self._shelf.incoming(revision_id)) if found is None else found.size
        return 0

    async def trim(self) -> int:
        """Evict what was used longest ago until the cache is no larger than it may be; return the bytes freed."""
        return await self.make_room(lambda left: left <= self._max_bytes)

    async def make_room(self, enough: Callable[[int], bool]) -> int:
        """Evict what was used longest ago, but nothing that a job uses, until it is enough; return the bytes freed.

        `enough` is told how many bytes the cache still has, in a thread.
        """
        async with self._trimming:
            return await asyncio.to_thread(self._shelf.evict, enough)

    async def sweep(self) -> None:
        """Remove what was begun and will never be asked for again."""
        await asyncio.to_thread(self._shelf.sweep)

    def _take(self, revision_id: str, path: Path) -> Fetched | None:
        entry = self._shelf.find(revision_id)
        if entry is None or not self._shelf.take(entry, path):
            return None
        return Fetched(entry.size, entry.sha256)

    @asynccontextmanager
    async def _turn(self, revision_id: str) -> AsyncIterator[None]:
        """Wait until nobody else fetches a Revision, in this process or another."""
        self._waiting[revision_id] += 1
        try:
            async with self._turns[revision_id]:
                while True:
                    with self._shelf.lock(revision_id) as is_ours:
                        if is_ours:
                            yield
                            return
                    await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._waiting[revision_id] -= 1
            if not self._waiting[revision_id]:
                del self._waiting[revision_id], self._turns[revision_id]
