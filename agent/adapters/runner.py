"""The small detached program under which one container runs, so that the run outlives the agent.

Started as `python -I -S runner.py DIRECTORY`, it forks twice into a session of its own and is nobody's child. The first
process stays until the container was started, and its exit code says what became of that. As `runner.py --in-place
DIRECTORY`, which is how a batch job starts it, it stays where it is, and its exit code is the container's; afterwards
`runner.py --sweep DIRECTORY` ends what one that was killed has left. Standard
library only, and little of that: it is a file, not a package member, and its start is part of every run. It runs on
Python 3.9.

In DIRECTORY:

    spec.json      what to run; written and synced by the executor before the start: the intent
    lock           locked (flock) by the runner from before its claim until it is gone
    claim          who runs it: pid, start time, boot. Made once; whoever finds it there does nothing
    started.json   the container's pid and start time, written before it runs
    cancel         made by the executor to cancel, with SIGTERM to wake the runner
    alive          touched every few seconds with --in-place: the sign of life for whoever cannot see the process
    exit.json      how it ended; the last thing that is written
    runner.log     what went wrong in the runner itself
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import stat
import sys
import time
from contextlib import suppress

TYPE_CHECKING = False  # the real one is in a module that takes longer to load than the half of this program's own work
if TYPE_CHECKING:
    from typing import Any, NoReturn

SPEC = "spec.json"
LOCK = "lock"
CLAIM = "claim"
STARTED = "started.json"
CANCEL = "cancel"
EXIT = "exit.json"
LOG = "runner.log"
ALIVE = "alive"

STARTED_CODE = 0
CLAIMED_CODE = 3  # another runner has this directory
FAILED_CODE = 4  # nothing was started; runner.log says why

_LOOK_SECONDS = 2.0
_WAKING = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STOPPING = frozenset({signal.SIGTERM, signal.SIGINT})
_PR_SET_CHILD_SUBREAPER = 36
_TERMINATED = 128 + signal.SIGTERM
_HEARS_SECONDS = 1.0


class AlreadyClaimed(Exception):
    """Another runner has, or had, this directory."""


def boot_id() -> str:
    """Return what tells this boot of the machine from any other."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def process_start(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot, or `None` when it is gone or a zombie."""
    fields = _process(pid)
    return None if fields is None else int(fields[19])


def identity(pid: int) -> dict[str, Any]:
    """Return what names the process `pid` for good: a pid alone is used again."""
    return {"pid": pid, "start": process_start(pid), "boot": boot_id()}


def alive(who: dict[str, Any]) -> bool:
    """Return whether the process with this identity still runs."""
    return who["boot"] == boot_id() and who["start"] is not None and process_start(who["pid"]) == who["start"]


def read_json(directory: str, name: str) -> dict[str, Any] | None:
    """Return the record `name`, or `None` when it was not written."""
    try:
        record: dict[str, Any] = json.loads(_read(f"{directory}/{name}"))
    except FileNotFoundError:
        return None
    return record


def write_json(directory: str, name: str, record: dict[str, Any], *, exclusive: bool = False) -> None:
    """Write the record whole and durably, or not at all.

    Raises:
        FileExistsError: `exclusive`, and it is there already.
    """
    path = f"{directory}/{name}"
    part = f"{path}.{os.getpid()}.{time.monotonic_ns()}.part"
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(part, path)
        else:
            os.rename(part, path)  # noqa: PTH104 pathlib would double the time that a start takes
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)  # noqa: PTH108 see the line above
    sync_directory(directory)


