"""Run an image just as a job would, without Ovation: what `ovation-agent try` does.

The container, its runner and the verdict are a job's own. Only the inputs differ: they are the person's own directory,
shown read-only instead of being copied.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from agent.adapters import files
from agent.adapters.executor import Ended, Ending, RunRequest
from agent.adapters.local import LocalExecutor, LocalSettings
from agent.domain.container import Network, User, judge
from agent.domain.job import FaultClass, Verdict
from agent.errors import ExecutorError, ImageError

DEFAULT_OUTPUTS = Path("outputs")
DEFAULT_TIME_LIMIT_SECONDS = 86_400.0

_COPY_SECONDS = 0.05
_COPY_BYTES = 1 << 18
_LISTED_FILES = 200
_CHECKED_FILES = 10_000
_STDERR_TAIL_BYTES = 8192
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ExitCode(IntEnum):
    """What `try` returns when it is not the container's own exit code; the numbers are those of timeout(1) and sh."""

    USAGE = 2
    TIME_LIMIT = 124
    NOT_RUN = 125  # the image or this machine is at fault
    CANCELLED = 130


class UsageError(Exception):
    """An argument cannot be used; the message says why and what to do."""


async def try_image(
    image: Path,
    inputs: Path,
    related: Path | None = None,
    outputs: Path = DEFAULT_OUTPUTS,
    time_limit_seconds: float = DEFAULT_TIME_LIMIT_SECONDS,
    network: Network = "none",
    *,
    force: bool = False,
    settings: LocalSettings | None = None,
    stdout: BinaryIO | None = None,
    stderr: BinaryIO | None = None,
) -> int:
    """Run `image` on `inputs`, copy what it prints while it runs, say what became of it, and return an exit code.

    Without `related` the container sees an empty directory there. With `force`, `outputs` may have something in it
    already. The container's standard output goes to `stdout` and its standard error to `stderr` (this process's own,
    unless given); what is said about the run goes to standard error too. Ctrl-C, SIGTERM and SIGHUP end the
    container. Returns the container's exit code, or one of `ExitCode`.
    """
    streams = (stdout or sys.stdout.buffer, stderr or sys.stderr.buffer)
    report = _Report(streams[1])
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOPPING:
        loop.add_signal_handler(number, stop.set)
    try:
        with ExitStack() as cleanup:
            request = _request(image, inputs, related, outputs, time_limit_seconds, network, cleanup, force=force)
            executor = LocalExecutor(_as_caller(settings or LocalSettings()))
            report.out_of_reach(request, executor.user)
            facts = await executor.inspect(request.image)
            cleanup.enter_context(_returned_to_caller(request.outputs, executor.user))
            report.line(f"running {image.name} with {facts.runtime}")
            ended = await _run(executor, request, streams, stop)
            return report.conclusion(request, ended)
    except UsageError as error:
        report.line(f"error: {error}")
        return ExitCode.USAGE
    except ImageError as error:
        report.line(f"error: {image}: {error}")
        return ExitCode.NOT_RUN
    except ExecutorError as error:
        report.line(f"error: {error}")
        return ExitCode.NOT_RUN
    finally:
        for number in _STOPPING:
            loop.remove_signal_handler(number)


