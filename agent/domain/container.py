"""What is run, and what its end means.

A `Container` says what to run; `arguments` and `environment` turn it into what Apptainer is started with, and `judge`
turns its end into a verdict. What Apptainer does, and why each option is there, was measured with Apptainer 1.4.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Literal

from agent.domain.job import Fault, FaultClass, Verdict

Network = Literal["none", "host"]

INPUTS = "/inputs"
RELATED = "/related"
OUTPUTS = "/outputs"
ALIASES: Mapping[str, str] = {
    INPUTS: "/data/inputs",
    RELATED: "/data/related",
    OUTPUTS: "/data/outputs",
}
"""Where older images look for the same directories."""

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Ending(StrEnum):
    """Why a container is no longer running."""

    EXITED = "exited"
    TIME_LIMIT = "time_limit"
    LOG_LIMIT = "log_limit"  # it wrote without end
    CANCELLED = "cancelled"
    MEMORY = "memory"  # its batch system ended it for what it took
    OUTSIDE = "outside"  # somebody ended it in the batch system
    REFUSED = "refused"  # the batch system will never run it
    LOST = "lost"  # its machine rebooted or its runner was killed: nobody saw it end


@dataclass(frozen=True, slots=True)
class User:
    """Whom the container runs as when the agent is root; both are numbers, neither is 0."""

    uid: int
    gid: int

    def __post_init__(self) -> None:
        if self.uid <= 0 or self.gid <= 0:
            raise ValueError(f"a container never runs as root: {self.uid}:{self.gid}")


@dataclass(frozen=True, slots=True)
class Container:
    """One run of an image. All paths are absolute and on the host; none of the directories is inside another.

    `user` is `None` when the agent is not root: the container then runs as the agent's own user. `unsquash` unpacks
    the image instead of mounting it, for a user who may not use FUSE. `nvidia` shows it the GPUs' devices and
    libraries. `cpus` and `memory_bytes` are limits that Apptainer is to keep, where it can.
    """

    image: PurePosixPath
    inputs: PurePosixPath
    related: PurePosixPath
    outputs: PurePosixPath
    scratch: PurePosixPath
    network: Network = "none"
    user: User | None = None
    unsquash: bool = False
    nvidia: bool = False
    cpus: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a run came to. `fault` is there exactly when the verdict is `failed`."""

    verdict: Verdict
    fault: Fault | None = None


def arguments(container: Container) -> list[str]:
    """Return Apptainer's arguments, without the program itself, for a run of `container`.

    Raises:
        ValueError: a path is relative or has a character that Apptainer cannot take.
    """
    return [
        "--silent",  # its INFO and WARNING lines would stand in the run's own stderr; errors stay
        "--nocolor",
        "run",
        "--containall",  # own PID and IPC namespaces: whatever ends the run ends everything inside
        "--no-home",
        "--cleanenv",
        "--no-eval",  # else a shell evaluates the environment's values
        "--no-umask",
        "--no-privs",
        *_identity(container.user),
        *(("--net", "--network", "none") if container.network == "none" else ()),
        *(("--unsquash",) if container.unsquash else ()),
        *(("--nv",) if container.nvidia else ()),
        *(("--cpus", str(container.cpus)) if container.cpus else ()),
        *(("--memory", str(container.memory_bytes)) if container.memory_bytes else ()),
        "--pwd",
        OUTPUTS,
        "--workdir",  # else /tmp and /var/tmp are 64 MB of memory
        _absolute(container.scratch),
        *_mounts(container),
        _absolute(container.image),
    ]


def mount(source: PurePosixPath, destination: str, *, writable: bool) -> str:
    """Return the value of `--mount` that shows the host's `source` as `destination`.

    Apptainer reads it as one record of comma-separated values, so that quoting takes commas, colons and quotes.
    """
    field = f"source={_absolute(source)}".replace('"', '""')
    return f'type=bind,"{field}",destination={destination}{"" if writable else ",ro"}'


