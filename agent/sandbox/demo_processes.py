"""Processes that the demo starts, and the certainty that none of them, nor of theirs, is left."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.sandbox.demo_memory import SharedMemory

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_POLL_SECONDS = 0.05
_KILLED_SECONDS = 5.0  # how long the kernel may take to end what was killed
_HURRIED_SECONDS = 2.0  # what was asked to end gets this long even in a hurry
_ZOMBIE = "Z"


@dataclass(frozen=True, slots=True)
class Child:
    """A process that leads a session of its own; `log` holds its stderr, `out` its stdout."""

    name: str
    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    @property
    def exit_code(self) -> int | None:
        """What it ended with, `None` while it runs."""
        return self.process.poll()

    def tail(self, lines: int) -> list[str]:
        """Return the last lines of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]


class Children:
    """Every process below this one.

    This process adopts what its descendants leave behind (as a *subreaper*, prctl(2)), so a container that outlives
    the agent, or a database that went into the background, is still below it in the tree of processes: the tree alone
    tells what the demo started, with no guess from names or directories.
    """

    def __init__(self) -> None:
        self._started: dict[int, Child] = {}
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot become a child subreaper")

    def start(self, name: str, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> Child:
        """Start `command` in `directory` as the leader of a new session; its output goes to `<name>.out` and `.log`."""
        out, log = directory / f"{name}.out", directory / f"{name}.log"
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(  # noqa: S603 the commands are the demo's own
                command,
                cwd=directory,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        child = Child(name, process, out, log)
        self._started[process.pid] = child
        return child

    async def stop(self, child: Child, grace_seconds: float, hurry: asyncio.Event) -> None:
        """Ask the process to end, and end it when it has not after `grace_seconds` or when `hurry` is set."""
        if child.exit_code is None:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while child.exit_code is None:
            if hurry.is_set() or time.monotonic() > deadline:
                child.process.kill()
            await asyncio.sleep(_POLL_SECONDS)

    async def sweep(self, grace_seconds: float, hurry: asyncio.Event) -> list[int]:
        """End every process below this one: ask first, then kill; return the ids of those that are there even then.

        Only the top of each tree is asked, as it knows best how to end what is below it.
        """
        memory = SharedMemory()
        asked: set[int] = set()
        kill_at = time.monotonic() + grace_seconds
        while remaining := self.running():
            memory.note(remaining)
            if hurry.is_set():
                kill_at = min(kill_at, time.monotonic() + _HURRIED_SECONDS)
            late = time.monotonic() > kill_at
            if time.monotonic() > kill_at + _KILLED_SECONDS:
                return sorted(remaining)
            for pid in remaining if late else self._own(remaining) - asked:
                _signal(pid, signal.SIGKILL if late else signal.SIGTERM)
                asked.add(pid)
            await asyncio.sleep(_POLL_SECONDS)
        memory.remove()
        return []

    async def reap(self) -> None:
        """Let adopted processes go as they end, until cancelled."""
        while True:
            self.running()
            await asyncio.sleep(_POLL_SECONDS)

    def running(self) -> set[int]:
        """Return the ids of all processes below this one; those that have ended are let go."""
        children: dict[int, list[tuple[int, str]]] = {}
        for pid, parent, state in _processes():
            children.setdefault(parent, []).append((pid, state))
        found: set[int] = set()
        waiting = [os.getpid()]
        while waiting:
            parent = waiting.pop()
            for pid, state in children.get(parent, ()):
                if state == _ZOMBIE:
                    if parent == os.getpid():
                        self._let_go(pid)
                    continue
                found.add(pid)
                waiting.append(pid)
        return found

    def _own(self, processes: set[int]) -> set[int]:
        return {pid for pid, parent, _ in _processes() if parent == os.getpid() and pid in processes}

    def _let_go(self, pid: int) -> None:
        if child := self._started.get(pid):
            child.process.poll()
            return
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return


def _processes() -> list[tuple[int, int, str]]:
    """Return id, parent's id and state of every process that can be seen (proc_pid_stat(5))."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            text = (directory / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The command's name stands in parentheses and may hold anything, parentheses as well.
        state, parent = text.rpartition(")")[2].split()[:2]
        found.append((int(directory.name), int(parent), state))
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