class _Report:
    """Lines about the run, told from the container's own by their mark."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def line(self, text: str) -> None:
        printable = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
        with suppress(BrokenPipeError):
            self._stream.write(f"[try] {printable}\n".encode(errors="replace"))
            self._stream.flush()

    def out_of_reach(self, request: RunRequest, user: User | None) -> None:
        """Warn of what the container cannot read, or write over, because it runs as another user."""
        if user is None:
            return
        if any(path.lstat().st_uid != user.uid for path in request.outputs.iterdir()):
            self.line(f"warning: the container runs as user {user.uid} and cannot write over what is in the outputs")
        for directory in (request.inputs, request.related):
            hidden = [path for path in _some_of(directory) if not _may_read(path, user)]
            if hidden:
                self.line(
                    f"warning: the container runs as user {user.uid} and cannot read {len(hidden)} of the files, such "
                    f"as {hidden[0]}. Run `try` as yourself instead of root, or: chmod -R a+rX {directory}"
                )

    def conclusion(self, request: RunRequest, ended: Ended) -> int:
        """Say what became of the run and return the exit code for it."""
        tail = files.tail(request.stderr, _STDERR_TAIL_BYTES)
        judgement = judge(ended.ending, ended.exit_code, tail, time_limit_seconds=request.time_limit_seconds)
        fault = judgement.fault
        self.line(f"{judgement.verdict}{_in_words(ended)}")
        if fault is not None:
            self.line(f"{fault.cls}: {fault.message}")
        self._outputs(request.outputs)
        if ended.ending in _CODES:
            return _CODES[ended.ending]
        if judgement.verdict is Verdict.FAILED and fault is not None and fault.cls in _NOT_THE_PROGRAM:
            return ExitCode.NOT_RUN
        return ExitCode.NOT_RUN if ended.exit_code is None else ended.exit_code

    def _outputs(self, outputs: Path) -> None:
        tree = files.list_tree(outputs)
        total = sum(found.size for found in tree.files)
        self.line(f"outputs: {len(tree.files)} files, {total:,} bytes, in {outputs}")
        for found in tree.files[:_LISTED_FILES]:
            self.line(f"  {found.size:>15,}  {found.path}")
        if len(tree.files) > _LISTED_FILES:
            self.line(f"  and {len(tree.files) - _LISTED_FILES} more")
        for path, kind in tree.skipped[:_LISTED_FILES]:
            self.line(f"warning: {path} is {kind}; a job uploads only regular files and would leave it out")
        if not tree.files:
            self.line("warning: /outputs is empty, so a job would have no results. Write them below /outputs.")


_CODES = {
    Ending.TIME_LIMIT: ExitCode.TIME_LIMIT,
    Ending.CANCELLED: ExitCode.CANCELLED,
    Ending.LOST: ExitCode.NOT_RUN,
}
_NOT_THE_PROGRAM = {FaultClass.IMAGE, FaultClass.PLATFORM, FaultClass.NODE}


def _request(
    image: Path,
    inputs: Path,
    related: Path | None,
    outputs: Path,
    time_limit_seconds: float,
    network: Network,
    cleanup: ExitStack,
    *,
    force: bool,
) -> RunRequest:
    """Check the arguments and return the run, whose private directory goes with `cleanup`.

    Raises:
        UsageError: an argument cannot be used.
    """
    if not time_limit_seconds > 0:
        raise UsageError("the time limit must be more than 0 seconds")
    shown = _existing(inputs, "--inputs")
    also_shown = _existing(related, "--related") if related is not None else None
    target = _empty_directory(outputs, [path for path in (shown, also_shown) if path], force=force)
    # Where the machine keeps large temporary files: /tmp is memory on many.
    parent = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108 the directory made in it is private
    name = cleanup.enter_context(
        tempfile.TemporaryDirectory(prefix="ovation-agent-try-", dir=parent, ignore_cleanup_errors=True)
    )
    place = Path(name).resolve()
    if also_shown is None:
        also_shown = place / "related"
        also_shown.mkdir()
        also_shown.chmod(0o755)
    return RunRequest(
        name="try",
        directory=place / "run",
        image=image.absolute(),
        inputs=shown,
        related=also_shown,
        time_limit_seconds=time_limit_seconds,
        network=network,
        outputs_directory=target,
    )


def _existing(directory: Path, option: str) -> Path:
    if not directory.is_dir():
        raise UsageError(f"{option} {directory} is not a directory")
    return directory.resolve()


def _empty_directory(outputs: Path, shown: Sequence[Path], *, force: bool) -> Path:
    """Make the directory for the outputs, or accept it as it is."""
    target = outputs.resolve()
    for directory in shown:
        if target == directory or target in directory.parents:
            raise UsageError(
                f"--outputs {outputs} contains {directory}, which the container must not write. Choose another."
            )
    try:
        target.mkdir(parents=True, exist_ok=True)
        is_empty = next(target.iterdir(), None) is None
    except OSError as error:
        raise UsageError(f"--outputs {outputs} cannot be used: {error.strerror}") from error
    if not is_empty and not force:
        raise UsageError(f"--outputs {outputs} is not empty. Choose another directory, empty it, or add --force.")
    return target


def _as_caller(settings: LocalSettings) -> LocalSettings:
    """Run the container as whoever called sudo, so that it may read what that person may read."""
    try:
        caller = User(int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))
    except (KeyError, ValueError):
        return settings
    return replace(settings, container_user=caller)


@contextmanager
def _returned_to_caller(outputs: Path, user: User | None) -> Iterator[None]:
    """Give the outputs back to the directory's owner afterwards, where the container ran as somebody else."""
    owner = outputs.stat()
    try:
        yield
    finally:
        if user is not None:
            for _, folders, names, directory in os.fwalk(outputs):
                for name in [".", *folders, *names]:
                    with suppress(OSError):
                        _give_back(name, directory, user, owner)


