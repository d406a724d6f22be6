"""What an agent of a test has otherwise than the product, named by its environment; without these, nothing.

CHAOS_POISON          a file name: whoever opens a file that is called so, or calls one so, is killed
CHAOS_LEASE_SECONDS   how long a job stays an agent's after it was last heard of
CHAOS_GONE_SECONDS    after how long an agent that was not seen is taken for gone
CHAOS_STALL_SECONDS   for how long a server that says nothing is waited for
CHAOS_ROOM_SECONDS    after how long a job that waits for room on the disk looks again
CHAOS_SITE            a Python file that is run first, as `sitecustomize` would be
"""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any


def install(environment: Mapping[str, str]) -> None:
    """Make this process so, from now on."""
    if site := environment.get("CHAOS_SITE"):
        runpy.run_path(site)
    if name := environment.get("CHAOS_POISON"):
        _poison(name)
    if seconds := environment.get("CHAOS_LEASE_SECONDS"):
        _lease(float(seconds))
    if seconds := environment.get("CHAOS_GONE_SECONDS"):
        _gone(float(seconds))
    if seconds := environment.get("CHAOS_STALL_SECONDS"):
        _stall(float(seconds))
    if seconds := environment.get("CHAOS_ROOM_SECONDS"):
        from agent.pipeline import stage

        stage._ROOM_WAIT_SECONDS = float(seconds)


def _poison(name: str) -> None:
    opened, renamed = os.open, os.rename

    def taste(path: Any) -> None:
        if isinstance(path, str | os.PathLike) and Path(os.fspath(path)).name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    def open_(path: Any, *rest: Any, **named: Any) -> int:
        taste(path)
        return opened(path, *rest, **named)

    def rename(source: Any, target: Any, **named: Any) -> None:
        taste(target)
        renamed(source, target, **named)

    os.open = open_
    vars(os)["rename"] = rename
    os.supports_dir_fd |= {open_, rename}


def _lease(seconds: float) -> None:
    from agent.pipeline import perform, worker

    defaults = worker.Worker.__init__.__kwdefaults__
    assert defaults is not None
    assert defaults["lease_seconds"] == perform.LEASE_SECONDS
    defaults["lease_seconds"] = seconds
    perform.within_lease.__defaults__ = (seconds * 2 / 3,)


def _gone(seconds: float) -> None:
    from agent.db import jobs
    from agent.pipeline import worker

    worker._SEEN_SECONDS *= seconds / jobs.AGENT_GONE.total_seconds()
    jobs.AGENT_GONE = timedelta(seconds=seconds)


def _stall(seconds: float) -> None:
    from agent.adapters import download, lane, lanes, ovation, ovation_answers, sending, store

    before = lane.STALL_SECONDS
    kept = lane.KEPT_SECONDS * seconds / before
    names = {"_STALL_SECONDS", "_CONNECT_SECONDS", "_ANSWER_SECONDS", "STALL_SECONDS", "CONNECT_SECONDS"}
    for module in (download, lane, lanes, ovation, ovation_answers, sending, store):
        vars(module).update(dict.fromkeys(names & vars(module).keys(), seconds))
        if "KEPT_SECONDS" in vars(module):
            vars(module)["KEPT_SECONDS"] = kept
    _default(download.Downloader.__init__, before, seconds)
    defaults = lanes.Lanes.__init__.__kwdefaults__
    assert defaults is not None
    defaults.update(connect_seconds=seconds, stall_seconds=seconds)


def _default(function: Any, before: float, now: float) -> None:
    """Change what a parameter of a function is when it is not given."""
    assert before in function.__defaults__
    function.__defaults__ = tuple(now if each == before else each for each in function.__defaults__)
