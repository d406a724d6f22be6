"""Large downloads, in ranges over several connections: gone on with after whatever ends them, and right at the end."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from agent.adapters import download, ranged
from agent.adapters.download import Downloader, Fetched, part_of, partly_there
from agent.adapters.part import journal_of
from agent.adapters.traffic import Traffic
from agent.errors import StorageError, StorageMismatch, StorageRefused, StorageUnavailable
from agent.sandbox.server import Sandbox
from tests.integration.raw_server import RawServer, answer
from tests.integration.sandbox_fixtures import s3_client, until
from tests.integration.test_download import content_of, presigned, revision_of

MEBIBYTE = 1 << 20
SIZE = 40 * MEBIBYTE + 12_345
CONTENT = content_of(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs" / "reference.fa"


class Fetch:
    """One try of fetching the content, and what was told of it."""

    def __init__(self, sandbox: Sandbox, path: Path, content: bytes = CONTENT) -> None:
        self.sandbox = sandbox
        self.path = path
        self.revision = revision_of(sandbox, content)
        self.arrived = 0
        self.found = 0
        self.renewed = 0
        self.begun = asyncio.Event()

    async def __call__(self, size: int | None = SIZE, **options: Any) -> Fetched:
        self.arrived = self.found = 0
        url = await presigned(self.sandbox, self.revision)
        async with Downloader(**options) as downloader:
            return await downloader.fetch(
                url,
                self.path,
                remote=False,
                name="reference.fa",
                progress=self._progress,
                found=self._found,
                size=size,
                renew=self._renew,
            )

    async def fails(self, error: type[StorageError], words: str, **options: Any) -> None:
        with pytest.raises(error, match=f"reference.fa: .*{words}"):
            await self(**options)
        assert not self.path.exists()

    async def key(self) -> dict[str, str]:
        bucket, _, key = URL(await presigned(self.sandbox, self.revision)).path.lstrip("/").partition("/")
        return {"Bucket": bucket, "Key": key}

    def check(self, fetched: Fetched) -> None:
        assert (fetched.size, fetched.sha256) == (SIZE, SHA256)
        assert self.path.read_bytes() == CONTENT
        assert [each.name for each in self.path.parent.iterdir()] == [self.path.name]
        assert self.found + self.arrived == SIZE

    def _progress(self, count: int) -> None:
        self.arrived += count
        self.begun.set()

    def _found(self, count: int) -> None:
        self.found += count

    async def _renew(self) -> str:
        self.renewed += 1
        return await presigned(self.sandbox, self.revision)


@pytest.mark.parametrize("size", [SIZE, None])
async def test_it_comes_in_ranges_whether_its_size_is_known_or_not(
    sandbox: Sandbox, path: Path, size: int | None
) -> None:
    fetch = Fetch(sandbox, path)
    requests = sandbox.faults.add("latency", "GET ", target="store", seconds=0)
    fetch.check(await fetch(size))
    assert requests.hits > SIZE // ranged._MOST_RANGE_BYTES + 1
    assert path.stat().st_mode & 0o777 == 0o644


async def test_a_size_that_ovation_has_wrong_does_no_harm(sandbox: Sandbox, path: Path) -> None:
    small = Fetch(sandbox, path, b"")
    assert (await small(size=SIZE)).size == 0
    large = Fetch(sandbox, path)
    large.check(await large(size=5))


async def test_what_came_before_a_line_broke_is_not_fetched_again(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    broken = sandbox.faults.add("reset", "GET ", target="store", skip=4, after_bytes=1000)
    await fetch.fails(StorageUnavailable, "broke off")
    assert broken.hits >= ranged._ATTEMPTS
    there = partly_there(path)
    assert 0 < there < SIZE
    sandbox.faults.remove()
    fetch.check(await fetch())
    assert fetch.found == there


async def test_a_line_that_breaks_again_and_again_but_brings_something_is_put_up_with(
    sandbox: Sandbox, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged, "_WAIT", lambda _: 0.0)
    fetch = Fetch(sandbox, path)
    broken = sandbox.faults.add("close", "GET ", target="store", skip=1, times=40, after_bytes=MEBIBYTE)
    fetch.check(await fetch())
    assert broken.hits == 40


_KILLED = """
import asyncio, sys
from pathlib import Path
from agent.adapters import ranged
from agent.adapters.download import Downloader
ranged._CHECKPOINT_SECONDS = 0.0
async def main():
    async with Downloader() as downloader:
        await downloader.fetch(sys.argv[1], Path(sys.argv[2]), remote=False, name="x", size=int(sys.argv[3]))