def _give_back(name: str, directory: int, user: User, owner: os.stat_result) -> None:
    if os.stat(name, dir_fd=directory, follow_symlinks=False).st_uid == user.uid:
        os.chown(name, owner.st_uid, owner.st_gid, dir_fd=directory, follow_symlinks=False)


async def _run(
    executor: LocalExecutor, request: RunRequest, streams: tuple[BinaryIO, BinaryIO], stop: asyncio.Event
) -> Ended:
    """Run the container to its end, copying what it prints; `stop` ends it."""
    await executor.start(request)
    ending = asyncio.create_task(_until_ended(executor, request))
    cancelled = False
    try:
        with request.stdout.open("rb") as out, request.stderr.open("rb") as error:
            copies = [_Copy(out, streams[0]), _Copy(error, streams[1])]
            while not ending.done():
                await asyncio.wait({ending}, timeout=_COPY_SECONDS)
                for copy in copies:
                    await asyncio.to_thread(copy.what_there_is)
                # Nobody reads any more, as with `try … | head`: the same as Ctrl-C.
                if (stop.is_set() or any(copy.is_broken for copy in copies)) and not cancelled:
                    cancelled = True
                    await executor.cancel(request)
            for copy in copies:
                await asyncio.to_thread(copy.what_there_is)
        return await ending
    finally:
        if not ending.done():
            await executor.cancel(request)
            await asyncio.shield(ending)


async def _until_ended(executor: LocalExecutor, request: RunRequest) -> Ended:
    while True:
        status = await executor.wait(request, request.time_limit_seconds)
        if isinstance(status, Ended):
            return status


class _Copy:
    """A log that grows, copied to a stream."""

    def __init__(self, log: BinaryIO, stream: BinaryIO) -> None:
        self._log = log
        self._stream = stream
        self.is_broken = False

    def what_there_is(self) -> None:
        """Copy what has come since the last time."""
        while not self.is_broken and (piece := self._log.read(_COPY_BYTES)):
            try:
                self._stream.write(piece)
                self._stream.flush()
            except BrokenPipeError:
                self.is_broken = True
                _discard(self._stream)


def _discard(stream: BinaryIO) -> None:
    """Let what is left in a broken stream's buffer go nowhere, or its close would fail as well."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _in_words(ended: Ended) -> str:
    words = "" if ended.exit_code is None else f", exit code {ended.exit_code}"
    if ended.usage is None:
        return words
    usage = ended.usage
    processor_seconds = usage.user_seconds + usage.system_seconds
    megabytes = usage.peak_memory_bytes / 1e6
    return f"{words}, after {usage.wall_seconds:.1f} s (processor {processor_seconds:.1f} s, memory {megabytes:.0f} MB)"


def _some_of(directory: Path) -> Iterator[Path]:
    """Yield a directory and what is below it, up to a number that takes no time to look at."""
    left = _CHECKED_FILES
    yield directory
    for root, folders, names in os.walk(directory):
        for name in [*folders, *names][:left]:
            yield Path(root, name)
        left -= len(folders) + len(names)
        if left <= 0:
            return


def _may_read(path: Path, user: User) -> bool:
    try:
        status = path.stat()
    except OSError:
        return True  # a link to nowhere is not a matter of rights
    needed = 0o5 if stat.S_ISDIR(status.st_mode) else 0o4
    if status.st_uid == user.uid:
        needed <<= 6
    elif status.st_gid == user.gid:
        needed <<= 3
    return status.st_mode & needed == needed
