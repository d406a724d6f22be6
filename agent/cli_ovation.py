"""The commands that deal with Ovation: a person asks for a run, an operator sees to the webhooks."""

from __future__ import annotations

from pathlib import Path

import click

from agent.commands import load_settings, run

_HPC_RUN_EXAMPLES = """
\b
Examples:
  ovation-agent hpc_run --activity 4b6de6e8-502b-40ed-95eb-4e4f3fc0ab40 --image penguins.sif
  ovation-agent hpc_run --activity ID --image NAME --url http://compute.example.org:8080 --organization 17
  ovation-agent hpc_run --activity ID --image NAME --no-wait
  ovation-agent hpc_run --job 8d1b2a5e-7d5c-4f0a-9c3e-0e6a4a4ce0f1

Your token is OVATION_TOKEN of the environment, else the one in ~/.ovation/credentials.json
({"api.ovation.io": {"EMAIL": "TOKEN"}}) for the host of OVATION_API_URL; with --user always that of the file. Never put
it on a command line, where others of this machine can read it.

Exit codes: 0 the job succeeded (with --no-wait: it is there); 1 it failed or was cancelled, or the agent will not or is
away; 2 the command line or your token's file is wrong; 130 interrupted: the job goes on.
"""
_WEBHOOKS_EXAMPLES = """
\b
Examples:
  ovation-agent webhooks add --template 12 --target-url https://agent.example.org --event activity.updated
  ovation-agent webhooks list --template 12
  ovation-agent webhooks remove --template 12 5a0e2c1b-4a3e-4d0f-8d8e-0a3c9a1f1c11
  ovation-agent webhooks documents --target-url https://agent.example.org --organization 17 > webhooks.json
  ovation-agent webhooks test --url https://agent.example.org
"""


@click.command("hpc_run", short_help="Ask an agent for a run, as yourself; follow it.", epilog=_HPC_RUN_EXAMPLES)
@click.option("--activity", help="The Activity's id.")
@click.option("--image", help="The name of the related file to run.")
@click.option("--job", help="Follow this job, instead of asking for one.")
@click.option("--organization", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1), help="The Activity's.")
@click.option("--url", help="The agent, as http://HOST:PORT. Default: the one of the settings, on this machine.")
@click.option("--user", help="Take the token of this email address from ~/.ovation/credentials.json.")
@click.option("--wait/--no-wait", default=True, help="Follow the job to its end, or print its id and leave.")
@click.option("--json", "as_json", is_flag=True, help="As JSON: the job when it has ended.")
@click.pass_obj
def hpc_run(
    config: Path | None,
    activity: str | None,
    image: str | None,
    job: str | None,
    organization: int,
    url: str | None,
    user: str | None,
    *,
    wait: bool,
    as_json: bool,
) -> None:
    """Ask a running agent for a run, as yourself, and follow it to its end. Also spelled hpc-run.

    Asking again while the job is live returns that job.
    """
    import os

    from agent import asking, credentials, logs
    from agent.client import Client, agent_address, front_address

    if job is None and not (activity and image):
        raise click.UsageError("--activity and --image are needed, or --job.")
    if job is not None and (activity or image or not wait):
        raise click.UsageError("--job follows a job that is there: leave --activity, --image and --no-wait out.")
    settings = load_settings(config)
    mine = credentials.person_token(settings.ovation.api_url, user, os.environ, Path.home())
    logs.hide([mine.token])
    if mine.warning:
        click.echo(f"ovation-agent: {mine.warning}", err=True)
    address = front_address(url) if url else agent_address(settings)
    wanted = job or asking.Wish(str(activity), str(image), organization)

    async def work() -> None:
        async with Client(address, mine.token, f"get a new token from Ovation (this one: {mine.found})") as client:
            await asking.run(client, wanted, wait=wait, as_json=as_json)

    run(work())


@click.group("webhooks", short_help="Manage Ovation's webhooks; test their way here.", epilog=_WEBHOOKS_EXAMPLES)
def webhooks() -> None:
    """Have Ovation tell the agent of changes, and see whether what it tells arrives.

    Ovation has webhooks of two generations: subscriptions of a lab's project templates (list, add, remove), and
    documents of the research service (documents).
    """


@webhooks.command("list", short_help="List a project template's subscriptions.")
@click.option("--template", required=True, help="The project template's id.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def webhooks_list(config: Path | None, template: str, *, as_json: bool) -> None:
    """List a project template's subscriptions; whose user name they carry is said, and neither it nor the password."""
    from agent import subscriptions

    run(subscriptions.show_all(load_settings(config), template, as_json=as_json))


@webhooks.command("add", short_help="Subscribe to a project template's events.", epilog=_WEBHOOKS_EXAMPLES)
@click.option("--template", required=True, help="The project template's id.")
@click.option("--target-url", required=True, help="Where Ovation reaches the agent: https://HOST is enough.")
@click.option("--event", "events", required=True, multiple=True, help="What is to be told; may be given several times.")
@click.option("--organization", type=click.IntRange(0, 2**31 - 1), help="Ends the address with this organization.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def webhooks_add(
    config: Path | None,
    template: str,
    target_url: str,
    events: tuple[str, ...],
    organization: int | None,
    *,
    as_json: bool,
) -> None:
    """Subscribe to a project template's events, with the user name and password of the agent's settings.

    What is there already is not doubled: it gets that user name and password.
    """
    from agent import probe, subscriptions

    target = probe.target(target_url, organization)
    run(subscriptions.add(load_settings(config), template, target, events, as_json=as_json))


@webhooks.command("remove", short_help="Remove a subscription.")
@click.option("--template", required=True, help="The project template's id.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.argument("subscription")
@click.pass_obj
def webhooks_remove(config: Path | None, template: str, subscription: str, *, as_json: bool) -> None:
    """Remove the SUBSCRIPTION of that id, and say what it was. Nothing is asked."""
    from agent import subscriptions

    run(subscriptions.remove(load_settings(config), template, subscription, as_json=as_json))


@webhooks.command("documents", short_help="Print the research service's documents.")
@click.option("--target-url", required=True, help="Where Ovation reaches the agent: https://HOST is enough.")
@click.option(
    "--organization",
    type=click.IntRange(0, 2**31 - 1),
    help="The organization that they are for. Default: the agent asks each that it watches.",
)
@click.pass_obj
def webhooks_documents(config: Path | None, target_url: str, organization: int | None) -> None:
    """Print the webhook documents to install in the research service, as JSON; what to know is on standard error."""
    from agent import console, probe, subscriptions

    console.show_json(subscriptions.documents(probe.target(target_url, organization)))
    for line in subscriptions.explanation(load_settings(config).agent):
        click.echo(line, err=True)


@webhooks.command("test", short_help="Send a delivery through the front door.", epilog=_WEBHOOKS_EXAMPLES)
@click.option("--activity", help="About this Activity; a ready one is run. Default: an id made up.")
@click.option("--organization", type=click.IntRange(0, 2**31 - 1), help="The Activity's. Default: the agent looks.")
@click.option("--url", help="The front door, as Ovation sees it. Default: the agent of the settings, on this machine.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def webhooks_test(
    config: Path | None, activity: str | None, organization: int | None, url: str | None, *, as_json: bool
) -> None:
    """Send a delivery through the agent's front door, as Ovation would, and show what becomes of it."""
    from agent import probe
    from agent.client import agent_address

    settings = load_settings(config)
    address = probe.target(url or agent_address(settings))
    run(probe.probe(settings, address, activity, organization, as_json=as_json))
