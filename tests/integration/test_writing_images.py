"""Every example of docs/writing-images.md is run, in order, offline."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "writing-images.md"
_BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_EXAMPLES_AT_LEAST = 8


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: `sh run [exit=N]`, `… file=NAME`, `text output`, or only to be read."""

    line: int
    words: tuple[str, ...]
    text: str

    def value(self, name: str) -> str | None:
        """Return what follows `name=` in the block's first line."""
        for word in self.words:
            if word.startswith(f"{name}="):
                return word.removeprefix(f"{name}=")
        return None


def blocks() -> list[Block]:
    text = DOCUMENT.read_text()
    return [
        Block(text.count("\n", 0, found.start()) + 1, tuple(found["info"].split()), found["text"])
        for found in _BLOCK.finditer(text)
    ]


def path_with_the_agent(directory: Path) -> str:
    """Return a PATH on which `ovation-agent` is this checkout's."""
    directory.mkdir()
    program = directory / "ovation-agent"
    checkout = shlex.quote(str(DOCUMENT.parents[1]))
    python = shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={checkout} exec {python} -m agent "$@"\n')
    program.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def run(block: Block, directory: Path, search_path: str) -> str:
    """Run a block as a shell would and return all that it printed."""
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", block.text],
        check=False,
        cwd=directory,
        env={"PATH": search_path, "HOME": str(directory), "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    expected = int(block.value("exit") or 0)
    assert done.returncode == expected, f"line {block.line}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def is_printed(line: str, printed: str) -> bool:
    """Return whether a line was printed; `…` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in line.split("…"))
    return re.search(f"^{pattern}$", printed, re.MULTILINE) is not None


def test_the_examples_work(tmp_path: Path) -> None:
    search_path = path_with_the_agent(tmp_path / "bin")
    directory = tmp_path / "examples"
    directory.mkdir()
    directory.chmod(0o755)
    ran = 0
    printed = ""
    for block in blocks():
        name = block.value("file")
        if name:
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
        elif "run" in block.words:
            printed = run(block, directory, search_path)
            ran += 1
        elif "output" in block.words:
            missing = [line for line in block.text.splitlines() if not is_printed(line, printed)]
            assert missing == [], f"line {block.line}: not in\n{printed}"
    assert ran >= _EXAMPLES_AT_LEAST


def test_the_container_is_not_told_the_callers_secret(tmp_path: Path) -> None:
    """What the page says of SECRET is looked at here: an empty line does not show in a block."""
    test_the_examples_work(tmp_path)
    assert (tmp_path / "examples/third/secret.txt").read_text() == "\n"
