"""The commands `provenance` and `rerun`: where outputs came from, and doing it again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.commands import ask

if TYPE_CHECKING:
    from agent.client import Client

_POLL_SECONDS = 0.5


@click.command(short_help="Tell where a job's or an Activity's outputs came from.")
@click.argument("job", metavar="JOB|ACTIVITY")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--graph",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw it into this file; its name ends in .svg or .png.",
)
@click.pass_obj
def provenance(config: Path | None, job: str, *, as_json: bool, graph: Path | None) -> None:
    """Tell the chain of runs that led to a job's outputs: inputs, run, image, person. ACTIVITY: its last."""
    from agent import console_provenance as console

    if graph is not None and graph.suffix.lower() not in {".svg", ".png"}:
        raise click.UsageError("--graph: the file's name must end in .svg or .png")

    async def work(client: Client) -> Any:
        return await client.get("api", "jobs", await _job_id(client, job), "provenance")

    chain = ask(config, work)
    if graph is not None:
        console.draw(chain, graph)
        click.echo(str(graph))
    elif as_json:
        console.show_json(chain)
    else:
        console.show_chain(chain)


@click.command(short_help="Run a job's Activity again.")
@click.argument("job")
@click.option("--exact", is_flag=True, help="The very Revisions and image of that run; wait for it, and compare.")
@click.option("--json", "as_json", is_flag=True, help="With --exact: the comparison as JSON.")
@click.pass_obj
def rerun(config: Path | None, job: str, *, exact: bool, as_json: bool) -> None:
    """Run a job's Activity again, as it stands in Ovation now.

    With --exact the very Revisions and image of that run are run again, and each output is compared with the earlier
    one. Exit code 0: all are identical; 1: not all. Ctrl-C leaves the job running; the same
    command finds it again.
    """
    from agent import console_provenance as console

    if not exact:
        click.echo(ask(config, lambda client: client.post("api", "jobs", job, "rerun"))["id"])
        return

    async def work(client: Client) -> Any:
        import asyncio

        from agent.console import job_progress

        again = await client.post("api", "jobs", job, "rerun", query={"exact": "1"})
        if as_json:
            while again["live"]:
                await asyncio.sleep(_POLL_SECONDS)
                again = await client.get("api", "jobs", again["id"])
        else:
            with job_progress(again["id"]) as show:
                while again["live"]:
                    show(again)
                    await asyncio.sleep(_POLL_SECONDS)
                    again = await client.get("api", "jobs", again["id"])
                show(again)
        return again, await client.get("api", "jobs", again["id"], "comparison")

    again, comparison = ask(config, work)
    if as_json:
        console.show_json(comparison)
    else:
        console.show_comparison(again, comparison)
    sys.exit(0 if comparison["identical"] and again["state"] == "succeeded" else 1)


async def _job_id(client: Client, job_or_activity: str) -> str:
    """Return the job of this id, or the last run of this Activity."""
    from agent.client import AgentRefused

    try:
        return str((await client.get("api", "jobs", job_or_activity))["id"])
    except AgentRefused as error:
        if error.status != 404:  # noqa: PLR2004 HTTP's own number
            raise
    jobs = (await client.get("api", "jobs", activity_id=job_or_activity, limit="1"))["jobs"]
    if not jobs:
        raise AgentRefused(f"{job_or_activity} is neither a job nor an Activity that was run here", status=404)
    return str(jobs[0]["id"])
