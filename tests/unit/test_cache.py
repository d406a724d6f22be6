"""The cache of Revisions: fetched once whoever wants it, never damaged, never too large, never without what is used."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.adapters import shelf as shelf_module
from agent.adapters.cache import Cache
from agent.adapters.download import Fetched
from agent.adapters.shelf import Shelf, key_of
from agent.errors import StorageUnavailable

MANY = 10**9
NAMES = st.text(max_size=40)


class Office:
    """A cache, jobs that want Revisions, and a store that counts what is fetched from it."""

    def __init__(self, directory: Path, max_bytes: int = MANY) -> None:
        self.directory = directory
        self.jobs = directory / "jobs"
        self.jobs.mkdir(exist_ok=True)
        self.cache = Cache(directory / "cache", max_bytes)
        self.shelf = Shelf(directory / "cache")
        self.fetched: Counter[str] = Counter()
        self.errors: list[Exception] = []
        self.gate: asyncio.Event | None = None

    async def stage(self, revision_id: str, job: str, content: bytes | None = None) -> Path:
        wanted = revision_id.encode(errors="replace") if content is None else content

        async def fetch(target: Path) -> Fetched:
            self.fetched[revision_id] += 1
            target.write_bytes(wanted)
            if self.gate is not None:
                await self.gate.wait()
            if self.errors:
                raise self.errors.pop(0)
            return Fetched(len(wanted), hashlib.sha256(wanted).hexdigest())

        path = self.jobs / job
        fetched = await self.cache.stage(revision_id, path, fetch, name=f"{revision_id}.sif")
        assert path.read_bytes() == wanted
        assert (fetched.size, fetched.sha256) == (len(wanted), hashlib.sha256(wanted).hexdigest())
        return path

    def ids(self) -> list[str]:
        return [entry.revision_id for entry in self.shelf.entries()]

    def size(self) -> int:
        return sum({entry.sha256: entry.size for entry in self.shelf.entries()}.values())

    def age(self, revision_id: str, seconds: float) -> None:
        record = self.directory / "cache" / "revisions" / f"{key_of(revision_id)}.json"
        os.utime(record, (time.time() - seconds, time.time() - seconds))

    def blob(self, revision_id: str) -> Path:
        found = self.shelf.find(revision_id)
        assert found is not None
        return self.shelf.blob(found.sha256)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


async def test_what_was_fetched_once_is_there_for_the_next(office: Office) -> None:
    first = await office.stage("image", "a")
    second = await office.stage("image", "b")
    assert office.fetched == {"image": 1}
    assert first.samefile(second)
    assert first.stat().st_mode & 0o777 == 0o444
    first.unlink()
    assert second.read_bytes() == b"image"
    assert [path.name for path in office.jobs.iterdir()] == ["b"]


async def test_twenty_that_want_it_at_once_have_it_fetched_once(office: Office) -> None:
    office.gate = asyncio.Event()
    staging = [asyncio.create_task(office.stage("image", str(number))) for number in range(20)]
    while not office.fetched:  # noqa: ASYNC110 turn by turn
        await asyncio.sleep(0)
    office.gate.set()
    await asyncio.gather(*staging)
    assert office.fetched == {"image": 1}
    assert not list((office.directory / "cache" / "locks").iterdir())


async def test_others_take_over_from_one_that_fails_and_one_that_is_cancelled(office: Office) -> None:
    office.gate = asyncio.Event()
    office.errors = [StorageUnavailable("away")]
    first = asyncio.create_task(office.stage("image", "a"))
    while not office.fetched:  # noqa: ASYNC110 turn by turn
        await asyncio.sleep(0)
    others = [asyncio.create_task(office.stage("image", name)) for name in "bc"]
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    office.gate.set()
    results = await asyncio.gather(*others, return_exceptions=True)
    assert sorted(type(each).__name__ for each in results) == ["PosixPath", "StorageUnavailable"]
    assert office.fetched == {"image": 3}


async def test_who_waits_may_go_away(office: Office) -> None:
    office.gate = asyncio.Event()
    first = asyncio.create_task(office.stage("image", "a"))
    second = asyncio.create_task(office.stage("image", "b"))
    await asyncio.sleep(0.05)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    office.gate.set()
    await first


async def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    office = Office(tmp_path, max_bytes=30)
    for number, name in enumerate("abc"):
        (await office.stage(name, name, name.encode() * 10)).unlink()
        office.age(name, 1000 - number)
    (await office.stage("a", "again", b"a" * 10)).unlink()
    (await office.stage("d", "d", b"d" * 10)).unlink()
    assert sorted(office.ids()) == ["a", "c", "d"]
    assert office.fetched["a"] == 1


async def test_what_a_job_uses_stays(tmp_path: Path) -> None:
    office = Office(tmp_path, max_bytes=25)
    used = await office.stage("used", "job", b"u" * 20)
    office.age("used", 1000)
    (await office.stage("new", "b", b"n" * 20)).unlink()
    assert office.ids() == ["used", "new"]
    await office.cache.make_room(lambda _: False)
    assert office.ids() == ["used"]
    used.unlink()
    assert await office.cache.make_room(lambda _: False) == 20
    assert office.ids() == []
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", ["shorter", "gone", "written", "link", "record", "foreign record"])
async def test_a_damaged_entry_is_replaced(office: Office, tmp_path: Path, damage: str) -> None:
    (await office.stage("image", "a")).unlink()
    blob, record = office.blob("image"), next((tmp_path / "cache" / "revisions").iterdir())
    if damage == "shorter":
        os.truncate(blob, 2)
    elif damage == "gone":
        blob.unlink()
    elif damage == "written":
        blob.write_bytes(b"other")
        os.utime(blob, (1, 1))
    elif damage == "link":
        (tmp_path / "victim").write_bytes(b"image")
        blob.unlink()
        blob.symlink_to(tmp_path / "victim")
    elif damage == "record":
        record.write_text('{"size": 5')
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"revision_id": "another"}))
    await office.stage("image", "b")
    assert office.fetched["image"] == 2
    await office.stage("image", "c")
    assert office.fetched["image"] == 2


async def test_a_flipped_bit_is_found_when_all_is_read(office: Office) -> None:
    for name in ("good", "bad"):
        (await office.stage(name, name)).unlink()
    blob = office.blob("bad")
    status = blob.stat()
    blob.chmod(0o600)
    blob.write_bytes(b"bAd")
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))
    whole = {entry.revision_id: office.shelf.is_whole(entry) for entry in office.shelf.entries()}
    assert whole == {"good": True, "bad": False}
    assert office.ids() == ["good"]
    await office.stage("bad", "again")
    assert office.fetched["bad"] == 2


async def test_two_revisions_with_the_same_bytes_share_them(office: Office) -> None:
    first = await office.stage("one", "a", b"same")
    second = await office.stage("two", "b", b"same")
    third = await office.stage("one", "c", b"same")
    assert office.fetched == {"one": 1, "two": 1}
    assert second.samefile(third)
    assert office.size() == 4
    for path in (first, second, third):
        path.unlink()
    office.age("one", 100)
    office.cache = Cache(office.directory / "cache", 4)
    assert await office.cache.trim() == 0
    assert sorted(office.ids()) == ["one", "two"]
    assert await office.cache.make_room(lambda _: False) == 4


@pytest.mark.parametrize("error", [errno.EMLINK, errno.EPERM, errno.EXDEV])
async def test_where_a_file_can_have_no_second_name_it_is_copied(
    office: Office, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    first, second = await office.stage("image", "a"), await office.stage("image", "b")
    assert not first.samefile(second)
    assert office.fetched == {"image": 1}
    assert first.stat().st_mode & 0o777 == 0o444
    monkeypatch.undo()


async def test_across_file_systems_it_is_copied(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"ovation-tests-{os.getpid()}"  # noqa: S108 another file system is what is wanted
    other.mkdir()
    try:
        assert other.stat().st_dev != tmp_path.stat().st_dev
        for most in (MANY, 0):
            office = Office(tmp_path, most)
            office.jobs = other
            content = os.urandom(3_000_000)
            assert (await office.stage(f"image-{most}", "a", content)).stat().st_dev == other.stat().st_dev
            assert office.cache.spares(f"image-{most}", other) == 0
    finally:
        for path in other.iterdir():
            path.unlink()
        other.rmdir()


async def test_what_is_larger_than_the_cache_passes_through(tmp_path: Path) -> None:
    office = Office(tmp_path, max_bytes=4)
    await office.stage("large", "a")
    await office.stage("large", "b")
    assert office.fetched == {"large": 2}
    assert office.ids() == []
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


async def test_what_stood_there_is_replaced_and_nothing_is_written_through(office: Office, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (office.jobs / "a").symlink_to(tmp_path / "victim")
    await office.stage("image", "a")
    (office.jobs / "a").unlink()
    (office.jobs / "a").write_text("old")
    await office.stage("image", "a")
    assert (tmp_path / "victim").read_text() == "precious"


async def test_a_disk_that_refuses_leaves_nothing_half(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shelf_module, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            await office.stage("image", "a")
    assert not list(office.jobs.iterdir())
    await office.stage("image", "a")
    assert office.fetched == {"image": 2}


async def test_it_says_for_how_much_there_need_be_no_room(office: Office) -> None:
    assert office.cache.spares("image", office.jobs) == 0
    await office.stage("image", "a")
    assert office.cache.spares("image", office.jobs) == 5


async def test_the_sweep_removes_what_nobody_will_ask_for_again(office: Office) -> None:
    await office.stage("image", "a")
    cache = office.directory / "cache"
    stray = cache / "blobs" / "ab" / ("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    left = [cache / "incoming" / ".x.part", cache / "incoming" / ".x.part.json", cache / "locks" / "x", stray]
    for path in left:
        path.write_text("x")
    await office.cache.sweep()
    assert all(path.exists() for path in left), "somebody may be at it"
    later = time.time() + 2 * 86_400
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time", lambda: later)
        await office.cache.sweep()
    assert not any(path.exists() for path in left)
    assert office.ids() == ["image"]


@given(NAMES)
def test_no_name_leads_out_of_the_directory(tmp_path_factory: pytest.TempPathFactory, revision_id: str) -> None:
    directory = tmp_path_factory.mktemp("names")
    office = Office(directory)
    asyncio.run(office.stage(revision_id, "job"))
    assert {path.name for path in directory.iterdir()} == {"cache", "jobs"}
    assert office.ids() == [revision_id]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["stage", "end", "evict", "spoil"]), st.sampled_from("abcd"), st.integers(0, 3)),
        max_size=25,
    ),
    st.integers(0, 40),
)
def test_whatever_happens_it_is_no_larger_than_it_may_be_but_for_what_is_used(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]], most: int
) -> None:
    async def run() -> None:
        office = Office(tmp_path_factory.mktemp("office"), most)
        for what, name, job in steps:
            path = office.jobs / f"{name}{job}"
            if what == "stage":
                await office.stage(name, path.name, name.encode() * 10)
            elif what == "end":
                path.unlink(missing_ok=True)
            elif what == "evict":
                await office.cache.make_room(lambda left: left <= 10)
            elif office.shelf.find(name):
                office.blob(name).unlink()
        for path in office.jobs.iterdir():
            assert path.read_bytes() == path.name[0].encode() * 10
        used = sum(entry.size for entry in office.shelf.entries() if entry.in_use)
        await office.cache.trim()
        assert office.size() <= max(most, used)

    asyncio.run(run())


def test_locks_are_one_holders(tmp_path: Path) -> None:
    one, two = Shelf(tmp_path), Shelf(tmp_path)
    one.prepare()
    with one.lock("x") as first, two.lock("x") as second, two.lock("y") as other:
        assert (first, second, other) == (True, False, True)
    with two.lock("x") as again:
        assert again


def test_a_lock_whose_file_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path)
    shelf.prepare()
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        (tmp_path / "locks" / key_of("x")).unlink()  # by the one who had it until now
        flock(descriptor, how)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", late)
        with shelf.lock("x") as is_ours:
            assert not is_ours
    with shelf.lock("x") as is_ours:
        assert is_ours
