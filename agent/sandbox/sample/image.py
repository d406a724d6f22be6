"""The sample image: built once from what is on the machine, without network, then kept.

`python -m agent.sandbox.sample.image --cache DIR` prints its path. Two that build at the same time do it twice: the
file appears under its name whole or not at all.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .rootfs import SampleError, assemble, distributions

_BUILD_PREFIX = "building-"
_BUILD_SECONDS = 300
_KEPT_SECONDS = 30 * 86_400  # images of environments that are no longer used


def cache_directory() -> Path:
    """Return where this user's built images are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "ovation-agent"


def image_path(cache: Path) -> Path:
    """Return the path in `cache` of the image that this environment makes; its name follows from what goes in.

    Raises:
        SampleError: something that goes in is not installed.
    """
    digest = hashlib.sha256()
    for part in _ingredients():
        digest.update(f"{part}\n".encode())
    return cache / f"sample-{digest.hexdigest()[:16]}.sif"


def ensure(cache: Path, say: Callable[[str], None]) -> Path:
    """Return the image, and build it first if it is not in `cache`; `say` hears of each step of building.

    Raises:
        SampleError: it cannot be built; the message says why and what to do.
    """
    image = image_path(cache)
    if image.is_file():
        image.touch()
        return image
    program = container_program()
    with _working_directory(cache) as work:
        root, built = work / "root", work / image.name
        root.mkdir()
        assemble(root, say)
        say("packing")
        _pack(program, root, built, work)
        built.replace(image)
    _forget_old_images(image)
    return image


def container_program() -> str:
    """Return the path of Apptainer, or of Singularity.

    Raises:
        SampleError: neither is on PATH.
    """
    program = shutil.which("apptainer") or shutil.which("singularity")
    if program is None:
        raise SampleError("neither apptainer nor singularity is on PATH: `make setup` installs Apptainer")
    return program


def clean(cache: Path) -> None:
    """Remove what builders that are no longer alive have left in `cache`."""
    for directory in cache.glob(f"{_BUILD_PREFIX}*"):
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(descriptor)


def _ingredients() -> Iterator[str]:
    yield from (sys.version, platform.machine(), *platform.libc_ver())
    for path in (Path(getattr(sys, "_base_executable", sys.executable)), Path("/bin/sh")):
        facts = path.resolve().stat()
        yield f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    for distribution in distributions():
        yield f"{distribution.metadata['Name']} {distribution.version} {distribution.locate_file('')}"
        yield hashlib.sha256((distribution.read_text("RECORD") or "").encode()).hexdigest()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        yield hashlib.sha256(source.read_bytes()).hexdigest()


@contextmanager
def _working_directory(cache: Path) -> Iterator[Path]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = cache / f"{_BUILD_PREFIX}{os.urandom(8).hex()}"
        work.mkdir(mode=0o755)
    except OSError as error:
        raise SampleError(
            f"cannot write to {cache} ({error.strerror}): set XDG_CACHE_HOME to a writable directory"
        ) from error
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Held until the directory is gone: `clean` tells by it whether the builder lives.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield work
    except OSError as error:
        raise SampleError(f"cannot build the sample image: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(descriptor)


def _pack(program: str, root: Path, image: Path, work: Path) -> None:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(work),
        "LC_ALL": "C",
        "APPTAINER_TMPDIR": str(work),
        "SINGULARITY_TMPDIR": str(work),
        "APPTAINER_CACHEDIR": str(work / "cache"),
        "SINGULARITY_CACHEDIR": str(work / "cache"),
    }
    # Of what packs as quickly (lz4, zstd 1) gzip 1 is the smallest or nearly so; its default takes seven times as long.
    fast = ["--mksquashfs-args", "-comp gzip -Xcompression-level 1"] if Path(program).name == "apptainer" else []
    result = subprocess.run(  # noqa: S603 the program was found above; the paths are our own
        [program, "build", *fast, str(image), str(root)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_BUILD_SECONDS,
        check=False,
    )
    if result.returncode != 0 or not image.is_file():
        tail = "\n".join(result.stdout.splitlines()[-5:])
        raise SampleError(f"{program} build ended with {result.returncode}:\n{tail}")


def _forget_old_images(current: Path) -> None:
    for image in current.parent.glob("sample-*.sif"):
        if image != current and image.stat().st_mtime < time.time() - _KEPT_SECONDS:
            image.unlink(missing_ok=True)


def main() -> int:
    """Print the image's path on stdout and the steps on stderr; return 1 with the reason when it cannot be built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=None, help="where to keep it (default: the user's cache)")
    options = parser.parse_args()
    os.umask(0o022)
    try:
        cache = (options.cache or cache_directory()).absolute()
        clean(cache)
        image = ensure(cache, lambda step: _say(sys.stderr.fileno(), step))
    except SampleError as error:
        _say(sys.stderr.fileno(), f"error: {error}")
        return 1
    _say(sys.stdout.fileno(), str(image))
    return 0


def _say(descriptor: int, line: str) -> None:
    os.write(descriptor, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