def environment(program: PurePosixPath, home: PurePosixPath) -> dict[str, str]:
    """Return the whole environment of the Apptainer process.

    Nothing of the agent's own is in it: variables named APPTAINERENV_* and SINGULARITYENV_* pass into the container
    despite --cleanenv, and others set options. `home` is a private directory that goes with the run: Apptainer keeps
    its files there, and what --unsquash unpacks.
    """
    private = _absolute(home)
    return {
        "PATH": f"{program.parent}:{_SYSTEM_PATH}",
        "HOME": private,
        "LANG": "C.UTF-8",
        # The older names are what SingularityCE reads.
        **{f"{family}_{name}DIR": private for family in ("APPTAINER", "SINGULARITY") for name in ("TMP", "CACHE")},
    }


def inspection_environment(program: PurePosixPath, home: PurePosixPath, user: User | None) -> dict[str, str]:
    """Return the environment of `apptainer inspect`.

    For an image that is not a SIF, `inspect` runs the image's own /bin/sh, and as root with the rights of the host's
    root. It has no options against that, but takes them from the environment.
    """
    contained = {"CONTAINALL": "1", "NO_HOME": "1", "CLEANENV": "1", "NO_PRIVS": "1", "NET": "1", "NETWORK": "none"}
    if user is not None:
        contained["SECURITY"] = f"uid:{user.uid},gid:{user.gid}"
    return environment(program, home) | {
        f"{family}_{name}": value for family in ("APPTAINER", "SINGULARITY") for name, value in contained.items()
    }


def judge(  # noqa: PLR0911 one for each ending
    ending: Ending,
    exit_code: int | None,
    stderr_tail: str,
    *,
    time_limit_seconds: float | None = None,
    max_log_bytes: int | None = None,
    detail: str | None = None,
) -> Judgement:
    """Return what a run came to.

    `exit_code` is 128 + n for signal n. `stderr_tail` is the end of what the container and Apptainer wrote to
    standard error; it is hostile, and only ever quoted. `detail` is what a batch system says of its end.
    """
    match ending:
        case Ending.CANCELLED:
            return Judgement(Verdict.CANCELLED)
        case Ending.TIME_LIMIT:
            limit = f" of {_duration(time_limit_seconds)}" if time_limit_seconds else ""
            return _failed(FaultClass.TIME_LIMIT, detail or f"The run was stopped at its time limit{limit}.")
        case Ending.LOG_LIMIT:
            limit = f" of {max_log_bytes} bytes" if max_log_bytes else ""
            return _failed(FaultClass.USER_CODE, f"The run was stopped: its log grew past the limit{limit}.")
        case Ending.MEMORY:
            return _failed(FaultClass.MEMORY, detail or "The run needed more memory than it was given.")
        case Ending.OUTSIDE | Ending.REFUSED:
            return _failed(FaultClass.PLATFORM, detail or "The batch system ended the run.")
        case Ending.LOST:
            lost = "The machine restarted, or stopped the run; nobody saw how it ended."
            return _failed(FaultClass.NODE, detail or lost)
        case Ending.EXITED:
            return _judge_exit(exit_code, stderr_tail)


def _identity(user: User | None) -> Iterable[str]:
    # Without this the container is the host's uid 0 and can write its /proc/sys, whatever capabilities it lacks.
    return () if user is None else ("--security", f"uid:{user.uid},gid:{user.gid}")


def _mounts(container: Container) -> Iterable[str]:
    shown = (
        (container.inputs, INPUTS, False),
        (container.related, RELATED, False),
        (container.outputs, OUTPUTS, True),
    )
    for source, destination, writable in shown:
        for place in (destination, ALIASES[destination]):
            yield "--mount"
            yield mount(source, place, writable=writable)


def _absolute(path: PurePosixPath) -> str:
    text = str(path)
    if not path.is_absolute():
        raise ValueError(f"not an absolute path: {text!r}")
    # Apptainer's reader of comma-separated values turns \r\n into \n, and NUL ends a C string.
    if "\r" in text or "\0" in text:
        raise ValueError(f"Apptainer cannot take a path with a carriage return or NUL: {text!r}")
    return text


