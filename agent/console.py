"""What the commands show: tables on a terminal, plain lines in a pipe, JSON when asked for."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from agent.logs import printable

if TYPE_CHECKING:
    from rich.table import Table

_JOB_HEADINGS = ("job", "state", "activity", "run", "image", "created", "cause")
_PROGRESS_SECONDS = 5.0
_COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}


def show_jobs(jobs: list[dict[str, Any]], *, as_json: bool) -> None:
    """List jobs, one a line."""
    if as_json:
        show_json(jobs)
        return
    show_table(_JOB_HEADINGS, [_job_row(job, cause(job)) for job in jobs])


def job_table(jobs: list[dict[str, Any]]) -> Table:
    """Return jobs as a table for a terminal, with how far each is."""
    rows = [tuple(printable(cell) for cell in _job_row(job, cause(job) or _how_far(job))) for job in jobs]
    return _table((*_JOB_HEADINGS[:-1], "how far, or why"), rows)


def _job_row(job: dict[str, Any], last: str) -> tuple[str, ...]:
    return (
        job["id"],
        job["state"],
        job["activity_name"],
        str(job["run"]),
        job["image_name"],
        _moment(job["created_at"]),
        last,
    )


def show_job(job: dict[str, Any], events: list[dict[str, Any]], *, as_json: bool) -> None:
    """Tell one job's story."""
    if as_json:
        show_json({**job, "events": events})
        return
    facts = ("id", "activity_id", "activity_name", "image_name", "run", "trigger", "requested_by", "state", "exit_code")
    rows = [(name, str(job[name])) for name in facts if job[name] is not None]
    if job["agent"]:
        rows.append(("agent", f"{job['agent']['host']}, seen {_moment(job['agent']['seen_at'])}"))
    if "due_at" in job and job["live"]:  # an older agent does not tell
        rows.append(("now", _now(job)))
    rows += [(name, _amounts(job["resources"][name])) for name in ("granted", "used") if job["resources"].get(name)]
    rows += [("note", str(note)) for note in job["resources"].get("notes", [])]
    if job["launch"] > 1:
        rows.append(("launch", f"{job['launch']} (the machine lost the one before)"))
    show_table(("", ""), rows)
    if said := cause(job):
        print(f"\n{printable(said)}\n")  # noqa: T201 this is what the command is for
    show_table(
        ("at", "state", "attempt", "note"),
        [(_moment(each["at"]), each["state"], str(each["attempt"]), each["note"] or "") for each in events],
    )


def _now(job: dict[str, Any]) -> str:
    """Say who works at a job that has not ended, how far that is, or when it is taken up."""
    far = _how_far(job)
    if job["held_until"]:
        return f"worked at{': ' + far if far else ''} (lease until {_moment(job['held_until'])})"
    return f"due {_moment(job['due_at'])}{': ' + far if far else ''}"


def _amounts(resources: dict[str, float]) -> str:
    """Say what a run was given or used."""
    from rich.filesize import decimal

    shown = {"cpus": "{:g} CPUs", "gpus": "{:g} GPUs", "time_seconds": "at most {:g} s", "wall_seconds": "{:.1f} s"}
    shown |= {"user_seconds": "{:.1f} s of processor", "system_seconds": "{:.1f} s of system"}
    parts = [shown[name].format(value) for name, value in resources.items() if name in shown]
    parts += [f"{decimal(int(value))} of memory" for name, value in resources.items() if "memory" in name]
    return ", ".join(parts)


def show_activity(activity: dict[str, Any], *, as_json: bool) -> None:
    """Say what led to an Activity's runs, or why there is none."""
    if as_json:
        show_json(activity)
        return
    show_table(("received", "from"), [(_moment(each["at"]), each["source"]) for each in activity["deliveries"]])
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


@contextlib.contextmanager
def job_progress(job_id: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give what is to be called with a job again and again, and shows how it gets on.

    A line for each stage; how far a stage is stands below on a terminal, and in a pipe on a line now and then.
    """
    if not sys.stdout.isatty():
        print(f"job\t{printable(job_id)}", flush=True)  # noqa: T201
        yield _lines()
        return
    from rich.console import Console
    from rich.markup import escape

    console, shown = Console(highlight=False), ""
    console.print(escape(f"job       {printable(job_id)}"))
    with console.status("") as status:

        def show(job: dict[str, Any]) -> None:
            nonlocal shown
            stage = printable(str(job["state"]))
            if stage != shown:
                shown = stage
                mark = f"[{_COLOURS[stage]}]{stage}" if stage in _COLOURS else escape(stage)
                console.print(f"{datetime.now().astimezone():%H:%M:%S}  {mark}")
            status.update(escape(printable(f"{stage}  {_how_far(job)}")))

        yield show


def _lines() -> Callable[[dict[str, Any]], None]:
    last: tuple[str, str | None, str] = ("", None, "")
    printed_at = 0.0

    def show(job: dict[str, Any]) -> None:
        nonlocal last, printed_at
        now = (str(job["state"]), job["waiting_for"], _how_far(job))
        if now[:2] == last[:2] and (now == last or time.monotonic() - printed_at < _PROGRESS_SECONDS):
            return
        last, printed_at = now, time.monotonic()
        moment = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"
        print("\t".join(printable(cell) for cell in (moment, now[0], now[2])), flush=True)  # noqa: T201

    return show


def _how_far(job: dict[str, Any]) -> str:
    """Say what a job waits for, or how many files and bytes of its stage are done."""
    from rich.filesize import decimal

    if job["waiting_for"]:
        return str(job["waiting_for"])
    counts = {name: int(count) for name, count in job["progress"].items() if isinstance(count, int)}
    if not counts.get("files_total"):
        return ""
    told = f"{counts.get('files_done', 0)} of {counts['files_total']} files"
    if counts.get("bytes_total"):
        told += f", {decimal(counts.get('bytes_done', 0))} of {decimal(counts['bytes_total'])}"
    if counts.get("bytes_per_second"):
        told += f", {decimal(counts['bytes_per_second'])}/s"
    if counts.get("seconds_left"):
        told += f", {timedelta(seconds=counts['seconds_left'])} left"
    return told


def cause(job: dict[str, Any]) -> str:
    """Say why a job failed, or what it waits for; nothing when there is nothing to say."""
    if job["fault"]:
        return f"{job['fault']['class']}: {job['fault']['message']}"
    return job["waiting_for"] or ""


def _moment(text: str | None) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S") if text else ""


def show_json(value: object) -> None:
    """Print a value as JSON that cannot harm a terminal."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Between the strings there are only printable characters and the ends of lines.
    print("".join(each if each.isprintable() or each == "\n" else _escaped(each) for each in text))  # noqa: T201


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def show_table(headings: Iterable[str], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table on a terminal, and tab-separated lines without headings into a pipe."""
    shown = [tuple(printable(cell) for cell in row) for row in rows]
    if not sys.stdout.isatty():
        for row in shown:
            print("\t".join(row))  # noqa: T201
        return
    from rich.console import Console

    Console().print(_table(headings, shown))


def _table(headings: Iterable[str], shown: Sequence[tuple[str, ...]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in shown:
        table.add_row(*(f"[{_COLOURS[cell]}]{cell}" if cell in _COLOURS else escape(cell) for cell in row))
    return table
