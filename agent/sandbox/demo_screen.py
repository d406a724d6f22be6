"""What the demo shows: a live table of stages on a terminal, plain lines elsewhere."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 120
_REFRESH_PER_SECOND = 10
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_DETAIL_SECONDS = 1.0  # between two plain lines about the same stage
_UNIT = 1000


class Mark(StrEnum):
    """How far a stage is."""

    WAITING = "waiting"
    WORKING = "working"
    DONE = "done"
    FAILED = "failed"


_LOOKS = {Mark.WAITING: ("·", "dim"), Mark.DONE: ("✓", "green"), Mark.FAILED: ("✗", "bold red")}


@dataclass(slots=True)
class Stage:
    """One row of the table."""

    name: str
    mark: Mark = Mark.WAITING
    started: float = 0.0
    seconds: float | None = None
    detail: str = ""
    told_at: float = 0.0
    told_detail: str = ""


class Screen:
    """Shows stages and lines as they come; a context manager, inside which the table is live."""

    def __init__(self, stages: Iterable[str], console: Console | None = None) -> None:
        self.console = console or _console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._stages = {name: Stage(name) for name in stages}
        self._display = Live(console=self.console, get_renderable=self._table, refresh_per_second=_REFRESH_PER_SECOND)

    def __enter__(self) -> Self:
        if self.live:
            self._display.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the table as it is; harmless when called twice."""
        if self.live:
            self._display.stop()

    def begin(self, name: str, detail: str = "") -> None:
        """Mark a stage as being worked on; harmless when it is already."""
        stage = self._stages[name]
        if stage.mark is Mark.WAITING:
            stage.mark, stage.started, stage.detail = Mark.WORKING, time.monotonic(), detail
            self._tell(stage, "…")

    def detail(self, name: str, detail: str) -> None:
        """Say how far the stage is; may be called often."""
        stage = self._stages[name]
        stage.detail = detail
        if detail != stage.told_detail and time.monotonic() - stage.told_at > _DETAIL_SECONDS:
            self._tell(stage, "…")

    def done(self, name: str, detail: str = "", seconds: float | None = None) -> None:
        """Mark a stage as done, in the time measured here unless `seconds` says better."""
        stage = self._stages[name]
        if stage.mark in {Mark.DONE, Mark.FAILED}:
            return
        measured = time.monotonic() - stage.started if stage.mark is Mark.WORKING else 0.0
        stage.mark, stage.seconds = Mark.DONE, measured if seconds is None else seconds
        stage.detail = detail or stage.detail
        self._tell(stage, f"done in {stage.seconds:.1f} s")

    def fail_open(self, why: str) -> None:
        """Mark whatever is being worked on as failed."""
        for stage in self._stages.values():
            if stage.mark is Mark.WORKING:
                stage.mark, stage.seconds = Mark.FAILED, time.monotonic() - stage.started
                stage.detail = why
                self._tell(stage, "stopped")

    def container(self, line: str) -> None:
        """Show a line that the container wrote."""
        self.console.print(Text("  │ ", "cyan") + Text(printable(line)), soft_wrap=not self.live)

    def mute(self) -> None:
        """Show nothing more: nobody looks on any longer."""
        self.close()
        self.console.quiet = True

    def say(self, text: str, style: str = "") -> None:
        """Show a line of our own."""
        self.console.print(Text(text, style), soft_wrap=True)

    def show(self, what: RenderableType) -> None:
        """Show something larger."""
        self.console.print(what)

    def _tell(self, stage: Stage, what: str) -> None:
        if self.live:
            return
        stage.told_at, stage.told_detail = time.monotonic(), stage.detail
        self.console.print(
            Text(f"{stage.name}: {what}" + (f"  {stage.detail}" if stage.detail else "")), soft_wrap=True
        )
        self.console.file.flush()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(width=1)
        table.add_column(min_width=12)
        table.add_column(justify="right", min_width=7)
        table.add_column(overflow="ellipsis", no_wrap=True)
        for stage in self._stages.values():
            if stage.mark is Mark.WORKING:
                now = time.monotonic()
                frame = _SPINNER[int(now * _REFRESH_PER_SECOND) % len(_SPINNER)]
                sign, style, seconds = frame, "yellow", f"{now - stage.started:.1f} s"
            else:
                sign, style = _LOOKS[stage.mark]
                seconds = "" if stage.seconds is None else f"{stage.seconds:.1f} s"
            name_style = "dim" if stage.mark is Mark.WAITING else ""
            table.add_row(Text(sign, style), Text(stage.name, name_style), seconds, Text(stage.detail, "dim"))
        return table


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def printable(text: str) -> str:
    """Return `text` with a visible sign for every character that could move the cursor or hide something."""
    expanded = text.rstrip("\r\n").expandtabs(4)
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in expanded)


def size(count: int | None) -> str:
    """Return a number of bytes for people, as `1.2 MB`."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < _UNIT:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"  # noqa: PLR2004 digits
        value /= _UNIT
    return f"{value:.1f} GB"


def table_of(title: str, columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; each column is its title and whether it holds numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for name, numeric in columns:
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def csv_table(title: str, path: Path, columns: Sequence[str]) -> Table:
    """Return some columns of a CSV file as a table."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [[row[column] for column in columns] for row in csv.DictReader(file)]
    shown = [[_rounded(cell) for cell in row] for row in rows]
    return table_of(title, [(name.replace("_", " "), number > 0) for number, name in enumerate(columns)], shown)


def _rounded(cell: str) -> str:
    try:
        value = float(cell)
    except ValueError:
        return cell
    return cell if value.is_integer() else f"{value:.4g}"
