"""Files that have come, made to count: several at once, because a disk takes as long for many as for one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from agent.adapters.disk import sync_directory
from agent.pipeline.staged import Staged, append


class Landing:
    """One job's. A file's bytes are durable before it is brought here; here its name becomes so, and then its line."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._waiting: list[tuple[Staged, asyncio.Future[None]]] = []
        self._landing: asyncio.Task[None] | None = None

    async def land(self, staged: Staged) -> None:
        """Have a file count.

        Raises:
            OSError: the disk refuses; it does not count.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((staged, done))
        if self._landing is None or self._landing.done():
            self._landing = asyncio.create_task(self._land_all())
        await done

    async def _land_all(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._write, [staged for staged, _ in group])
            except OSError as error:
                for _, done in group:
                    if not done.done():
                        done.set_exception(error)
            else:
                for _, done in group:
                    if not done.done():
                        done.set_result(None)

    def _write(self, group: Iterable[Staged]) -> None:
        group = list(group)
        for folder in {staged.folder for staged in group}:
            sync_directory(self._root / folder)
        append(self._root, group)
