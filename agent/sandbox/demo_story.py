"""What happens in the demo, in its order: one person, one Activity, one run."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.sandbox.demo_agent import JOB_STAGES, TERMINAL, AgentClient, stage_seconds
from agent.sandbox.demo_errors import DemoFailed
from agent.sandbox.demo_ovation import Activity, Output, Person, SandboxControl
from agent.sandbox.demo_results import explain_failure, fetch, show_outputs, show_results
from agent.sandbox.demo_screen import Screen, size
from agent.sandbox.demo_services import AgentAddress, SandboxAddress, Services

SANDBOX, IMAGE, AGENT, UPLOAD, WEBHOOK, DELIVERED = (
    "sandbox",
    "sample image",
    "agent",
    "upload",
    "webhook",
    "outputs",
)
STAGES = (SANDBOX, IMAGE, AGENT, UPLOAD, WEBHOOK, *JOB_STAGES, DELIVERED)
SAMPLE = Path(__file__).with_name("sample")
INPUTS = ("penguins.csv", "parameters.json")
IMAGE_NAME = "penguins.sif"
PERSON = "scientist@example.org"
_EXPLAINED = {
    "staging": "inputs and image are fetched and verified",
    "launching": "Apptainer, as an unprivileged user, without network",
    "running": "the image's own command, with /inputs and /outputs",
    "collecting": "logs first, then /outputs, over S3 onto the Activity",
    "reporting": "the run is closed, its work directory removed",
}
_JOB_SECONDS = 300
_LOG_SECONDS = 5
_CANCEL_SECONDS = 20.0
_POLL_SECONDS = 0.1


class Story:
    """One telling of it."""

    def __init__(self, services: Services, screen: Screen, scratch: Path, target: Path) -> None:
        self._services = services
        self._screen = screen
        self._scratch = scratch
        self._started = time.monotonic()
        self._target = target
        self._activity: Activity | None = None
        self._job: dict[str, Any] = {}
        self._totals: dict[str, str] = {}

    async def tell(self) -> int:
        """Do the main job; return 0 when it succeeded and its outputs were verified, else 1.

        Raises:
            DemoFailed: something on the way did not work.
        """
        self._screen.say(
            "A person uploads data and an image to an Activity; the agent brings the results to it.\n", "bold"
        )
        image = asyncio.create_task(self._build_image())
        try:
            sandbox = await self._start_sandbox()
            control = SandboxControl(sandbox.api_url, sandbox.control_token)
            agent = await self._start_agent()
            await control.ask_for_webhooks(f"{agent.url}/webhooks/ovation", agent.webhook_key)
            async with (
                Person(sandbox.api_url, sandbox.s3_url, await control.token_of(PERSON)) as person,
                AgentClient(agent.url, agent.admin_token) as client,
            ):
                await self._link(person, await self._upload(person, await image))
                return await self._see_to_the_end(person, client)
        except DemoFailed:
            # When a service has ended, that is the reason, and its log says more than the call that failed.
            await self._services.require_all_for_a_moment()
            raise
        finally:
            image.cancel()
            await asyncio.gather(image, return_exceptions=True)

    async def _see_to_the_end(self, person: Person, client: AgentClient) -> int:
        """Follow the job, then look at the Activity: what counts is what a person finds there."""
        job = await self._follow(client)
        outputs = await person.outputs(self._linked)
        paths = await self._deliver(person, outputs) if job["state"] == "succeeded" else {}
        self._screen.close()
        show_outputs(self._screen, outputs)
        if not paths:
            explain_failure(self._screen, job, await client.log(str(job["id"]), "stderr"))
            return 1
        show_results(self._screen, job, paths)
        self._screen.say(f"Time:      {time.monotonic() - self._started:.1f} s")
        return 0

    async def end(self, hurry: asyncio.Event) -> None:
        """Cancel the job if one is live and wait until its container is gone: the agent would leave it running."""
        agent, activity = self._services.agent, self._activity
        if (
            agent is None
            or activity is None
            or not self._services.agent_is_running
            or self._job.get("state") in TERMINAL
        ):
            return
        async with AgentClient(agent.url, agent.admin_token) as client:
            with suppress(DemoFailed):
                await client.cancel(activity.id, _CANCEL_SECONDS, hurry)

    async def _start_sandbox(self) -> SandboxAddress:
        self._screen.begin(SANDBOX, "a stand-in for Ovation: API, object store, webhooks")
        address = await self._services.start_sandbox()
        self._screen.done(SANDBOX, f"a stand-in for Ovation at {address.api_url}")
        return address

    async def _build_image(self) -> Path:
        self._screen.begin(IMAGE)
        image, built = await self._services.build_image(lambda step: self._screen.detail(IMAGE, step))
        origin = "built from this machine's Python" if built else "built before, from this machine's Python"
        self._screen.done(IMAGE, f"{size(image.stat().st_size)}, {origin}")
        return image

    async def _start_agent(self) -> AgentAddress:
        self._screen.begin(AGENT, "embedded PostgreSQL, migrations, checks")
        address = await self._services.start_agent()
        self._screen.done(AGENT, f"`serve` at {address.url}, with an embedded PostgreSQL")
        return address

    async def _upload(self, person: Person, image: Path) -> dict[str, str]:
        """Make the Project and the Activity, and upload all files; return each one's Revision by name."""
        files = {name: SAMPLE / name for name in INPUTS} | {IMAGE_NAME: image}
        total = sum(path.stat().st_size for path in files.values())
        self._screen.begin(UPLOAD)
        self._activity = await person.create_activity("Palmer penguins", "Body mass against flipper length")
        revisions = {}
        for name, path in files.items():
            self._screen.detail(UPLOAD, f"{name}, {size(path.stat().st_size)}")
            revisions[name] = await person.upload(self._activity, path, name)
        self._screen.done(UPLOAD, f"{', '.join(files)}: {size(total)}, with temporary credentials over S3")
        return revisions

    async def _link(self, person: Person, revisions: dict[str, str]) -> None:
        """Make the uploaded files the Activity's inputs and its image: from now on the agent is to act by itself."""
        self._screen.begin(WEBHOOK, "the Activity gets its inputs and its image; the sandbox tells the agent")
        for name in INPUTS:
            await person.link(self._linked, "inputs", "activities", revisions[name])
        await person.link(self._linked, "actions", "procedures", revisions[IMAGE_NAME])

    async def _follow(self, client: AgentClient) -> dict[str, Any]:
        """Show the job's stages and its container's output as they come; return the job when it has ended."""
        deadline = time.monotonic() + _JOB_SECONDS
        output: asyncio.Task[None] | None = None
        try:
            while self._job.get("state") not in TERMINAL:
                self._services.require_all()
                if time.monotonic() > deadline:
                    raise DemoFailed(f"the job was not done within {_JOB_SECONDS} s")
                found = await client.jobs(self._linked.id)
                if found:
                    self._job = found[0]
                    self._show(self._job, await client.events(str(self._job["id"])))
                    if output is None and self._job["state"] == "running":
                        output = asyncio.create_task(self._show_output(client, str(self._job["id"])))
                elif reasons := await client.reasons(self._linked.id):
                    self._screen.detail(WEBHOOK, "the agent waits: " + "; ".join(reasons))
                await asyncio.sleep(_POLL_SECONDS)
            if output is not None:
                await asyncio.wait({output}, timeout=_LOG_SECONDS)
        finally:
            if output is not None:
                output.cancel()
        return self._job

    async def _show_output(self, client: AgentClient, job_id: str) -> None:
        async for line in client.follow(job_id):
            self._screen.container(line)

    def _show(self, job: dict[str, Any], events: list[dict[str, Any]]) -> None:
        image = f"job {job['id'][:8]} of {job['image_name']}"
        took = stage_seconds(job, events)
        self._screen.done(WEBHOOK, f"{image}, started by {job['trigger']}")
        for stage in JOB_STAGES:
            if stage in took:
                self._screen.begin(stage, _EXPLAINED[stage])
                result = f"exit code {job['exit_code']}" if stage == "running" else self._totals.get(stage, "")
                self._screen.done(stage, result, took[stage])
            elif stage == job["state"]:
                self._screen.begin(stage, _EXPLAINED[stage])
                done, self._totals[stage] = _progress(job)
                if detail := job.get("waiting_for") or done:
                    self._screen.detail(stage, detail)

    async def _deliver(self, person: Person, outputs: list[Output]) -> dict[str, Path]:
        self._screen.begin(DELIVERED)
        paths = await fetch(person, outputs, self._scratch, self._target)
        total = sum(output.bytes or 0 for output in outputs)
        self._screen.done(DELIVERED, f"{len(outputs)} files, {size(total)}: fetched from the sandbox and verified")
        return paths

    def explain_what_is_kept(self) -> None:
        """Say where everything is that stays up."""
        environment = self._services.write_environment()
        rows = {
            "sandbox API": self._services.sandbox.api_url if self._services.sandbox else "not started",
            "object store": self._services.sandbox.s3_url if self._services.sandbox else "not started",
            "agent": self._services.agent.url if self._services.agent else "not started",
            "Activity": self._activity.id if self._activity else "not made",
            "job": str(self._job.get("id", "none")),
            "files, logs": str(self._services.home),
            "tokens": f"{environment} (readable by you alone)",
        }
        self._screen.say("\nEverything stays up until Ctrl-C, which stops it and leaves the files.", "bold")
        for name, value in rows.items():
            self._screen.say(f"  {name:<13} {value}")
        self._screen.say("In another terminal:")
        self._screen.say(f"  . {environment} && {_program()} jobs")

    def say_how_to_see_more(self) -> None:
        """Say what a person may want to do next."""
        self._screen.say("\nTo see more:", "bold")
        for place, what in (
            (f"{_program()} demo --keep", "leaves everything up and prints its addresses"),
            ("docs/writing-images.md", "images of your own, tried with `ovation-agent try`"),
            ("README.md", "the settings for a real Ovation"),
        ):
            self._screen.say(f"  {place:<26} {what}")

    @property
    def _linked(self) -> Activity:
        if self._activity is None:
            raise RuntimeError("there is no Activity yet")
        return self._activity


def _program() -> str:
    """Return how a person calls the agent in this environment."""
    return "ovation-agent" if shutil.which("ovation-agent") else f"{sys.executable} -m agent"


def _progress(job: dict[str, Any]) -> tuple[str, str]:
    """Return how far the job's stage is, and what it will have been in the end; empty where the agent has not said."""
    progress = job.get("progress") or {}
    files, total = progress.get("files_total"), size(progress.get("bytes_total"))
    if not files:
        return "", ""
    done, done_bytes = progress.get("files_done", 0), size(progress.get("bytes_done", 0))
    return f"{done} of {files} files, {done_bytes} of {total}", f"{files} files, {total}"
