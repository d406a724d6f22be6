"""What staging has put in place: the files below a job's directory, and the record that says which of them count.

The order is: bytes synced, renamed, directory synced, and then the file's line in the record. So a file that has its
line is whole, whatever happened since; one that has none is fetched again.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.adapters.disk import sync_directory, write_whole
from agent.adapters.files import remove_tree
from agent.domain.workdir import MANIFEST

FOLDERS = ("inputs", "related")
_RECORD = "staged.jsonl"
_RUN = re.compile(r"run-([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Staged:
    """One file in its place, as the manifest and the record tell it."""

    folder: str  # "inputs" or "related"
    file_name: str
    name: str
    type: str
    id: str
    size: int
    sha256: str


Record = dict[tuple[str, str], Staged]
"""What is in place, by folder and file name."""


def read_record(root: Path) -> Record:
    """Return what is in place; a half-written line does not count, nor does a file that is not there as it says."""
    try:
        return _parse(root, (root / _RECORD).read_bytes())
    except FileNotFoundError:
        return {}


def _parse(root: Path, content: bytes) -> Record:
    found: Record = {}
    for line in content.split(b"\n"):
        with suppress(ValueError, TypeError, OSError):
            staged = Staged(**json.loads(line))
            status = (root / staged.folder / staged.file_name).lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size == staged.size:
                found[staged.folder, staged.file_name] = staged
    return found


def tidy(root: Path, record: Record, launch: int, unfinished: Container[Path] = ()) -> None:
    """Remove what takes room for nothing: files that do not count, and what earlier launches wrote but their logs.

    What `unfinished` names stays: fetching goes on with it.
    """
    for folder in FOLDERS:
        with suppress(FileNotFoundError):
            for path in list((root / folder).iterdir()):
                if (folder, path.name) not in record and path not in unfinished:
                    remove_tree(path)
    for number, directory in runs(root):
        if number < launch:
            remove_run_files(directory)


def prepare(root: Path) -> None:
    """Make the job's directories durably, closed to everybody else."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)
    (root / _RECORD).touch(mode=0o600)
    sync_directory(root)
    sync_directory(root.parent)


def append(root: Path, group: Iterable[Staged]) -> None:
    """Have files count, now that they are in their places.

    Raises:
        OSError: the disk refuses; they do not count.
    """
    # A line feed on either side: what a full disk cut short must not swallow the line after it.
    lines = "".join(f"\n{json.dumps(asdict(staged))}\n" for staged in group)
    left = memoryview(lines.encode())
    descriptor = os.open(root / _RECORD, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifests(root: Path, listed: list[Staged]) -> None:
    """Tell the container which file is which."""
    for folder in FOLDERS:
        entries = [asdict(staged) for staged in listed if staged.folder == folder]
        for entry in entries:
            del entry["folder"]
        write_whole(root / folder / MANIFEST, json.dumps({"files": entries}, indent=2, ensure_ascii=False).encode())


def runs(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the directories of a job's launches with their numbers."""
    with suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            if (match := _RUN.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False):
                yield int(match[1]), Path(entry.path)


def remove_work(root: Path) -> bool:
    """Remove what a job has on the disk but the logs and the runners' records; return whether there was any.

    Raises:
        OSError: something could not be removed; the rest was.
    """
    kept = {directory for _, directory in runs(root)}
    with suppress(FileNotFoundError):
        others = [path for path in root.iterdir() if path not in kept]
        return _remove([*others, *(inner for directory in kept for inner in _directories(directory))])
    return False


def remove_run_files(directory: Path) -> bool:
    """Remove what one launch has on the disk but its logs and the runner's records; return whether there was any.

    Raises:
        OSError: something could not be removed; the rest was.
    """
    return _remove(_directories(directory))


def _directories(directory: Path) -> list[Path]:
    """Return what is in a launch's directory and no log or record: those are files, all else is in directories."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []


def _remove(paths: list[Path]) -> bool:
    failed: list[OSError] = []
    for path in paths:
        try:
            remove_tree(path)
        except FileNotFoundError:
            continue  # somebody else removed it at the same time
        except OSError as error:
            failed.append(error)
    if failed:
        raise failed[0]
    return bool(paths)
