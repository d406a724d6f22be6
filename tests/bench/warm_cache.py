"""How long a job waits for a large image that the cache has: `python -m tests.bench.warm_cache`.

A file of 10 GiB (without blocks: none of its bytes are ever looked at) is put into a cache, and staged into jobs'
directories; beside it, what a copy of 1 GiB takes on the same disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from agent.adapters.cache import Cache
from agent.adapters.download import Fetched

SIZE, COPIED = 10 << 30, 1 << 30
JOBS = 20
GOAL_SECONDS = 0.2


async def main() -> None:
    """Stage it, and print the figures."""
    with tempfile.TemporaryDirectory(prefix="ovation-bench-") as place:
        root = Path(place)
        cache = Cache(root / "cache", 2 * SIZE)

        async def fetch(target: Path) -> Fetched:
            with target.open("wb") as file:
                file.truncate(SIZE)
            return Fetched(SIZE, hashlib.sha256(b"any").hexdigest())

        seconds = []
        for number in range(JOBS + 1):
            inputs = root / f"job-{number}"
            inputs.mkdir()
            began = time.perf_counter()
            await cache.stage("image", inputs / "image.sif", fetch)
            seconds.append(time.perf_counter() - began)
        (root / "there").write_bytes(bytes(COPIED))
        began = time.perf_counter()
        await asyncio.to_thread(shutil.copyfile, root / "there", root / "copy")
        copied = time.perf_counter() - began
    warm = seconds[1:]
    sys.stdout.write(
        f"10 GiB from the cache: median {statistics.median(warm) * 1000:.1f} ms, longest {max(warm) * 1000:.1f} ms of"
        f" {JOBS}; a copy of 1 GiB: {copied * 1000:.0f} ms\n"
        f"goal < {GOAL_SECONDS * 1000:.0f} ms: {'met' if max(warm) < GOAL_SECONDS else 'NOT met'}\n"
    )


if __name__ == "__main__":
    asyncio.run(main())
