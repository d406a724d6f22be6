"""The commands. Each is a few lines; what they need is imported when they run, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import __version__
from agent.cli_cache import cache
from agent.cli_oncall import drain, jobs, logs
from agent.cli_ovation import hpc_run, webhooks
from agent.cli_provenance import provenance, rerun
from agent.commands import Commands, ask, load_settings, run

if TYPE_CHECKING:
    from agent.client import Client

_EXIT_CODES = """
Exit codes: 0 done; 1 it failed, the reason is on standard error; 2 the command line or the configuration is wrong;
130 interrupted. `try` passes the container's own exit code on.
"""


@click.group(cls=Commands, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ovation-agent")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="TOML file with settings. Default: AGENT_CONFIG, or agent.toml in the working directory.",
)
@click.pass_context
def main(ctx: click.Context, config: Path | None) -> None:
    """Run the compute images of Ovation's Activities on their inputs, and bring the outputs back.

    Settings come from the environment and a TOML file; config/agent.example.toml lists them all.
    """
    ctx.obj = config


main.add_command(hpc_run)
main.add_command(webhooks)
main.add_command(cache)
main.add_command(provenance)
main.add_command(rerun)
main.add_command(jobs)
main.add_command(logs)
main.add_command(drain)


@main.command()
@click.pass_obj
def serve(config: Path | None) -> None:
    """Run the service: webhooks, workers, API. SIGTERM stops it; containers go on and are found again."""
    from agent import app

    run(app.serve(load_settings(config, log=True)))


@main.command(hidden=True)
@click.argument("directory", type=click.Path(path_type=Path))
def node(directory: Path) -> None:
    """Do on a compute node what the orders in DIRECTORY say. Batch jobs run this; nobody else has a use for it."""
    from agent.node import work

    sys.exit(run(work(directory)))


@main.command(short_help="Do the main job here, with a stand-in for Ovation.")
@click.option("--keep", is_flag=True, help="Leave everything up afterwards, until Ctrl-C.")
@click.option("--outputs", type=click.Path(path_type=Path, file_okay=False), default="demo-outputs", show_default=True)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the demo keeps its files while it runs. Default: the system's directory for temporary files.",
)
def demo(*, keep: bool, outputs: Path, directory: Path | None) -> None:
    """Do the main job on this machine, with a stand-in for Ovation and nothing configured."""
    from agent.sandbox import demo as walk

    sys.exit(walk.run(keep=keep, directory=directory, outputs=outputs))


@main.command()
@click.pass_obj
def migrate(config: Path | None) -> None:
    """Bring the database's schema up to date. Safe to run at any time, and from many agents at once."""
    from agent.db.connect import connect

    async def work() -> list[str]:
        async with connect(load_settings(config).agent) as database:
            return await database.migrate()

    applied = run(work())
    click.echo("\n".join(f"applied {name}" for name in applied) or "the schema is up to date")


@main.command(short_help="Check the machine and the settings, with remedies.")
@click.pass_obj
def doctor(config: Path | None) -> None:
    """Check the machine and the settings; each trouble comes with its remedy."""
    from agent.doctor import examine
    from agent.logs import printable, redact
    from agent.parties import executor_for

    settings = load_settings(config)

    async def work() -> bool:
        good = True
        async for finding in examine(settings, executor_for(settings)):
            good &= finding.good
            mark = click.style("ok  ", fg="green") if finding.good else click.style("FAIL", fg="red", bold=True)
            click.echo(f"{mark} {finding.check}: {printable(redact(finding.found))}")
            if not finding.good:
                click.echo(f"     → {finding.remedy}")
        return good

    sys.exit(0 if run(work()) else 1)


@main.command(short_help="Tell one job's story, and what it waits for.")
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def show(config: Path | None, job: str, *, as_json: bool) -> None:
    """Tell one job's story: every move with its time, and what it waits for."""
    from agent import console

    async def work(client: Client) -> tuple[Any, Any]:
        return await client.get("api", "jobs", job), await client.get("api", "jobs", job, "events")

    found, events = ask(config, work)
    console.show_job(found, events["events"], as_json=as_json)


@main.command()
@click.argument("activity")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def why(config: Path | None, activity: str, *, as_json: bool) -> None:
    """Say why an Activity was run, or why not."""
    from agent import console

    console.show_activity(ask(config, lambda client: client.get("api", "activities", activity)), as_json=as_json)


@main.command(short_help="End a job; what there is is still delivered.")
@click.argument("job")
@click.pass_obj
def cancel(config: Path | None, job: str) -> None:
    """End a job; its logs and what it wrote so far are still delivered."""
    found = ask(config, lambda client: client.post("api", "jobs", job, "cancel"))
    click.echo(f"asked: the job is {found['state']}")


@main.command("try", short_help="Run IMAGE just as a job would, without Ovation.")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--inputs", required=True, type=click.Path(path_type=Path), help="What the image sees as /inputs.")
@click.option("--related", type=click.Path(path_type=Path), help="What it sees as /related. Default: nothing.")
@click.option(
    "--outputs", type=click.Path(path_type=Path), default="outputs", show_default=True, help="What it sees as /outputs."
)
@click.option("--force", is_flag=True, help="Use --outputs although something is in it.")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), default=86_400.0, show_default=True)
@click.option("--network", type=click.Choice(["none", "host"]), default="none", show_default=True)
def try_(
    image: Path, inputs: Path, related: Path | None, outputs: Path, time_limit: float, network: Any, *, force: bool
) -> None:
    """Run IMAGE just as a job would, without Ovation: its output live, its exit code as this command's own."""
    from agent.trial import try_image

    sys.exit(
        run(
            try_image(
                image=image,
                inputs=inputs,
                related=related,
                outputs=outputs,
                force=force,
                time_limit_seconds=time_limit,
                network=network,
            )
        )
    )
