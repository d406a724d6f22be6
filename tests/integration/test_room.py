"""Room on the disk: jobs wait for it instead of filling it, a full disk is survived, and nothing stays for ever."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.adapters import runner
from agent.adapters.disk import space
from agent.sandbox.faults import Fault, FaultKind
from tests.agents import agent_environment, until
from tests.lab import Lab, laboratory

MB = 1_000_000
PRETENDED = """
    import errno, os
    from pathlib import Path

    ROOT, SIZE = Path({root!r}), {size}
    statvfs, write = os.statvfs, os.write

    def used():
        return sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file())

    def small_statvfs(path):
        if not Path(path).is_relative_to(ROOT):
            return statvfs(path)
        fields = list(statvfs(path))
        fields[:5] = [1, 1, SIZE, max(0, SIZE - used()), max(0, SIZE - used())]
        return os.statvfs_result(fields)

    def small_write(descriptor, content):
        where = os.readlink("/proc/self/fd/%d" % descriptor)
        if where.startswith(str(ROOT)) and used() + len(content) > SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    os.statvfs, os.write = small_statvfs, small_write
"""


@dataclass(frozen=True)
class SmallDisk:
    """A file system with little room; where none may be mounted, one that the agent takes for such a one."""

    root: Path
    size: int
    environment: dict[str, str]

    def fill(self) -> Path:
        """Have another process use up all that is free, and return what it wrote."""
        filler = self.root / "filler"
        used = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        free = self.size - used if self.environment else space(self.root).free
        subprocess.run(["sh", "-c", f"head -c {free} /dev/zero > {filler}"], check=False, stderr=subprocess.DEVNULL)
        return filler


@contextmanager
def small_disk(root: Path, size: int) -> Iterator[SmallDisk]:
    root.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        try:
            yield SmallDisk(root, size, {})
        finally:
            subprocess.run(["umount", "--lazy", str(root)], check=True)
    else:
        site = root.parent / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(textwrap.dedent(PRETENDED.format(root=str(root), size=size)))
        yield SmallDisk(root, size, {"PYTHONPATH": ":".join([str(site), *sys.path])})


@asynccontextmanager
async def small_laboratory(
    directory: Path, database_url: str, size: int, **settings: str
) -> AsyncIterator[tuple[Lab, SmallDisk]]:
    """Open a laboratory whose agent has little room; its database is elsewhere, for it survives no full disk."""
    settings["AGENT_DATABASE_URL"] = database_url
    environment = agent_environment({"OVATION_TOKEN": "any"}, directory / "agent", **settings)
    migrate = await asyncio.create_subprocess_exec(sys.executable, "-m", "agent", "migrate", env=environment)
    assert await migrate.wait() == 0
    with small_disk(directory / "agent" / "data", size) as disk:
        async with laboratory(directory, **settings, **disk.environment) as lab:
            yield lab, disk


def count(lab: Lab, what: str) -> Fault:
    """Count the requests for a file's bytes."""
    return lab.sandbox.faults.add(FaultKind.LATENCY, f"GET .*{what}", target="store", seconds=0)


def job_directory(lab: Lab, job: dict[str, Any]) -> Path:
    return lab.data_dir / "jobs" / str(job["id"])


async def reason(lab: Lab, activity_id: str, words: str) -> dict[str, Any]:
    """Wait until an Activity's job waits for something with these words, and return it."""

    async def look() -> dict[str, Any] | None:
        jobs = await lab.agent.jobs(activity_id)
        return jobs[0] if jobs and words in (jobs[0]["waiting_for"] or "") else None

    return await until(look, f"a job that waits for {words!r}", lab.agent.log)


async def gone(lab: Lab, path: Path) -> None:
    async def look() -> bool | None:
        return None if path.exists() else True

    await until(look, f"{path} is removed", lab.agent.log)


def left(directory: Path) -> set[str]:
    """Return what is in a job's directory and is no record of the runner."""
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.suffix != ".json" and path.name not in {"lock", "claim"}
    }


