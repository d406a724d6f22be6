"""Agents that start at once: a process that has imported everything forks one child for each life of an agent.

The child runs `ovation-agent serve` with an environment, a log and a process group of its own. The zygote has no
threads and no event loop, so that forking it is safe. It ends, and its children with it, when whoever started it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn, Self

from tests.chaos import altered, failpoints
from tests.chaos.points import Plan

_MESSAGE_BYTES = 200_000
_PR_SET_PDEATHSIG = 1


class Life:
    """One agent process from its start to its end; what is used of asyncio's `Process`, it has too."""

    def __init__(self, zygote: Zygote, pid: int, handle: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._handle = handle
        self._returncode: int | None = None

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the number of the signal that killed it, or `None` while it lives."""
        if self._returncode is None and select.select([self._handle], [], [], 0)[0]:
            self._returncode = self._zygote.reap(self.pid)
            os.close(self._handle)
        return self._returncode

    def send_signal(self, number: int) -> None:
        """Send a signal; that it has ended is no matter."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """Kill it without a chance to say goodbye."""
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for its end and return the exit code."""
        while (code := self.returncode) is None:  # noqa: ASYNC110 a handle can be watched by one loop's one waiter
            await asyncio.sleep(0.005)
        return code


class Zygote:
    """The process that forks agents, as tests see it. A context manager: at its end no agent is left."""

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        self._socket = ours
        self._socket.recv(_MESSAGE_BYTES)  # it has imported everything
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, environment: dict[str, str], directory: Path, log: Path, plan: Plan | None = None) -> Life:
        """Begin a life with this environment in this working directory, and return it at once."""
        plan = plan or Plan()
        self._send(do="start", environment=environment, directory=str(directory), log=str(log), plan=plan.document())
        message, handles, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
        return Life(self, int(json.loads(message)["pid"]), handles[0])

    def reap(self, pid: int) -> int:
        """Return the exit code of a life that has ended."""
        self._send(do="reap", pid=pid)
        return int(json.loads(self._socket.recv(_MESSAGE_BYTES))["code"])

    def _send(self, **message: object) -> None:
        self._socket.send(json.dumps(message).encode())


def main(channel: socket.socket) -> None:
    """Fork lives until whoever started this closes the channel."""
    _import_everything()
    channel.send(b"ready")
    children: set[int] = set()
    while request := channel.recv(_MESSAGE_BYTES):
        asked = json.loads(request)
        if asked["do"] == "reap":
            children.discard(asked["pid"])
            code = os.waitstatus_to_exitcode(os.waitpid(asked["pid"], 0)[1])
            channel.send(json.dumps({"code": code}).encode())
            continue
        pid = os.fork()
        if pid == 0:
            channel.close()
            _live(asked)
        children.add(pid)
        handle = os.pidfd_open(pid)
        socket.send_fds(channel, [json.dumps({"pid": pid}).encode()], [handle])
        os.close(handle)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _import_everything() -> None:
    """Load what `serve` loads, and what it would read at its first upload."""
    import botocore.loaders
    import botocore.session

    import agent.app
    import agent.cli  # noqa: F401 imported for the children

    read: dict[tuple[Any, ...], Any] = {}
    load_file = botocore.loaders.JSONFileLoader.load_file

    def remembered(loader: Any, *where: Any) -> Any:
        if where not in read:
            read[where] = load_file(loader, *where)
        return read[where]

    botocore.loaders.JSONFileLoader.load_file = remembered  # 100 ms of reading JSON a life, and never another answer
    keys = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    botocore.session.get_session().create_client("s3", region_name="us-east-1", **keys).close()
    gc.collect()
    gc.freeze()


def _live(asked: dict[str, Any]) -> NoReturn:
    """Be an agent, as `ovation-agent serve` is."""
    code = 70
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["directory"])
        altered.install(os.environ)
        failpoints.install(Plan(**asked["plan"]))
        from agent.cli import main as command_line

        command_line(["serve"], prog_name="ovation-agent")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 a forked child must not go on as its parent
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
