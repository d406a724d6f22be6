"""The commands `cache …`: what is in the cache of Revisions, less of it, and whether it is what it was.

They work on the directory itself, with or without a running agent.
"""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.commands import load_settings

if TYPE_CHECKING:
    from agent.adapters.shelf import Shelf

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?")


class Size(click.ParamType[int]):
    """A number of bytes, as people write it: 500000, 20GB, 1.5 TiB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return it in bytes."""
        found = _SIZE.fullmatch(str(value).strip().upper())
        if found is None:
            self.fail(f"{value!r} is not a size such as 500000, 20GB or 1.5TiB", param, ctx)
        return int(float(found[1]) * _UNITS[found[2]])


@click.group()
def cache() -> None:
    """See and clear the cache of Revisions that were fetched."""


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def list_(config: Path | None, *, as_json: bool) -> None:
    """List what is there, what was used last first."""
    from rich.filesize import decimal

    from agent import console

    shelf, most = _shelf(config)
    entries = list(reversed(shelf.entries()))
    if as_json:
        shown = [
            {
                "revision_id": entry.revision_id,
                "name": entry.name,
                "size": entry.size,
                "sha256": entry.sha256,
                "used_at": datetime.fromtimestamp(entry.used_at, UTC).isoformat(),
                "in_use": entry.in_use,
            }
            for entry in entries
        ]
        console.show_json({"directory": str(shelf.directory), "max_bytes": most, "entries": shown})
        return
    rows = [
        (
            entry.revision_id,
            entry.name,
            decimal(entry.size),
            f"{datetime.fromtimestamp(entry.used_at).astimezone():%Y-%m-%d %H:%M:%S}",
            "yes" if entry.in_use else "no",
        )
        for entry in entries
    ]
    console.show_table(("Revision", "name", "size", "last used", "in use"), rows)
    total = sum({entry.sha256: entry.size for entry in entries}.values())
    click.echo(f"{len(entries)} Revisions, {decimal(total)} of {decimal(most)} in {shelf.directory}", err=True)


@cache.command()
@click.option("--to", "most", type=Size(), help="Down to this size, such as 20GB.")
@click.option("--all", "everything", is_flag=True, help="Everything that no job uses.")
@click.pass_obj
def prune(config: Path | None, *, most: int | None, everything: bool) -> None:
    """Remove what was used longest ago, but nothing that a job uses: down to AGENT_CACHE_MAX_BYTES, if not told."""
    from rich.filesize import decimal

    if everything and most is not None:
        raise click.UsageError("--to and --all contradict each other")
    shelf, limit = _shelf(config)
    wanted = 0 if everything else limit if most is None else most
    before = len(shelf.entries())
    freed = shelf.evict(lambda left: left <= wanted)
    entries = shelf.entries()
    left = sum({entry.sha256: entry.size for entry in entries}.values())
    click.echo(f"{before - len(entries)} Revisions removed, {decimal(freed)} freed; {decimal(left)} are left")
    if left > wanted:
        click.echo("what is left is used by jobs: their directories in AGENT_DATA_DIR share its bytes", err=True)


@cache.command()
@click.pass_context
def verify(context: click.Context) -> None:
    """Read all of it, and remove what is not as it was; exit with 1 if anything was not."""
    from rich.progress import track

    from agent.logs import printable

    shelf, _ = _shelf(context.obj)
    entries = shelf.entries()
    damaged = [
        entry
        for entry in track(entries, "verifying", transient=True, disable=not sys.stdout.isatty())
        if not shelf.is_whole(entry)
    ]
    for entry in damaged:
        click.echo(printable(f"damaged, and removed: {entry.revision_id} {entry.name}"))
    click.echo(f"{len(entries) - len(damaged)} of {len(entries)} Revisions are whole")
    context.exit(1 if damaged else 0)


def _shelf(config: Path | None) -> tuple[Shelf, int]:
    """Return the cache and its limit in bytes."""
    from agent.adapters.shelf import Shelf

    settings = load_settings(config).agent
    return Shelf(settings.cache_directory), settings.cache_max_bytes
