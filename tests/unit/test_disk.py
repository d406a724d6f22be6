"""Room on the disk: promises that are kept, and files that count only when they are whole."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.adapters import disk
from agent.adapters.disk import Lack, Room, Space, write_whole
from agent.pipeline import staged as staged_module
from agent.pipeline.staged import Staged, append, prepare, read_record, remove_work, runs, tidy, write_manifests

GB = 1_000_000_000
IDS = ["a", "b", "c"]
sizes = st.integers(0, 2000)


class Disk:
    """A disk as large as one likes."""

    def __init__(self, total: int, free: int | None = None) -> None:
        self.total = total
        self.free = total if free is None else free

    def __call__(self, _: Path) -> Space:
        return Space(self.free, self.total)


def take(room: Room, job_id: str, needed: int, *, has_files: bool = False) -> Lack | None:
    """Take at once: nobody here makes room that would have to be waited for."""
    return asyncio.run(room.take(job_id, needed, has_files=has_files))


def room_on(measured: Disk, min_free: int = 0) -> Room:
    return Room(Path("/"), min_free, measured)


class Promises(RuleBasedStateMachine):
    """Jobs that take, land, fail and leave, on a disk of which nobody else uses anything."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk(5000)
        self.min_free = 700
        self.room = room_on(self.disk, self.min_free)
        self.outstanding: dict[str, int] = {}
        self.on_disk: dict[str, int] = dict.fromkeys(IDS, 0)

    @rule(job_id=st.sampled_from(IDS), needed=sizes)
    def take(self, job_id: str, needed: int) -> None:
        others = sum(count for other, count in self.outstanding.items() if other != job_id)
        lack = take(self.room, job_id, needed)
        assert (lack is None) == (needed == 0 or self.disk.free - others - self.min_free >= needed)
        if lack is None:
            self.outstanding[job_id] = needed
        else:
            assert 0 <= lack.free < lack.needed == needed
            self.outstanding.pop(job_id, None)

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.outstanding)))
        count = data.draw(st.integers(0, self.outstanding[job_id]))
        self.room.landed(job_id, count)
        self.disk.free -= count
        self.on_disk[job_id] += count
        self.outstanding[job_id] -= count

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A transfer breaks off, and its half-fetched file is removed."""
        job_id = data.draw(st.sampled_from(sorted(self.outstanding)))
        count = data.draw(st.integers(0, self.on_disk[job_id]))
        self.room.landed(job_id, -count)
        self.disk.free += count
        self.on_disk[job_id] -= count
        self.outstanding[job_id] += count

    @rule(job_id=st.sampled_from(IDS))
    def end(self, job_id: str) -> None:
        self.room.release(job_id)
        self.disk.free += self.on_disk[job_id]
        self.on_disk[job_id] = 0
        self.outstanding.pop(job_id, None)

    @invariant()
    def what_is_promised_is_there(self) -> None:
        promised = sum(self.outstanding.values())
        assert promised == 0 or self.disk.free - promised >= self.min_free
        assert all(count >= 0 for count in self.outstanding.values())


test_promises = Promises.TestCase


@given(sizes, st.integers(0, 2000), sizes, sizes, sizes)
def test_what_lands_beyond_a_promise_promises_no_less_to_others(
    free: int, promised: int, too_much: int, min_free: int, needed: int
) -> None:
    measured = Disk(10_000, free=promised + min_free)
    room = room_on(measured, min_free)
    assert take(room, "a", promised) is None
    room.landed("a", promised + too_much)
    measured.free = free
    lack = take(room, "b", needed)
    assert (lack is None) == (needed == 0 or free - min_free >= needed)


def test_a_need_of_nothing_fits_on_a_full_disk() -> None:
    assert take(room_on(Disk(1000, free=0), 500), "a", 0) is None


def test_a_second_promise_replaces_the_first() -> None:
    room = room_on(Disk(1000))
    assert take(room, "a", 900) is None
    assert take(room, "a", 1000) is None
    assert take(room, "b", 1) is not None
    room.release("a")
    assert take(room, "b", 1000) is None


def test_what_lands_is_not_counted_twice_and_what_is_removed_is_promised_again() -> None:
    measured = Disk(1000)
    room = room_on(measured)
    assert take(room, "a", 600) is None
    room.landed("a", 600)
    measured.free -= 600
    assert take(room, "b", 400) is None
    room.release("b")
    room.landed("a", -600)
    measured.free += 600
    assert take(room, "b", 401) is not None
    assert take(room, "b", 400) is None


def test_reasons_are_for_people() -> None:
    assert str(take(room_on(Disk(99 * GB, free=4_190_000_000), GB), "a", 12_340_000_000)) == (
        "waiting for disk space: 13 GB are needed, the agent's disk can give 3.1 GB now"
    )
    assert str(take(room_on(Disk(9 * GB), GB), "a", 12_340_000_000)) == (
        "waiting for disk space: 13 GB are needed, the agent's whole disk can give 8.0 GB"
    )
    assert str(Lack(needed=1, free=0, most=999)).endswith("1 B are needed, the agent's disk can give 0 B now")


@given(st.integers(0, 10**19), st.integers(1, 10**19), st.integers(0, 10**19))
def test_what_is_needed_never_reads_like_what_there_is(free: int, more: int, most: int) -> None:
    needed, given_ = re.findall(r"([\d.]+ [kMGTPE]?B)", str(Lack(free + more, free, max(free, most))))
    units = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15, "EB": 10**18}

    def value(text: str) -> float:
        number, unit = text.split()
        return float(number) * units[unit]

    assert value(needed) > value(given_)
    assert value(needed) <= (free + more) * 1.11 + 1


def test_room_is_made_before_anybody_waits() -> None:
    measured = Disk(1000, free=100)
    room = room_on(measured)
    made: list[int] = []

    async def clear(enough: Callable[[], bool]) -> None:
        while not enough() and len(made) < 8:
            made.append(100)
            measured.free += 100

    room.clear = clear
    assert take(room, "a", 350) is None
    assert made == [100, 100, 100]
    room.release("a")
    assert take(room, "b", 1001) is not None
    assert len(made) == 3  # nothing is removed for what can never fit


def test_who_waits_is_remembered_with_its_need() -> None:
    room = room_on(Disk(1000))
    assert room.needed_by("a") is None
    assert take(room, "a", 2000) is not None
    assert room.needed_by("a") == 2000
    assert take(room, "a", 500) is None
    assert room.needed_by("a") is None
    take(room, "a", 2000)
    room.forget("a")
    assert room.needed_by("a") is None


def test_of_those_that_wait_for_each_others_room_one_keeps_its_files() -> None:
    room = room_on(Disk(1000, free=0))
    take(room, "empty", 500)
    take(room, "first", 500, has_files=True)
    take(room, "second", 500, has_files=True)
    assert [room.gives_way(each) for each in ("empty", "first", "second")] == [False, False, True]
    take(room, "first", 500, has_files=True)  # to ask again is not to stand at the end again
    assert [room.gives_way(each) for each in ("first", "second")] == [False, True]
    room.forget("first")
    assert not room.gives_way("second")


def test_the_memory_of_who_waits_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_MOST_WAITING", 3)
    room = room_on(Disk(1000, free=0))
    for name in "abcd":
        take(room, name, 1)
    assert [room.needed_by(name) for name in "abcd"] == [None, 1, 1, 1]


def test_transfers_stop_before_the_disk_is_full() -> None:
    measured = Disk(1000, free=100)
    room = room_on(measured, 100)
    room.check()
    measured.free = 49
    with pytest.raises(OSError, match="No space left") as raised:
        room.check()
    assert raised.value.errno == errno.ENOSPC


def test_a_real_disk_is_measured(tmp_path: Path) -> None:
    found = disk.space(tmp_path)
    assert 0 < found.free <= found.total
    assert Room(tmp_path, 0)._lack("a", found.total + 1) is not None


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ("x" * 255)
    write_whole(path, b"first")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"first", 0o644)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_counts_only_after_its_bytes_and_its_name_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        where = Path(f"/proc/self/fd/{descriptor}").readlink()
        order.append(f"sync {'directory' if where.is_dir() else 'file'}")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        order.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write_whole(tmp_path / "name", b"content")
    assert order == ["sync file", "rename", "sync directory"]


def put(root: Path, name: str, content: bytes = b"some data") -> Staged:
    staged = Staged("inputs", name, name, "Revision", f"id of {name}", len(content), "0" * 64)
    write_whole(root / "inputs" / name, content)
    append(root, [staged])
    return staged


def test_what_a_full_disk_cut_short_does_not_count(tmp_path: Path) -> None:
    prepare(tmp_path)
    first = put(tmp_path, "first")
    with (tmp_path / "staged.jsonl").open("a") as record:
        record.write('{"folder": "inputs", "file_name": "torn", "na')
    second = put(tmp_path, "second")
    assert read_record(tmp_path) == {("inputs", "first"): first, ("inputs", "second"): second}


@pytest.mark.parametrize("harm", ["shorter", "gone", "link", "directory"])
def test_what_is_not_there_as_the_record_says_does_not_count(tmp_path: Path, harm: str) -> None:
    prepare(tmp_path)
    put(tmp_path, "file")
    path = tmp_path / "inputs" / "file"
    match harm:
        case "shorter":
            path.write_bytes(b"some")
        case "gone":
            path.unlink()
        case "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        case "directory":
            path.unlink()
            path.mkdir()
    assert read_record(tmp_path) == {}


@given(st.binary(max_size=300))
def test_a_record_of_anything_is_read(content: bytes) -> None:
    root = Path("/nowhere")
    assert staged_module._parse(root, content) == {}


def test_what_does_not_count_leaves_and_what_counts_stays(tmp_path: Path) -> None:
    prepare(tmp_path)
    staged = put(tmp_path, ".0123456789abcdef0123456789abcdef.part")  # as people may name a file
    (tmp_path / "inputs" / f".{'f' * 32}.part").write_bytes(b"half")
    (tmp_path / "related" / "not on record").write_bytes(b"whole, perhaps")
    write_manifests(tmp_path, [staged])
    for number in (1, 2, 3):
        for name in ("outputs", "scratch", "private"):
            (tmp_path / f"run-{number}" / name / "inner").mkdir(parents=True)
        for name in ("stdout.log", "exit.json"):
            (tmp_path / f"run-{number}" / name).touch()
    tidy(tmp_path, read_record(tmp_path), launch=3)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()} == {
        "staged.jsonl",
        f"inputs/{staged.file_name}",
        *(f"run-{number}/{name}" for number in (1, 2, 3) for name in ("stdout.log", "exit.json")),
    }
    assert sorted(path.name for path in tmp_path.glob("run-*/*") if path.is_dir()) == ["outputs", "private", "scratch"]
    assert (tmp_path / "run-3" / "outputs" / "inner").is_dir()


def test_logs_and_records_stay_and_no_link_is_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "job", tmp_path / "outside"
    (outside / "run-7" / "outputs").mkdir(parents=True)
    (root / "run-1" / "outputs").mkdir(parents=True)
    prepare(root)
    put(root, "file")
    (root / "run-1" / "stdout.log").touch()
    (root / "run-1" / "linked").symlink_to(outside)
    (root / "run-2").symlink_to(outside / "run-7")
    (root / "run-1" / "outputs" / "link").symlink_to(outside)
    assert [number for number, _ in runs(root)] == [1]
    assert remove_work(root)
    assert not remove_work(root)
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == [
        "run-1",
        "run-1/linked",
        "run-1/stdout.log",
    ]
    assert (outside / "run-7" / "outputs").is_dir()
    assert not remove_work(tmp_path / "nothing")