async def test_a_job_waits_for_room_and_fetches_nothing(tmp_path: Path) -> None:
    async with laboratory(tmp_path, AGENT_MIN_FREE_BYTES=str(10**18)) as lab:
        fetched = count(lab, "")
        activity_id = lab.activity("true", inputs=[lab.revision("reads.bin", b"r" * 3_210_000)])
        job = await reason(lab, activity_id, "disk space")
        assert "MB are needed, the agent's whole disk can give 0 B" in job["waiting_for"]
        assert (job["state"], job["attempt"]) == ("staging", 0)
        assert fetched.hits == 0
        assert not job_directory(lab, job).exists()
        assert (await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel"))[0] == 202
        job = await lab.agent.job(activity_id)
        assert (job["state"], job["verdict"], job["attempt"]) == ("cancelled", "cancelled", 0)
        assert fetched.hits == 0


async def test_a_disk_that_fills_up_in_the_middle_is_survived(tmp_path: Path, database_url: str) -> None:
    async with small_laboratory(tmp_path, database_url, 64 * MB, AGENT_MIN_FREE_BYTES="1") as (lab, disk):
        small, large = lab.revision("small.bin", b"s" * 1000), lab.revision("large.bin", b"l" * 16 * MB)
        fetched_small = count(lab, r"small\.bin")
        drip = lab.sandbox.faults.add(FaultKind.DRIP, r"GET .*large\.bin", target="store", bytes_per_second=2 * MB)
        activity_id = lab.activity("cat /inputs/*.bin | wc -c > /outputs/size", inputs=[small, large])
        job = await lab.agent.job(activity_id, states={"staging"})
        inputs = job_directory(lab, job) / "inputs"

        async def half() -> bool | None:
            parts = [path for path in (lab.data_dir / "cache").glob("incoming/.*.part") if path.stat().st_size >= MB]
            return ((inputs / "small.bin").exists() and bool(parts)) or None

        await until(half, "one file in place, one on its way", lab.agent.log)
        filler = await asyncio.to_thread(disk.fill)
        job = await reason(lab, activity_id, "disk space")
        assert (job["state"], job["attempt"]) == ("staging", 0)
        assert sorted(path.name for path in inputs.iterdir()) == ["script.sh", "small.bin"]
        lab.sandbox.faults.remove(drip.id)
        filler.unlink()
        job = await lab.agent.job(activity_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 0), job
        assert (await lab.outputs(activity_id))["size"] == b"16001000\n"
        assert fetched_small.hits == 1
        assert {event["attempt"] for event in await story(lab, job)} == {0}


async def test_kept_failed_runs_make_room_oldest_first(tmp_path: Path, database_url: str) -> None:
    async with small_laboratory(tmp_path, database_url, 64 * MB, AGENT_MIN_FREE_BYTES=str(16 * MB)) as (lab, _):
        failed = []
        for number in range(2):
            job, _ = await lab.run("echo part > /outputs/part; exit 3", inputs=[lab.revision("in", bytes(12 * MB))])
            assert job["state"] == "failed"
            failed.append(job_directory(lab, job))
            assert {"inputs/in", "run-1/outputs/part"} <= left(failed[number])
        job, _ = await lab.run("true", inputs=[lab.revision("in", bytes(29 * MB))])
        assert (job["state"], job["attempt"]) == ("succeeded", 0)
        assert "disk space" not in str(await story(lab, job))
        assert left(failed[0]) == {"run-1", "run-1/stdout.log", "run-1/stderr.log"}
        assert {"inputs/in", "run-1/outputs/part"} <= left(failed[1])
        swept = [(event["what"], event["count"]) for event in lab.agent.events("swept")]
        assert swept == [("files of failed runs, for room", 1)]


async def story(lab: Lab, job: dict[str, Any]) -> list[dict[str, Any]]:
    _, answer = await lab.agent.call("GET", f"/api/jobs/{job['id']}/events")
    found: list[dict[str, Any]] = answer["events"]
    return found


async def test_what_a_failed_run_left_stays_for_a_while(tmp_path: Path) -> None:
    async with laboratory(tmp_path, AGENT_KEEP_FAILED_SECONDS="4") as lab:
        good, _ = await lab.run("echo 1 > /outputs/one")
        assert left(job_directory(lab, good)) == {"run-1", "run-1/stdout.log", "run-1/stderr.log"}
        bad, _ = await lab.run("echo part > /outputs/part; exit 3")
        directory = job_directory(lab, bad)
        assert {"inputs/script.sh", "run-1/outputs/part", "run-1/stdout.log"} <= left(directory)
        await gone(lab, directory / "inputs")
        await gone(lab, directory / "run-1" / "outputs")
        assert left(directory) == {"run-1", "run-1/stdout.log", "run-1/stderr.log"}
        assert (await lab.agent.call("GET", f"/api/jobs/{bad['id']}/logs/stdout"))[0] == 200


async def test_with_nothing_to_be_kept_nothing_is(tmp_path: Path) -> None:
    async with laboratory(tmp_path, AGENT_KEEP_SECONDS="0", AGENT_KEEP_FAILED_SECONDS="0") as lab:
        for script, state in (("true", "succeeded"), ("exit 3", "failed")):
            job, outputs = await lab.run(script)
            assert job["state"] == state
            assert set(outputs) == {"stdout.log", "stderr.log"}
        assert list((lab.data_dir / "jobs").iterdir()) == []


def orphan(folder: Path) -> Path:
    """Make a job's directory of which no database knows."""
    directory = folder / str(uuid.uuid4())
    (directory / "run-1" / "outputs").mkdir(parents=True)
    (directory / "run-1" / "outputs" / "file").write_text("results")
    return directory


async def test_what_no_job_owns_goes_and_nothing_else(tmp_path: Path) -> None:
    async with laboratory(tmp_path, AGENT_KEEP_FAILED_SECONDS="2") as lab:
        folder = lab.data_dir / "jobs"
        outside = tmp_path / "outside"
        (outside / "run-1" / "outputs").mkdir(parents=True)
        stays = [folder / "lost+found", folder / str(uuid.uuid4()).upper()]
        for path in stays:
            path.mkdir()
        link, file = folder / str(uuid.uuid4()), folder / str(uuid.uuid4())
        link.symlink_to(outside)
        file.write_text("not a directory")
        foreign = orphan(folder)
        broken = orphan(folder)
        (broken / "run-1" / "claim").write_text("this is no claim")
        alive = await asyncio.create_subprocess_exec("sleep", "600")
        try:
            claim = runner.identity(alive.pid) | {"at": time.time()}
            runner.write_json(str(foreign / "run-1"), runner.CLAIM, claim)
            live = lab.activity("sleep 600")
            job = await lab.agent.job(live, states={"running"})
            for _ in range(2):  # the second is found later, by another sweep
                await gone(lab, orphan(folder))
            stays += [link, file, foreign, broken, outside / "run-1" / "outputs", job_directory(lab, job) / "inputs"]
            assert [path for path in stays if not path.exists()] == []
            assert len(lab.agent.events("sweep_failed")) == 1  # the broken one, once
            assert {event["what"] for event in lab.agent.events("swept")} == {"directories that no job owns"}
            assert (await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel"))[0] == 202
            assert (await lab.agent.job(live))["state"] == "cancelled"
        finally:
            alive.kill()
            await alive.wait()
        await gone(lab, foreign)


async def test_one_files_failure_does_not_cost_the_others_their_transfer(tmp_path: Path) -> None:
    async with laboratory(tmp_path) as lab:
        bad = lab.revision("bad.bin", b"b" * 1000)
        others = [lab.revision(f"other-{number}.bin", b"o" * 200_000) for number in range(4)]
        lab.sandbox.faults.add(FaultKind.TRUNCATE, r"GET .*bad\.bin", target="store", after_bytes=3, times=2)
        slow = [
            lab.sandbox.faults.add(FaultKind.DRIP, f"GET .*other-{number}", target="store", bytes_per_second=100_000)
            for number in range(4)
        ]
        activity_id = lab.activity("cat /inputs/*.bin | wc -c > /outputs/size", inputs=[bad, *others])
        job = await lab.agent.job(activity_id)
        assert job["state"] == "succeeded", job
        assert max(event["attempt"] for event in await story(lab, job)) == 1
        assert [each.hits for each in slow] == [1, 1, 1, 1]
        assert (await lab.outputs(activity_id))["size"] == b"801000\n"


async def test_nothing_more_is_begun_while_the_object_store_is_away(tmp_path: Path) -> None:
    async with laboratory(tmp_path) as lab:
        inputs = [lab.revision(f"{number}.bin", b"x") for number in range(60)]
        away = lab.sandbox.faults.add(FaultKind.STATUS, "GET ", target="store", status=503)
        activity_id = lab.activity("true", inputs=inputs)
        job = await reason(lab, activity_id, "the object store")
        assert away.hits <= 16 * 3, "sixteen at once, three tries each"
        lab.sandbox.faults.remove()
        job = await lab.agent.job(activity_id)
        assert (job["state"], job["attempt"]) == ("succeeded", 0)
