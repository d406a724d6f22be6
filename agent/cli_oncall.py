"""The commands of whoever is on call: what there is, what it writes, and how to empty a machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.commands import ask, load_settings, run

if TYPE_CHECKING:
    from agent.client import Client

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_JOBS_EXAMPLES = """
\b
Examples:
  ovation-agent jobs --stuck                 what does not come on
  ovation-agent jobs --failed --since 1h     what has failed in the last hour
  ovation-agent jobs --watch                 what is under way, as it moves
"""
_LOGS_EXAMPLES = """
\b
Examples:
  ovation-agent logs JOB              what the container wrote to its standard output
  ovation-agent logs -f --all JOB     the job's moves and both of the container's outputs, until it ends
  ovation-agent logs --tail 100 -f    the agent's own log, of all jobs
  ovation-agent logs --since 10m --json | jq 'select(.level == "error")'
"""


class _Duration(click.ParamType):  # type: ignore[type-arg] # at run time it takes none
    """A time such as 90s, 10m, 1h or 7d, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the seconds."""
        found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", str(value))
        if found is None:
            self.fail(f"{value!r} is no time such as 90s, 10m, 1h or 7d", param, ctx)
        return int(found[1]) * _UNITS[found[2]]


@click.command(epilog=_JOBS_EXAMPLES)
@click.option("--activity", help="Only this Activity's.")
@click.option("--project", help="Only this Project's.")
@click.option("--state", help="Only those in this state.")
@click.option("--failed", is_flag=True, help="Only those whose run failed.")
@click.option(
    "--stuck", is_flag=True, help="Only those that have not come on for ten minutes, or fail again and again."
)
@click.option(
    "--since", type=_Duration(), help="Only those that are under way, or ended no longer ago: 90s, 10m, 1h, 7d."
)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1000))
@click.option("--watch", is_flag=True, help="Show them as they move, until Ctrl-C; in a pipe, a line for each move.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def jobs(
    config: Path | None,
    activity: str | None,
    project: str | None,
    state: str | None,
    since: int | None,
    limit: int,
    *,
    failed: bool,
    stuck: bool,
    watch: bool,
    as_json: bool,
) -> None:
    """List jobs, newest first."""
    from agent import console, following

    if watch and as_json:
        raise click.UsageError("--watch shows; --json is for programs, which ask again themselves.")
    query = {
        "limit": str(limit),
        "activity_id": activity,
        "project_id": project,
        "state": state,
        "verdict": "failed" if failed else None,
        "stuck": "1" if stuck else None,
        "since": None if since is None else str(since),
    }

    async def look(client: Client) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await client.get("api", "jobs", **query))["jobs"]
        return found

    if watch:
        run(following.watch_jobs(load_settings(config), look))
    else:
        console.show_jobs(ask(config, look), as_json=as_json)


@click.command(epilog=_LOGS_EXAMPLES)
@click.argument("job", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on: until the container ends, or, without a JOB, until Ctrl-C.")
@click.option("--stderr", "which", flag_value="stderr", help="Standard error instead of standard output.")
@click.option(
    "--all", "which", flag_value="all", help="The job's moves and both outputs, each line with where it is from."
)
@click.option("--tail", type=click.IntRange(0, 1_000_000), help="Begin with so many last lines.")
@click.option("--since", type=_Duration(), help="Without a JOB: only lines no older than 90s, 10m, 1h, 7d.")
@click.option("--json", "as_json", is_flag=True, help="Without a JOB: JSON lines, as the agent writes them.")
@click.pass_obj
def logs(
    config: Path | None,
    job: str | None,
    which: str | None,
    tail: int | None,
    since: int | None,
    *,
    follow: bool,
    as_json: bool,
) -> None:
    """Print what a JOB's container wrote; without one, the agent's own log across all jobs.

    A connection that breaks while following is made anew, and no line is lost or repeated.
    """
    from agent import following

    settings = load_settings(config)
    if job is None:
        if which:
            raise click.UsageError("--stderr and --all are for a JOB's log.")
        run(following.show_agent_log(settings, follow=follow, tail=tail, since_seconds=since, as_json=as_json))
        return
    if since is not None or as_json:
        raise click.UsageError("--since and --json are for the agent's own log: a container's lines carry no times.")
    if which == "all":
        run(following.show_all(settings, job, follow=follow, tail=tail))
    else:
        run(following.show_log(settings, job, which or "stdout", follow=follow, tail=tail))


@click.command(short_help="Let nothing more in, and wait until the machine is empty.")
@click.option("--off", is_flag=True, help="Let queued jobs in again.")
@click.option("--wait/--no-wait", default=True, help="Wait until nothing is under way here.")
@click.pass_obj
def drain(config: Path | None, *, off: bool, wait: bool) -> None:
    """Let no queued job in any more, and wait until those that were let in here have ended.

    For a machine that is to be taken away. For an upgrade it is not needed: containers go on. It holds until `--off`,
    or until the agent is started anew; Ctrl-C only ends the waiting.
    """
    from agent import following

    if off:
        ask(config, lambda client: client.post("api", "admission", "start"))
        click.echo("queued jobs are let in again")
        return
    run(following.drain(load_settings(config), wait=wait))