asyncio.run(main())
"""


async def test_killed_in_the_middle_it_goes_on_where_it_was(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    sandbox.faults.add("drip", "GET ", target="store", skip=1, bytes_per_second=3 * MEBIBYTE)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _KILLED, await presigned(sandbox, fetch.revision), str(path), str(SIZE)),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    await until(lambda: partly_there(path) > 2 * MEBIBYTE, 60)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    sandbox.faults.remove()
    there = partly_there(path)
    fetch.check(await fetch())
    assert fetch.found == there > 2 * MEBIBYTE


async def interrupted(fetch: Fetch) -> int:
    """Cancel a fetch in the middle, and return how much of it is there."""
    fault = fetch.sandbox.faults.add("drip", "GET ", target="store", skip=1, bytes_per_second=3 * MEBIBYTE)
    task = asyncio.create_task(fetch())
    await until(lambda: fetch.arrived > MEBIBYTE, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fetch.sandbox.faults.remove(fault.id)
    return partly_there(fetch.path)


async def test_cancelled_it_stops_at_once_and_keeps_what_came(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    others = set(threading.enumerate())
    there = await interrupted(fetch)
    assert there > MEBIBYTE
    new = [each for each in threading.enumerate() if each.name.startswith("digest") and each not in others]
    await until(lambda: not any(each.is_alive() for each in new), 10)  # their work is done, and they are let go
    before = part_of(path).read_bytes()
    await asyncio.sleep(0.2)
    assert part_of(path).read_bytes() == before
    fetch.check(await fetch())
    assert fetch.found == there


async def test_what_is_there_of_another_object_is_worth_nothing(sandbox: Sandbox, path: Path) -> None:
    other = Fetch(sandbox, path, CONTENT[::-1])
    assert await interrupted(other) > 0
    fetch = Fetch(sandbox, path)
    fetch.check(await fetch())
    assert fetch.found == 0


@pytest.mark.parametrize("damage", ["nonsense", "[]", '{"size": 1}', "truncate", "gone"])
async def test_a_journal_that_makes_no_sense_costs_only_time(sandbox: Sandbox, path: Path, damage: str) -> None:
    fetch = Fetch(sandbox, path)
    await interrupted(fetch)
    journal = journal_of(part_of(path))
    if damage == "truncate":
        os.truncate(part_of(path), 10)
    elif damage == "gone":
        part_of(path).unlink()
    else:
        journal.write_text(damage)
    assert partly_there(path) == 0
    fetch.check(await fetch())
    assert fetch.found == 0


async def test_an_object_that_changes_meanwhile_is_not_put_together(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    sandbox.faults.add("drip", "GET ", target="store", skip=1, bytes_per_second=3 * MEBIBYTE)
    task = asyncio.create_task(fetch())
    await asyncio.wait_for(fetch.begun.wait(), 30)
    client = s3_client(sandbox.admin.store_environment())
    await asyncio.to_thread(client.put_object, **await fetch.key(), Body=CONTENT[::-1])
    with pytest.raises(StorageMismatch, match="it was changed in the object store"):
        await task
    assert not list(path.parent.iterdir())


async def test_an_address_that_expires_is_renewed_and_nothing_is_fetched_twice(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    sandbox.faults.add("expired_url", "GET ", target="store", skip=3, times=4)
    fetch.check(await fetch())
    assert 1 <= fetch.renewed <= 4
    assert fetch.found == 0


async def test_addresses_that_are_never_good_are_given_up(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    sandbox.faults.add("expired_url", "GET ", target="store", skip=1)
    await fetch.fails(StorageUnavailable, "its address had expired")


@pytest.mark.parametrize("size", [SIZE, 3 * MEBIBYTE])
async def test_wrong_bytes_are_fetched_again(sandbox: Sandbox, path: Path, size: int) -> None:
    fetch = Fetch(sandbox, path, CONTENT[:size])
    wrong = sandbox.faults.add("corrupt", "GET ", target="store", skip=1 if size == SIZE else 0, times=1, after_bytes=9)
    fetched = await fetch(size)
    assert wrong.hits == 1
    assert fetched.sha256 == hashlib.sha256(CONTENT[:size]).hexdigest()
    assert fetch.arrived == size


async def test_wrong_bytes_twice_are_told_with_both_digests(sandbox: Sandbox, path: Path) -> None:
    content = CONTENT[: 3 * MEBIBYTE]
    fetch = Fetch(sandbox, path, content)
    wrong = sandbox.faults.add("corrupt", "GET ", target="store", after_bytes=9)
    with pytest.raises(StorageMismatch) as caught:
        await fetch(len(content))
    assert wrong.hits == 2
    expected = hashlib.md5(content, usedforsecurity=False).hexdigest()
    assert f"the object store says {expected}" in str(caught.value)
    assert re.search("have MD5 [0-9a-f]{32}", str(caught.value))
    assert not list(path.parent.iterdir())


async def test_one_range_that_hangs_is_cut_and_fetched_again(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    hole = sandbox.faults.add("black_hole", "GET ", target="store", skip=3, times=1)
    fetch.check(await asyncio.wait_for(fetch(stall_seconds=0.5), 60))
    assert hole.hits == 1


async def test_a_slow_link_is_not_a_stall(sandbox: Sandbox, path: Path) -> None:
    size = download.RANGED_FROM_BYTES
    fetch = Fetch(sandbox, path, CONTENT[:size])
    sandbox.faults.add("drip", "GET ", target="store", skip=1, bytes_per_second=2 * MEBIBYTE)
    assert (await fetch(size, stall_seconds=0.6)).size == size


async def test_a_busy_store_is_asked_again(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    busy = sandbox.faults.add("status", "GET ", target="store", status=503, skip=2, times=3)
    fetch.check(await fetch())
    assert busy.hits == 3


async def test_what_is_refused_for_good_is_asked_for_once(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    gone = sandbox.faults.add("status", "GET ", target="store", status=404, skip=1)
    await fetch.fails(StorageRefused, "answers 404")
    assert gone.hits <= 4


@pytest.mark.parametrize("size", [SIZE, None])
async def test_a_server_that_knows_no_ranges_will_do(path: Path, size: int | None) -> None:
    async with RawServer(answer(CONTENT, ETag='"tag"')) as server, Downloader() as downloader:
        fetched = await downloader.fetch(server.url, path, remote=False, name="x", size=size)
    assert fetched.sha256 == SHA256
    assert path.read_bytes() == CONTENT


async def test_a_server_that_sends_another_range_is_not_believed(path: Path) -> None:
    first = answer(b"x", 206, ETag='"tag"', Content_Range=f"bytes 0-0/{SIZE}")
    wrong = answer(CONTENT[:100], 206, ETag='"tag"', Content_Range=f"bytes 0-99/{SIZE}")
    async with RawServer(first, wrong) as server, Downloader() as downloader:
        with pytest.raises(StorageMismatch, match="another range"):
            await downloader.fetch(server.url, path, remote=False, name="x", size=SIZE)
    assert not list(path.parent.iterdir())


class Watched(Traffic):
    """Knows how many connections there were at most."""

    most = 0

    def _let_in(self) -> None:
        super()._let_in()
        self.most = max(self.most, sum(self._held.values()))


async def test_no_more_connections_than_are_allowed(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    sandbox.faults.add("latency", "GET ", target="store", seconds=0.2)
    fetch.check(await fetch(traffic=(traffic := Watched(connections=20, job_connections=6))))
    assert traffic.most == 6


@pytest.mark.parametrize(("far_seconds", "most"), [(0.1, 4), (60.0, 1)])
async def test_with_a_server_that_is_far_away_it_begins_with_all_connections(
    sandbox: Sandbox, path: Path, monkeypatch: pytest.MonkeyPatch, far_seconds: float, most: int
) -> None:
    monkeypatch.setattr(ranged, "_FAST_BYTES_PER_SECOND", 0)  # so that none is taken later because these are slow
    monkeypatch.setattr(download, "FAR_SECONDS", far_seconds)
    fetch = Fetch(sandbox, path)
    sandbox.faults.add("latency", "GET ", target="store", seconds=0.2)
    fetch.check(await fetch(traffic=(traffic := Watched(connections=20, job_connections=4))))
    assert traffic.most == most


async def test_a_limit_of_bandwidth_is_kept(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    loop = asyncio.get_running_loop()
    began = loop.time()
    fetch.check(await fetch(traffic=Traffic(bytes_per_second=20_000_000)))
    assert loop.time() - began > SIZE / 20_000_000 * 0.8


async def test_a_disk_that_is_full_is_an_error_of_this_machine(
    sandbox: Sandbox, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Fetch(sandbox, path)
    pwrite = os.pwrite

    def full(descriptor: int, content: Any, offset: int) -> int:
        if offset > 5 * MEBIBYTE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        await fetch()
    assert not isinstance(caught.value, StorageError)
    monkeypatch.undo()
    there = partly_there(path)
    fetch.check(await fetch())
    assert fetch.found == there > 0


async def test_what_progress_raises_ends_it(sandbox: Sandbox, path: Path) -> None:
    fetch = Fetch(sandbox, path)
    url = await presigned(sandbox, fetch.revision)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with Downloader() as downloader:
        with pytest.raises(OSError, match="No space left"):
            await downloader.fetch(url, path, remote=False, name="x", size=SIZE, progress=full)
    assert json.loads(journal_of(part_of(path)).read_text())["size"] == SIZE