_ERROR_EXIT = 255
_USAGE_EXIT = 1
_MISSING_COMMAND = {126: "not executable", 127: "not found"}
_SIGNALS = {
    1: "SIGHUP (its terminal went away)",
    2: "SIGINT (interrupted)",
    3: "SIGQUIT",
    4: "SIGILL (an instruction that this machine's processor does not have)",
    6: "SIGABRT (the program aborted itself)",
    8: "SIGFPE (an arithmetic error, such as a division by zero)",
    11: "SIGSEGV (the program used memory that is not its own: a bug in it)",
    13: "SIGPIPE (it wrote to a pipe that nobody read)",
    15: "SIGTERM (asked to end)",
    24: "SIGXCPU (too much processor time)",
    25: "SIGXFSZ (a file became too large)",
}
_NOT_THE_PROGRAM = {
    7: (
        FaultClass.IMAGE,
        "The program could not read its own file (SIGBUS): the image is probably damaged. Upload it again.",
    ),
    9: (
        FaultClass.MEMORY,
        "The program was killed (SIGKILL), probably because it needed more memory than there was.",
    ),
}
_SIGNAL_BASE = 128
_SIGNAL_MAX = 64
_QUOTE_CHARACTERS = 300

_IMAGE_COMPLAINTS = (
    ("image format not recognized", "It is not an image that Apptainer knows (SIF, squashfs or ext3)."),
    ("bad superblock", "The image is damaged or was not uploaded whole."),
    ("unexpected EOF", "The image is damaged or was not uploaded whole."),
    ("failed to read SIF", "The image is damaged or was not uploaded whole."),
    ("exec format error", "The image was built for another kind of processor."),
    ("failed: fork/exec", "The image's default command, or the shell that it names, is not in the image."),
    ("too many levels of symbolic links", "The image's default command is a circle of links."),
    ("while checking container encryption", "Apptainer cannot open the image."),
    ("no partition found", "The image has no file system in it."),
)


def _judge_exit(exit_code: int | None, stderr_tail: str) -> Judgement:
    if exit_code == 0:
        return Judgement(Verdict.SUCCEEDED)
    if exit_code is None:
        return _failed(FaultClass.NODE, "Nobody saw how the run ended.")
    return _runtime_error(exit_code, stderr_tail) or _program_error(exit_code, stderr_tail)


def _program_error(exit_code: int, stderr_tail: str) -> Judgement:
    """Return the judgement of a program that failed, or that something killed."""
    signal = exit_code - _SIGNAL_BASE
    if signal in _NOT_THE_PROGRAM:
        return _failed(*_NOT_THE_PROGRAM[signal])
    last = _last_line(stderr_tail)
    said = f"It said last: {last}" if last else "It wrote nothing to standard error."
    if exit_code in _MISSING_COMMAND:
        how = f"ended with exit code {exit_code}: a command that it calls is {_MISSING_COMMAND[exit_code]}"
    elif 0 < signal <= _SIGNAL_MAX:
        how = f"was ended by {_SIGNALS.get(signal, f'signal {signal}')}"
    else:
        how = f"ended with exit code {exit_code}"
    return _failed(FaultClass.USER_CODE, f"The program {how}. {said}")


def _runtime_error(exit_code: int, stderr_tail: str) -> Judgement | None:
    """Return the judgement when it was Apptainer that failed, not the program: it then says FATAL last."""
    if exit_code == _USAGE_EXIT and 'Error for command "run"' in stderr_tail:
        detail = _quoted(stderr_tail.strip().splitlines()[0])
        return _failed(FaultClass.PLATFORM, f"Apptainer did not understand how it was called: {detail}")
    fatal = re.findall(r"^FATAL:\s*(.+)$", stderr_tail, re.MULTILINE)
    if exit_code != _ERROR_EXIT or not fatal:
        return None
    detail = _quoted(fatal[-1])
    for sign, meaning in _IMAGE_COMPLAINTS:
        if sign in fatal[-1]:
            return _failed(FaultClass.IMAGE, f"{meaning} Apptainer said: {detail}")
    return _failed(FaultClass.PLATFORM, f"Apptainer could not start the container: {detail}")


def _failed(cls: FaultClass, message: str) -> Judgement:
    return Judgement(Verdict.FAILED, Fault(cls, message))


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return _quoted(lines[-1]) if lines else ""


def _quoted(line: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in line).strip()
    return printable if len(printable) <= _QUOTE_CHARACTERS else printable[:_QUOTE_CHARACTERS] + "…"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    parts = [(hours, "h"), (minutes, "min"), (whole % 60, "s")]
    shown = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(shown) or f"{seconds:g} s"
