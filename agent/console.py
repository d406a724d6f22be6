"""What the commands show: tables on a terminal, plain lines in a pipe, JSON when asked for."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import Any

from agent.logs import printable

_COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}


def show_jobs(jobs: list[dict[str, Any]], *, as_json: bool) -> None:
    """List jobs, one a line."""
    if as_json:
        _as_json(jobs)
        return
    rows = [
        (
            job["id"],
            job["state"],
            job["activity_name"],
            str(job["run"]),
            job["image_name"],
            _moment(job["created_at"]),
            _cause(job),
        )
        for job in jobs
    ]
    _table(("job", "state", "activity", "run", "image", "created", "cause"), rows)


def show_job(job: dict[str, Any], events: list[dict[str, Any]], *, as_json: bool) -> None:
    """Tell one job's story."""
    if as_json:
        _as_json({**job, "events": events})
        return
    facts = ("id", "activity_id", "activity_name", "image_name", "run", "trigger", "requested_by", "state", "exit_code")
    _table(("", ""), [(name, str(job[name])) for name in facts if job[name] is not None])
    if cause := _cause(job):
        print(f"\n{printable(cause)}\n")  # noqa: T201 this is what the command is for
    _table(
        ("at", "state", "attempt", "note"),
        [(_moment(each["at"]), each["state"], str(each["attempt"]), each["note"] or "") for each in events],
    )


def show_activity(activity: dict[str, Any], *, as_json: bool) -> None:
    """Say what led to an Activity's runs, or why there is none."""
    if as_json:
        _as_json(activity)
        return
    _table(("received", "from"), [(_moment(each["at"]), each["source"]) for each in activity["deliveries"]])
    judged = f"judged {_moment(activity['judged_at'])}" if activity["judged_at"] else "not judged yet"
    print(f"\n{judged}" + "".join(f"\n  {printable(reason)}" for reason in activity["reasons"]))  # noqa: T201
    if activity["due_at"]:
        print(f"  next look {_moment(activity['due_at'])}")  # noqa: T201
    print()  # noqa: T201
    show_jobs(activity["jobs"], as_json=False)


async def show_log(pieces: AsyncIterator[bytes]) -> None:
    """Print what a container wrote: byte for byte into a pipe, without control characters on a terminal."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    is_terminal = sys.stdout.isatty()
    async for piece in pieces:
        if is_terminal:
            sys.stdout.write(printable(decoder.decode(piece), keep="\n\r\t"))
        else:
            sys.stdout.buffer.write(piece)
        sys.stdout.flush()


def _cause(job: dict[str, Any]) -> str:
    if job["fault"]:
        return f"{job['fault']['class']}: {job['fault']['message']}"
    return job["waiting_for"] or ""


def _moment(text: str | None) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S") if text else ""


def _as_json(value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Between the strings there are only printable characters and the ends of lines.
    print("".join(each if each.isprintable() or each == "\n" else _escaped(each) for each in text))  # noqa: T201


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def _table(headings: Iterable[str], rows: Sequence[tuple[str, ...]]) -> None:
    shown = [tuple(printable(cell) for cell in row) for row in rows]
    if not sys.stdout.isatty():
        for row in shown:
            print("\t".join(row))  # noqa: T201
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in shown:
        table.add_row(*(f"[{_COLOURS[cell]}]{cell}" if cell in _COLOURS else escape(cell) for cell in row))
    Console().print(table)
