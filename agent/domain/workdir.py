"""Where a job's files are, and names that are safe to give them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath

MANIFEST = ".manifest.json"
NAME_MAX_BYTES = 255  # ext4, xfs, NFS: one path component
_REPLACEMENT = "_"


@dataclass(frozen=True, slots=True)
class Layout:
    """The directories of one job below the data directory.

    ```
    jobs/<job id>/
      inputs/     what the container sees as /inputs, with .manifest.json
      related/    what it sees as /related; the image is one of these
      run-<n>/    one start of the container: outputs/ scratch/ stdout.log stderr.log and the runner's records
    ```
    """

    data: PurePath
    job_id: str

    @property
    def root(self) -> PurePath:
        """Everything that this job keeps on disk."""
        return self.data / "jobs" / self.job_id

    @property
    def inputs(self) -> PurePath:
        """What the container sees as `/inputs`."""
        return self.root / "inputs"

    @property
    def related(self) -> PurePath:
        """What the container sees as `/related`."""
        return self.root / "related"

    def run(self, launch: int) -> PurePath:
        """Return the directory of the launch with this number, counted from 1."""
        return self.root / f"run-{launch}"

    def log(self, stream: str, launch: int = 1) -> PurePath:
        """Return where that launch's `stdout` or `stderr` goes."""
        return self.run(launch) / f"{stream}.log"


def safe_name(name: str) -> str:
    """Return `name` as one path component that stays inside its directory and that tools can print.

    Separators, NUL, control characters and lone surrogates become `_`; what is left of `.`, `..` and nothing at all
    becomes `_` too; a name of more than 255 bytes loses the end of its stem, not its suffix.
    """
    cleaned = "".join(_REPLACEMENT if _unsafe(character) else character for character in name)
    if cleaned.strip(". ") == "":
        cleaned = _REPLACEMENT * max(1, len(cleaned))
    return _shorten(cleaned, NAME_MAX_BYTES)


def unique_names(entries: Iterable[tuple[str, str]], taken: Iterable[str] = (MANIFEST,)) -> list[str]:
    """Return a file name for each `(name, id)`, in order, no two alike.

    The first of a name keeps it; the next becomes `<stem>.<first 8 of its id><suffix>`, and should that be taken
    too, the whole id is used. Names in `taken` are given to nobody.
    """
    used = set(taken)
    names: list[str] = []
    for number, (name, entity_id) in enumerate(entries):
        wanted = safe_name(name)
        marks = ("", entity_id[:8], entity_id, f"{entity_id}.{number}")
        candidates = (_marked(wanted, safe_name(mark) if mark else "") for mark in marks)
        chosen = next(candidate for candidate in candidates if candidate not in used)
        used.add(chosen)
        names.append(chosen)
    return names


def _unsafe(character: str) -> bool:
    return character == "/" or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}


def _marked(name: str, mark: str) -> str:
    if not mark:
        return name
    stem, suffix = _split(name)
    tail = f".{mark}{suffix}"
    return _shorten(stem, NAME_MAX_BYTES - len(tail.encode()), keep_suffix=False) + tail


def _shorten(name: str, limit: int, *, keep_suffix: bool = True) -> str:
    if len(name.encode()) <= limit:
        return name
    stem, suffix = _split(name) if keep_suffix else (name, "")
    kept = stem.encode()[: limit - len(suffix.encode())].decode(errors="ignore")
    return kept + suffix


def _split(name: str) -> tuple[str, str]:
    """Split off the suffix, with the one before it when that says how it is packed (`reads.fastq.gz`)."""
    path = PurePosixPath(name)
    suffixes = path.suffixes
    packed = {".gz", ".bz2", ".xz", ".zst", ".zip"}
    suffix = "".join(suffixes[-2:]) if len(suffixes) > 1 and suffixes[-1].lower() in packed else path.suffix
    if len(suffix.encode()) > 32:  # noqa: PLR2004 a "suffix" that long is part of a sentence
        suffix = ""
    return name[: len(name) - len(suffix)], suffix
