"""The demo's hold on its processes, tried in a process of its own: it adopts whatever is left behind below it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

PREAMBLE = """
import asyncio, os, sys, time
from pathlib import Path
from agent.sandbox.demo_processes import Children

home = Path(sys.argv[1])
children = Children()
environment = dict(os.environ)

def start(script):
    return children.start("child", [sys.executable, "-c", script], home, environment)

def wait_for(name):
    deadline = time.monotonic() + 20
    while not (home / name).exists():
        assert time.monotonic() < deadline, name
        time.sleep(0.01)

def sweep(grace_seconds, hurried=False):
    hurry = asyncio.Event()
    if hurried:
        hurry.set()
    return asyncio.run(children.sweep(grace_seconds, hurry))
"""

# A process that goes into the background as a daemon does: its parents are gone, its session is another.
DAEMON = """
import os, signal, time
from pathlib import Path
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {body}
        Path("ready").touch()
        time.sleep(600)
    os._exit(0)
os.wait()
"""


def run(tmp_path: Path, script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def daemon(body: str = "pass") -> str:
    return f"DAEMON = {DAEMON.format(body=body)!r}\n"


def test_a_daemon_is_found_asked_and_gone(tmp_path: Path) -> None:
    body = "signal.signal(15, lambda *_: (Path('asked').touch(), os._exit(0)))"
    script = "start(DAEMON); wait_for('ready'); print(bool(children.running()), sweep(10), children.running())"
    assert run(tmp_path, daemon(body) + script) == "True [] set()"
    assert (tmp_path / "asked").exists()


@pytest.mark.parametrize("arguments", ["0.2", "60, hurried=True"])
def test_one_that_does_not_listen_is_killed(tmp_path: Path, arguments: str) -> None:
    script = f"start(DAEMON); wait_for('ready'); print(sweep({arguments}), children.running())"
    assert run(tmp_path, daemon("signal.signal(15, signal.SIG_IGN)") + script) == "[] set()"


def test_stopping_gives_the_exit_code_and_the_log(tmp_path: Path) -> None:
    script = """
child = start("import os, time; os.write(2, b'one\\\\ntwo\\\\n'); open('ready', 'w'); time.sleep(600)")
wait_for("ready")
asyncio.run(children.stop(child, 10, asyncio.Event()))
print(child.exit_code, child.tail(1))
"""
    assert run(tmp_path, script) == "-15 ['two']"


def test_adopted_processes_that_ended_are_let_go(tmp_path: Path) -> None:
    script = """
async def main():
    reaper = asyncio.create_task(children.reap())
    start(DAEMON.replace("time.sleep(600)", "os._exit(0)"))
    below = Path(f"/proc/self/task/{os.getpid()}/children")
    while not (home / "ready").exists() or below.read_text():
        await asyncio.sleep(0.01)
    reaper.cancel()
asyncio.run(asyncio.wait_for(main(), 20))
print("none")
"""
    assert run(tmp_path, daemon() + script) == "none"


def test_the_shared_memory_of_killed_processes_is_removed(tmp_path: Path) -> None:
    body = (
        "import ctypes, mmap; libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p;"
        " segment = libc.shmget(0, 4096, 0o1600); libc.shmat(segment, None, 0);"
        " Path('segment').write_text(str(segment));"
        " name = f'/dev/shm/demo-test-{os.getpid()}'; file = open(name, 'w+b'); file.truncate(4096);"
        " mapping = mmap.mmap(file.fileno(), 4096); Path('object').write_text(name); signal.signal(15, signal.SIG_IGN)"
    )
    assert run(tmp_path, daemon(body) + "start(DAEMON); wait_for('ready'); print(sweep(0.2))") == "[]"
    segment = (tmp_path / "segment").read_text(encoding="ascii")
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text(encoding="ascii").splitlines()[1:]]
    assert segment not in [row[1] for row in rows]
    assert not Path((tmp_path / "object").read_text(encoding="ascii")).exists()
