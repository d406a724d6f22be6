"""The Apptainer program: where it is, what it says of itself and of an image."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import pwd
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from agent.adapters.executor import ImageFacts
from agent.domain.container import User, environment, inspection_environment
from agent.domain.image import HEADER_BYTES, complaint, is_sif
from agent.errors import ExecutorUnavailable, ImageError

_NAMES = ("apptainer", "singularity")
# What hangs is done again early enough for the run to begin within a minute of the machine's coming back to life; what
# looks into an image that is no SIF may have to unpack it first.
_ANSWER_SECONDS = 30.0
_UNPACKED_SECONDS = 120.0
_ANSWER_MAX_BYTES = 1_000_000
_NO_RUNSCRIPT = "There is no runscript defined for this container"
_FUSE = Path("/dev/fuse")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a short-lived command came to."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """Its last line on standard error."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.exit_code}, no message"


def find_program(search_path: str | None = None) -> Path:
    """Return the resolved path of `apptainer`, else `singularity`, on PATH.

    Raises:
        ExecutorUnavailable: neither is there.
    """
    for name in _NAMES:
        found = shutil.which(name, path=search_path)
        if found:
            return Path(found).resolve()
    raise ExecutorUnavailable(
        "Neither apptainer nor singularity is on PATH. Install Apptainer (apptainer.org/docs/admin), "
        "or put the folder that it is in on the agent's PATH."
    )


def fuse_is_usable(device: Path = _FUSE) -> bool:
    """Return whether this user may mount images with FUSE; without it they are unpacked before each run."""
    return os.access(device, os.R_OK | os.W_OK)


def check_user() -> None:
    """Check what Apptainer needs of the user that the agent runs as.

    Raises:
        ExecutorUnavailable: the user has no passwd entry, or may not make user namespaces.
    """
    uid = os.getuid()
    try:
        pwd.getpwuid(uid)
    except KeyError:
        raise ExecutorUnavailable(
            f"The agent runs as user id {uid}, which has no entry in /etc/passwd; Apptainer needs one. "
            f"Add it (useradd --uid {uid} ovation-agent), or run the agent as a user that has one."
        ) from None
    if uid != 0 and _namespaces_are_off():
        raise ExecutorUnavailable(
            "This machine allows plain users no user namespaces, which Apptainer needs. As root: "
            "sysctl -w user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1 (and keep it in "
            "/etc/sysctl.d), or install Apptainer's setuid variant (apptainer-suid)."
        )


async def version(program: Path, temporary: Path | None = None) -> str:
    """Return what the program calls itself, for instance `apptainer version 1.4.5`; see `ask` for `temporary`.

    Raises:
        ExecutorUnavailable: it does not start.
    """
    answer = await ask(program, ["--version"], temporary=temporary)
    if answer.exit_code != 0:
        raise ExecutorUnavailable(f"{program} does not work: {answer.complaint}")
    return answer.stdout.strip()


async def inspect(program: Path, image: Path, user: User | None, temporary: Path | None = None) -> ImageFacts:
    """Read an image's labels and default command. Nothing in the image runs with the rights of the host's root.

    What is raised does not name the image: whoever asked knows the name that people know.

    Raises:
        ImageError: not an image, truncated, or without a default command.
        ExecutorUnavailable: Apptainer does not start.
    """
    wrong = await asyncio.to_thread(_file_complaint, image)
    if wrong:
        raise ImageError(wrong)
    runtime = await version(program, temporary)
    asked = ["--silent", "--nocolor", "inspect", "--all", str(image)]
    seconds = _ANSWER_SECONDS if await asyncio.to_thread(_is_sif, image) else _UNPACKED_SECONDS
    answer = await ask(program, asked, user=user, timeout_seconds=seconds, temporary=temporary)
    if answer.exit_code != 0:
        if "not recognized" in answer.stderr:
            raise ImageError(
                "This is not an image that Apptainer knows (a SIF file, or a squashfs or ext3 .simg/.img)."
            )
        raise ImageError(f"The image cannot be read. Apptainer said: {answer.complaint}")
    attributes = _attributes(answer.stdout)
    runscript = str(attributes.get("runscript") or "")
    if not runscript.strip() or _NO_RUNSCRIPT in runscript:
        raise ImageError(
            "The image has no default command, so there is nothing to run. Give it a %runscript and build it again."
        )
    labels = attributes.get("labels") or {}
    return ImageFacts(
        labels={str(key): str(value) for key, value in labels.items()},
        runscript=runscript,
        runtime=runtime,
        definition=str(attributes.get("deffile") or ""),
    )


async def ask(
    program: Path,
    arguments: list[str],
    *,
    user: User | None = None,
    timeout_seconds: float = _ANSWER_SECONDS,
    temporary: Path | None = None,
) -> Answer:
    """Run a short Apptainer command in the environment of an inspection; `temporary` is where its home goes.

    Raises:
        ExecutorUnavailable: it does not start, or does not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="ovation-agent-", dir=temporary, ignore_cleanup_errors=True) as home:
        variables = inspection_environment(PurePosixPath(program), PurePosixPath(home), user)
        if arguments[:1] == ["--version"]:
            variables = environment(PurePosixPath(program), PurePosixPath(home))
        try:
            process = await asyncio.create_subprocess_exec(
                program,
                *arguments,
                env=variables,
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ExecutorUnavailable(f"{program} does not start: {error.strerror}") from error
        try:
            async with asyncio.timeout(timeout_seconds):
                stdout, stderr = await asyncio.gather(_beginning(process.stdout), _beginning(process.stderr))
                await process.wait()
        except TimeoutError:
            raise ExecutorUnavailable(f"{program} did not answer within {timeout_seconds:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                await process.wait()
        return Answer(process.returncode or 0, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


async def _beginning(stream: asyncio.StreamReader | None) -> bytes:
    """Read a stream to its end and keep no more than may be wanted of it: an image decides what it prints."""
    kept = b""
    while stream is not None and (chunk := await stream.read(65536)):
        if len(kept) < _ANSWER_MAX_BYTES:
            kept += chunk
    return kept


def _file_complaint(image: Path) -> str | None:
    if image.is_dir():
        return "This is a directory. Build an image file from it: apptainer build NAME.sif DIRECTORY"
    if not image.is_file():
        return "There is no such file."
    try:
        with image.open("rb") as file:
            return complaint(file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size, platform.machine())
    except PermissionError:
        return "The agent may not read this file."


def _is_sif(image: Path) -> bool:
    with image.open("rb") as file:
        return is_sif(file.read(HEADER_BYTES))


def _attributes(document: str) -> dict[str, Any]:
    try:
        attributes: dict[str, Any] = json.loads(document)["data"]["attributes"]
    except (ValueError, KeyError, TypeError):
        raise ImageError("Apptainer's description of the image cannot be read.") from None
    return attributes


def _namespaces_are_off() -> bool:
    for name in ("user/max_user_namespaces", "kernel/unprivileged_userns_clone"):
        with contextlib.suppress(OSError):
            if (Path("/proc/sys") / name).read_text().strip() == "0":
                return True
    return False
