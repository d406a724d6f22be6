"""Several agents on one cache, and the commands that look at it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from agent.adapters.shelf import Shelf
from tests.integration.sandbox_fixtures import until

_AGENT = """
import asyncio, hashlib, os, sys
from pathlib import Path
from agent.adapters.cache import Cache
from agent.adapters.download import Fetched
place, job = Path(sys.argv[1]), sys.argv[2]
async def fetch(target):
    with (place / "fetches").open("a") as told:
        told.write(f"{job}\\n")
    part = target.with_name(".part")
    for number in range(50):  # goes on with what another has left
        if not part.exists() or part.stat().st_size <= number:
            with part.open("ab") as file:
                file.write(b"x")
            while not (place / "go").exists() and number == 10:
                await asyncio.sleep(0.01)
    part.rename(target)
    content = target.read_bytes()
    return Fetched(len(content), hashlib.sha256(content).hexdigest())
async def main():
    await Cache(place / "cache", 10**9).stage("image", place / "jobs" / job, fetch, name="image.sif")
asyncio.run(main())
"""


async def agent(place: Path, job: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return await asyncio.create_subprocess_exec(sys.executable, "-c", _AGENT, str(place), job, env=environment)


def fetches(place: Path) -> list[str]:
    told = place / "fetches"
    return told.read_text().split() if told.exists() else []


async def test_agents_fetch_once_and_take_over_from_one_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    first = await agent(tmp_path, "first")
    await until((tmp_path / "cache" / "incoming" / ".part").exists, 30)
    others = [await agent(tmp_path, name) for name in ("second", "third")]
    await until(lambda: len(list((tmp_path / "cache" / "locks").iterdir())) == 1, 30)
    first.kill()
    await first.wait()
    await until(lambda: len(fetches(tmp_path)) == 2, 30)
    (tmp_path / "go").touch()
    assert [await other.wait() for other in others] == [0, 0]
    assert len(fetches(tmp_path)) == 2
    assert (tmp_path / "jobs" / "second").read_bytes() == b"x" * 50
    assert (tmp_path / "jobs" / "second").samefile(tmp_path / "jobs" / "third")
    assert not list((tmp_path / "cache" / "locks").iterdir())
    assert not list((tmp_path / "cache" / "incoming").iterdir())


async def command(place: Path, *words: str) -> tuple[int, str, str]:
    environment = {
        "PATH": os.environ["PATH"],
        "AGENT_DATA_DIR": str(place),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent", "cache", *words),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await process.communicate()
    return process.returncode or 0, out.decode(), error.decode()


async def test_the_commands_show_it_clear_it_and_check_it(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "go").touch()
    assert await (await agent(tmp_path, "job")).wait() == 0
    code, out, error = await command(tmp_path, "list")
    assert (code, out.split("\t")[:3]) == (0, ["image", "image.sif", "50 bytes"])
    assert "1 Revisions, 50 bytes of 50.0 GB" in error
    code, out, _ = await command(tmp_path, "list", "--json")
    [entry] = json.loads(out)["entries"]
    assert (entry["revision_id"], entry["size"], entry["in_use"]) == ("image", 50, True)
    code, out, error = await command(tmp_path, "prune", "--all")
    assert (code, out) == (0, "0 Revisions removed, 0 bytes freed; 50 bytes are left\n")
    assert "used by jobs" in error
    assert (await command(tmp_path, "verify"))[:2] == (0, "1 of 1 Revisions are whole\n")
    shelf = Shelf(tmp_path / "cache")
    blob = shelf.blob(entry["sha256"])
    status = blob.stat()
    (tmp_path / "jobs" / "job").unlink()
    blob.chmod(0o600)
    blob.write_bytes(b"y" * 50)
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))
    code, out, _ = await command(tmp_path, "verify")
    assert (code, out) == (1, "damaged, and removed: image image.sif\n0 of 1 Revisions are whole\n")
    assert shelf.entries() == []
    assert (await command(tmp_path, "prune", "--to", "1.5GiB"))[0] == 0
    code, _, error = await command(tmp_path, "prune", "--to", "much")
    assert code == 2
    assert "'much' is not a size such as 500000, 20GB or 1.5TiB" in error
    code, _, error = await command(tmp_path, "prune", "--all", "--to", "1")
    assert code == 2
    assert "contradict" in error
