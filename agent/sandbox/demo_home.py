"""The demo's own directory."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.sandbox.demo_errors import DemoFailed


class Home:
    """A new directory for everything that the demo writes besides the outputs; `close` removes it unless it is kept.

    Raises:
        DemoFailed: it cannot be made.
    """

    def __init__(self, parent: Path | None, keep: bool) -> None:
        self._keep = keep
        try:
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix="ovation-demo-", dir=parent)).absolute()
        except OSError as error:
            where = parent or tempfile.gettempdir()
            raise DemoFailed(
                f"cannot make a directory in {where} ({error.strerror}): name another with --directory"
            ) from error
        # The container's user must pass through to what is bound into it; what is secret has modes of its own.
        self.path.chmod(0o711)
        self.downloads = self.path / "downloads"
        self.downloads.mkdir()
        # What the demo's processes put among temporary files goes with the rest; several users may be among them.
        self.temporary = self.path / "tmp"
        self.temporary.mkdir()
        self.temporary.chmod(0o1777)

    def close(self) -> None:
        """Remove the directory unless it is kept; what the container made unwritable goes as well."""
        if not self._keep:
            shutil.rmtree(self.path, onerror=_insist)

    def farewell(self) -> str:
        """Say what is left of the directory."""
        return f" The files of this demo are in {self.path}." if self._keep else ""


def _insist(function: Callable[..., Any], path: str, _: object) -> None:
    for each in (os.path.dirname(path), path):  # noqa: PTH120 shutil gives and takes text
        if not os.path.islink(each) and os.path.isdir(each):  # noqa: PTH112, PTH114 the same
            os.chmod(each, stat.S_IRWXU)  # noqa: PTH101 the same
    if function in (os.open, os.scandir, os.lstat):
        shutil.rmtree(path, ignore_errors=True)
    else:
        function(path)
