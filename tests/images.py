"""Small images for tests, built offline from the static busybox: a SIF takes 0.2 s and 1 MB."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from agent.adapters.apptainer import find_program

SCRIPT = "script.sh"
"""The file among the inputs that a `scripted` image runs."""

_SCRIPTED = f"#!/bin/sh\n. /inputs/{SCRIPT}\n"
_BUILD_ENVIRONMENT_DROPPED = ("APPTAINER", "SINGULARITY")


class Images:
    """Images by what they run, each built once and kept in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def scripted(self) -> Path:
        """A SIF that runs `/inputs/script.sh`, so that a test need not build its own image."""
        return self.sif(_SCRIPTED)

    @property
    def scripted_simg(self) -> Path:
        """The same as a legacy squashfs image."""
        return self.simg(_SCRIPTED)

    @property
    def without_command(self) -> Path:
        """A SIF without a default command."""
        return self.sif(None)

    @property
    def truncated(self) -> Path:
        """A SIF of which the end is missing: its metadata can be read all the same."""
        target = self._directory / "truncated.sif"
        if not target.exists():
            whole = self.scripted.read_bytes()
            target.write_bytes(whole[: len(whole) // 2])
        return target

    def sif(self, runscript: str | None) -> Path:
        """Return a SIF whose default command is `runscript`, or that has none."""
        target = self._directory / f"{_name(runscript)}.sif"
        if not target.exists():
            rootfs = self._rootfs(runscript)
            _run([str(find_program()), "-s", "build", "--force", str(target), str(rootfs)])
        return target

    def simg(self, runscript: str | None) -> Path:
        """Return a legacy squashfs image whose default command is `runscript`, or that has none."""
        target = self._directory / f"{_name(runscript)}.simg"
        if not target.exists():
            squash(self._rootfs(runscript), target)
        return target

    def _rootfs(self, runscript: str | None) -> Path:
        rootfs = self._directory / f"{_name(runscript)}.rootfs"
        if not rootfs.exists():
            make_rootfs(rootfs, runscript)
        return rootfs


@cache
def images() -> Images:
    """Return the images of this test session; they are removed when it ends."""
    directory = Path(tempfile.mkdtemp(prefix="ovation-agent-images-"))
    directory.chmod(0o755)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Images(directory)


def make_rootfs(rootfs: Path, runscript: str | None) -> Path:
    """Make the smallest root file system that Apptainer runs: busybox, its commands, and the default command."""
    for name in ("bin", "dev", "proc", "sys", "tmp", "var/tmp", "etc", "root", ".singularity.d"):
        (rootfs / name).mkdir(parents=True, exist_ok=True)
    busybox = rootfs / "bin" / "busybox"
    shutil.copy(_tool("busybox"), busybox)
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True)
    for command in listed.stdout.split():
        if command != "busybox":
            (rootfs / "bin" / command).symlink_to("busybox")
    (rootfs / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (rootfs / "etc/group").write_text("root:x:0:\n")
    if runscript is not None:
        path = rootfs / ".singularity.d/runscript"
        path.write_text(runscript)
        path.chmod(0o755)
    return rootfs


def squash(rootfs: Path, target: Path) -> Path:
    """Make a legacy squashfs image of a root file system."""
    mksquashfs = _tool("mksquashfs", beside=find_program())
    _run([mksquashfs, str(rootfs), str(target), "-noappend", "-all-root", "-quiet", "-no-progress"])
    return target


def write_script(inputs: Path, script: str) -> None:
    """Give a `scripted` image its script, readable for whomever the container runs as."""
    inputs.mkdir(exist_ok=True)
    inputs.chmod(0o755)
    path = inputs / SCRIPT
    path.write_text(script)
    path.chmod(0o644)


def _name(runscript: str | None) -> str:
    return "none" if runscript is None else hashlib.sha256(runscript.encode()).hexdigest()[:16]


def _tool(name: str, beside: Path | None = None) -> str:
    found = (beside and shutil.which(name, path=str(beside.parent))) or shutil.which(name)
    assert found, f"{name} is not installed"
    return found


def _run(command: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_BUILD_ENVIRONMENT_DROPPED)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