def sync_directory(directory: str) -> None:
    """Make the names in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(directory: str) -> int | None:
    """Return a descriptor that holds the runner's lock, or `None` when somebody else holds it."""
    handle = os.open(f"{directory}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in {errno.EWOULDBLOCK, errno.EINTR}:
            return None
        raise
    return handle


def session_members(session: int) -> list[int]:
    """Return the processes of a session, zombies aside."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208 see write_json
    return [pid for pid in pids if (fields := _process(pid)) is not None and int(fields[3]) == session]


def children(pid: int) -> list[int]:
    """Return the children of a process, whichever of its threads started them."""
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 see write_json
            found += [int(child) for child in _read(f"/proc/{pid}/task/{thread}/children").split()]
    return found


def send(pid: int, number: int) -> None:
    """Send a signal; that the process is gone is no matter."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Stopping:
    """The clean way to end a container: each stage when the one before did not help within its grace.

    SIGTERM to Apptainer's starter, which passes it on; SIGKILL to its child, the container's first process, whose end
    ends everything inside while the starter still tidies up; SIGKILL to all that is left of the session.
    """

    def __init__(self, container: int, grace_seconds: float, kill_seconds: float) -> None:
        self._container = container
        self._graces = [grace_seconds, kill_seconds, kill_seconds]
        self._stage = 0
        self.next_at = 0.0

    def advance(self, now: float) -> None:
        """Do the next stage when it is due."""
        if now < self.next_at:
            return
        if self._stage == 0:
            send(self._container, signal.SIGTERM)
        elif self._stage == 1:
            for child in children(self._container):
                send(child, signal.SIGKILL)
        else:
            for member in session_members(self._container):
                send(member, signal.SIGKILL)
        self.next_at = now + self._graces[min(self._stage, len(self._graces) - 1)]
        self._stage += 1


def sweep(container: dict[str, Any], grace_seconds: float, kill_seconds: float) -> None:
    """End what a runner that is gone left running, and wait until it has ended."""
    start = process_start(container["pid"])
    if start is not None and start != container["start"]:
        return  # another process has that pid by now, so nothing is left of the session
    stopping = Stopping(container["pid"], grace_seconds, kill_seconds)
    while session_members(container["pid"]):
        stopping.advance(time.monotonic())
        time.sleep(0.02)


def remove_tree(path: str) -> None:
    """Remove a directory with all in it, also where its own modes forbid that; what cannot be removed stays."""
    with suppress(OSError):
        os.chmod(path, 0o700)  # noqa: PTH101 see write_json
    for root, directories, _ in os.walk(path):
        for name in directories:
            if not stat.S_ISLNK(os.lstat(f"{root}/{name}").st_mode):
                os.chmod(f"{root}/{name}", 0o700)  # noqa: PTH101 see write_json
    # Not shutil's, which takes longer to load than all else that is done here. By descriptors, past no symbolic link.
    with suppress(OSError):
        for _, directories, names, place in os.fwalk(path, topdown=False):
            for name in names:
                with suppress(OSError):
                    os.unlink(name, dir_fd=place)
            for name in directories:
                with suppress(OSError):
                    _remove_directory(name, place)
    with suppress(OSError):
        os.rmdir(path)  # noqa: PTH106 see write_json


def _remove_directory(name: str, place: int) -> None:
    try:
        os.rmdir(name, dir_fd=place)
    except NotADirectoryError:
        os.unlink(name, dir_fd=place)  # a symbolic link to one


class Run:
    """One container, from its claim to its exit record."""

    def __init__(self, directory: str, *, in_place: bool = False) -> None:
        self.directory = directory
        self.in_place = in_place
        self.exit_code = FAILED_CODE
        self.spec: dict[str, Any] = {}
        self.container = 0
        self.started_at = 0.0
        self.reason: str | None = None  # why it is to be stopped
        self.stopping: Stopping | None = None

    def claim(self) -> None:
        """Become the only runner of this directory.

        Raises:
            AlreadyClaimed: somebody else is.
        """
        spec = read_json(self.directory, SPEC)
        if spec is None:
            raise RuntimeError(f"there is no {SPEC}")
        self.spec = spec
        # The lock comes before the claim: a claim without a lock is then a runner that is gone.
        while not self._locked():
            if self._there_is(CLAIM):
                raise AlreadyClaimed
            time.sleep(0.001)  # somebody looks, or another runner is about to claim
        self.started_at = time.time()
        try:
            write_json(self.directory, CLAIM, self._who() | {"at": self.started_at}, exclusive=True)
        except FileExistsError:
            raise AlreadyClaimed from None

    def _locked(self) -> bool:
        try:
            return lock(self.directory) is not None
        except OSError:
            if not self.in_place:
                raise
            return True  # not every shared file system has locks, and there the claim alone decides

    def _who(self) -> dict[str, Any]:
        who = identity(os.getpid())
        if self.in_place:
            who |= {"host": os.uname().nodename, "batch_job": os.environ.get("SLURM_JOB_ID")}
        return who

    def start(self) -> None:
        """Start the container in a session of its own."""
        if self.in_place:
            self._live()
        outputs = [self._open_log("stdout"), self._open_log("stderr")]
        gate, key = os.pipe()
        self.container = os.fork()
        if self.container == 0:
            os.close(key)
            self._become_container(gate, outputs)
        for handle in (gate, *outputs):
            os.close(handle)
        # It waits at the gate until its pid is on record, so that none runs of which nobody knows.
        write_json(self.directory, STARTED, identity(self.container))
        os.write(key, b".")
        os.close(key)

    def watch(self) -> None:
        """Wait until the container has ended, end it when it must, and write how it ended."""
        began = time.monotonic()
        limit = began + float(self.spec["time_limit_seconds"])
        while not self._ended():
            now = time.monotonic()
            self._look(over_limit=now >= limit)
            if self.in_place:
                self._live()
            until = limit
            if self.reason is not None:
                self.stopping = self.stopping or self._stop()
                self.stopping.advance(now)
                until = self.stopping.next_at
            got = signal.sigtimedwait(_WAKING, max(0.0, min(until - now, _LOOK_SECONDS)))
            if got is not None and got.si_signo in _STOPPING:
                self.reason = self.reason or "lost"
        wall_seconds = time.monotonic() - began
        for member in session_members(self.container):  # its pid is ours until it is reaped
            send(member, signal.SIGKILL)
        _, status, usage = os.wait4(self.container, 0)
        self._write_exit(os.waitstatus_to_exitcode(status), usage, wall_seconds)
        self._tidy()

    def _look(self, *, over_limit: bool) -> None:
        # SIGTERM without a cancel file is the machine going down; with one it only wakes this loop.
        if self.reason in {None, "lost"} and self._there_is(CANCEL):
            self.reason = "cancelled"
        elif over_limit and self.reason is None:
            self.reason = "time_limit"
        elif self.reason is None and self._wrote_too_much():
            self.reason = "log_limit"

    def _live(self) -> None:
        with suppress(OSError):
            handle = os.open(f"{self.directory}/{ALIVE}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(handle, f"{time.time():.0f}".encode(), 0)
            finally:
                os.close(handle)

    def _wrote_too_much(self) -> bool:
        most = self.spec.get("max_log_bytes")  # a spec that an older agent wrote has none
        if most is None:
            return False
        for name in ("stdout", "stderr"):
            with suppress(FileNotFoundError):
                if os.stat(f"{self.directory}/{self.spec[name]}").st_size > most:  # noqa: PTH116 see write_json
                    return True
        return False

    def _stop(self) -> Stopping:
        return Stopping(self.container, float(self.spec["grace_seconds"]), float(self.spec["kill_seconds"]))

    def _ended(self) -> bool:
        """Return whether the container has ended, leaving it to be reaped; reap the orphans on the way."""
        while True:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                return False
            if found.si_pid == self.container:
                return True
            os.waitpid(found.si_pid, 0)

    def _write_exit(self, code: int, usage: resource.struct_rusage, wall_seconds: float) -> None:
        exit_code = self.exit_code = code if code >= 0 else 128 - code
        # Slurm tells every process of a job to end, and this one may hear of it last.
        in_batch = self.in_place or self.spec.get("in_batch", False)
        may_hear = in_batch and self.stopping is None and exit_code == _TERMINATED
        if may_hear and signal.sigtimedwait(_STOPPING, _HEARS_SECONDS) is not None:
            self.reason = self.reason or "lost"
        ending = (self.reason or "exited") if self.stopping else "exited"
        # The machine's shutdown may have told the container to end before it told this runner.
        if self.stopping is None and exit_code != 0 and (self.reason == "lost" or _STOPPING & signal.sigpending()):
            ending = "lost"
        record = {
            "ending": ending,
            "exit_code": exit_code,
            "started_at": self.started_at,
            "finished_at": time.time(),
            "wall_seconds": wall_seconds,
            "user_seconds": usage.ru_utime,
            "system_seconds": usage.ru_stime,
            "peak_memory_bytes": usage.ru_maxrss * 1024,
        }
        while True:
            try:
                write_json(self.directory, EXIT, record)
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
                time.sleep(_LOOK_SECONDS)  # the disk is full; room will be made
            else:
                return

    def _tidy(self) -> None:
        # After the exit record, so that a crash in here costs nothing; while the lock is held the run counts as
        # running, so that whoever sees its end finds nothing of it left.
        while orphans := self._orphans():  # what one of them had started comes to be an orphan by its end
            for member in orphans:
                send(member, signal.SIGKILL)
                os.waitpid(member, 0)
        for name in self.spec["remove"]:
            remove_tree(f"{self.directory}/{name}")

    def _orphans(self) -> list[int]:
        return children(os.getpid())

    def _there_is(self, name: str) -> bool:
        return os.access(f"{self.directory}/{name}", os.F_OK)

    def _open_log(self, name: str) -> int:
        path = f"{self.directory}/{self.spec[name]}"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _program(self, name: str) -> str:
        """Return where a program is: on a batch system's node, wherever its own PATH finds it."""
        if "/" not in name:
            for place in os.get_exec_path():
                if os.access(f"{place}/{name}", os.X_OK):
                    return f"{place}/{name}"
        return name

    def _become_container(self, gate: int, outputs: list[int]) -> NoReturn:
        try:
            os.setsid()
            if not os.read(gate, 1):
                os._exit(255)  # the runner is gone
            os.dup2(outputs[0], 1)
            os.dup2(outputs[1], 2)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            argv = self.spec["argv"]
            given = self.spec["environment"]  # nothing: that of the batch job
            environment = os.environ if given is None else given
            os.execve(self._program(argv[0]), argv, environment)  # noqa: S606 no shell is what is wanted
        except BaseException as error:  # noqa: BLE001 a forked child must not go on as its parent
            os.write(2, f"FATAL:   the container could not be started: {error}\n".encode(errors="replace"))
        os._exit(255)


def _adopt_orphans() -> None:
    """Become the parent of what the container's processes leave behind, so that it can be ended."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _detach() -> int:
    """Return, in the detached process, the pipe on which it tells the first process how the start went."""
    reader, writer = os.pipe()
    if os.fork() != 0:
        os.close(writer)
        answer = os.read(reader, 1)
        os._exit(answer[0] if answer else FAILED_CODE)
    os.close(reader)
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    return writer


def main(directory: str, *, in_place: bool = False) -> int:
    """Run what DIRECTORY says, detached or in place; return the code for this process to end with."""
    os.umask(0o077)
    os.chdir("/")
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAKING)
    writer = os.open(os.devnull, os.O_WRONLY) if in_place else _detach()
    run = Run(directory, in_place=in_place)
    try:
        run.claim()
        _adopt_orphans()
        run.start()
        _answer(writer, STARTED_CODE)
        run.watch()
    except AlreadyClaimed:
        _answer(writer, CLAIMED_CODE)
        return CLAIMED_CODE
    except BaseException:  # noqa: BLE001 nobody else would hear of it
        _note(directory)
    return run.exit_code


def sweep_after(directory: str) -> None:
    """End what a runner that was killed has left of this batch job, and record that the run is lost."""
    claim, end = read_json(directory, CLAIM), read_json(directory, EXIT)
    if claim is None or end is not None or claim.get("batch_job") != os.environ.get("SLURM_JOB_ID") or alive(claim):
        return
    spec, started = read_json(directory, SPEC) or {}, read_json(directory, STARTED)
    if started is not None and started["boot"] == boot_id():
        sweep(started, float(spec["grace_seconds"]), float(spec["kill_seconds"]))
    record = {
        "ending": "lost",
        "exit_code": None,
        "started_at": claim["at"],
        "finished_at": time.time(),
        "detail": "The program on the node that watches over the run was killed.",
    }
    with suppress(FileExistsError):
        write_json(directory, EXIT, record, exclusive=True)
    for name in spec.get("remove", ()):
        remove_tree(f"{directory}/{name}")


def _answer(writer: int, code: int) -> None:
    with suppress(BrokenPipeError):  # whoever started this may be gone: that is what it is made for
        os.write(writer, bytes([code]))
    os.close(writer)


def _note(directory: str) -> None:
    import traceback

    with open(f"{directory}/{LOG}", "a", encoding="utf-8") as file:  # noqa: PTH123 see write_json
        file.write(traceback.format_exc())


def _process(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the name, `None` for a process that is gone or a zombie."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZXx" else fields


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 see write_json
        return file.read()


if __name__ == "__main__":
    if sys.argv[1] == "--sweep":
        sweep_after(sys.argv[2])
    else:
        sys.exit(main(sys.argv[-1], in_place=sys.argv[1] == "--in-place"))
