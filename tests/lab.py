"""A laboratory: a sandbox with a Project, a running agent, and what a person would do and see in Ovation."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from agent.sandbox.server import Sandbox
from tests.agents import WEBHOOK_KEY, AgentProcess, running_agent, until
from tests.images import SCRIPT, images

CRATE = "ro-crate-metadata.json"


class Lab:
    """One Project, watched by one agent."""

    def __init__(self, sandbox: Sandbox, directory: Path) -> None:
        self.sandbox = sandbox
        self.directory = directory
        self.project_id = str(sandbox.admin.create_project("A project")["_id"])
        self.agent: AgentProcess
        self.agents: list[AgentProcess] = []
        self._numbers = itertools.count(1)

    @property
    def data_dir(self) -> Path:
        """The agent's data directory."""
        return self.directory / "agent" / "data"

    def watch(self, agent: AgentProcess) -> None:
        """Have Ovation tell this agent of changed relations, as the research service does."""
        self.agent = agent
        self.agents.append(agent)
        url = f"{agent.address}/webhooks/ovation"
        self.sandbox.admin.create_webhook(url, "Relation", api_key=WEBHOOK_KEY)

    def revision(self, name: str, content: bytes | str = b"some data") -> str:
        """Upload a file and return its Revision's id."""
        return str(self.sandbox.admin.create_revision(self.project_id, name, content)["_id"])

    def image(self, path: Path | None = None, name: str = "") -> str:
        """Upload an image, by default the one that runs `script.sh` of the inputs."""
        path = path or images().scripted
        return self.revision(name or f"image{path.suffix}", path.read_bytes())

    def activity(
        self, script: str | None, *, inputs: list[str] | None = None, related: list[str] | None = None, name: str = ""
    ) -> str:
        """Make an Activity whose image runs `script`, and return its id; the agent hears of it by webhook."""
        listed = [*([self.revision(SCRIPT, script)] if script is not None else []), *(inputs or [])]
        related = [self.image()] if related is None else related
        title = name or f"Activity {next(self._numbers)}"
        return str(self.sandbox.admin.create_activity(self.project_id, title, listed, related)["_id"])

    async def run(self, script: str | None, **what: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Make an Activity, wait for its run's end, and return the job and its outputs."""
        activity_id = self.activity(script, **what)
        job = await self.agent.job(activity_id)
        return job, await self.outputs(activity_id)

    async def get(self, path: str, token: str | None = None) -> Any:
        """Read from Ovation's API."""
        headers = {"Authorization": f"Bearer {token or self.sandbox.service_token}"}
        async with aiohttp.ClientSession(self.sandbox.api_url, headers=headers) as http, http.get(path) as response:
            assert response.status == 200, (path, response.status, await response.text())
            return await response.json()

    async def output_documents(self, activity_id: str) -> list[dict[str, Any]]:
        """Return the Revisions among an Activity's Outputs."""
        activity = (await self.get(f"/api/v1/o/0/entities/{activity_id}"))["entity"]
        documents: list[dict[str, Any]] = (await self.get(activity["relationships"]["outputs"]["related"]))["outputs"]
        return documents

    async def outputs(self, activity_id: str) -> dict[str, bytes]:
        """Return what an Activity's run wrote: the path below its Folder, and the bytes as a person downloads them.

        The crate that tells of the run is `crate`'s.
        """
        found = await self.everything(activity_id)
        found.pop(CRATE, None)
        return found

    async def crate(self, activity_id: str) -> dict[str, Any]:
        """Return the crate of an Activity's run."""
        document: dict[str, Any] = json.loads((await self.everything(activity_id))[CRATE])
        return document

    async def everything(self, activity_id: str) -> dict[str, bytes]:
        """Return an Activity's Outputs, each once."""
        found: dict[str, bytes] = {}
        for document in await self.output_documents(activity_id):
            assert document["attributes"]["upload-status"] == "complete", document
            path = await self._path(document)
            assert path not in found, f"{path} is there twice"
            found[path] = await self._bytes(document)
        return found

    async def _path(self, revision: dict[str, Any]) -> str:
        file_id = revision["attributes"]["file_id"]
        crumbs = (await self.get(f"/api/v1/o/0/breadcrumbs/?id={file_id}"))["breadcrumbs"][0]
        names = [crumb["name"] for crumb in crumbs]  # the File first, the Project last
        return "/".join(reversed(names[:-2]))

    async def _bytes(self, revision: dict[str, Any]) -> bytes:
        headers = {"Authorization": f"Bearer {self.sandbox.service_token}", "Accept": "application/json"}
        async with aiohttp.ClientSession() as http:
            async with http.get(revision["attributes"]["url"], headers=headers) as response:
                address = (await response.json())["url"]
            async with http.get(address) as response:
                assert response.status == 200
                return await response.read()


@asynccontextmanager
async def laboratory(directory: Path, **settings: str) -> AsyncIterator[Lab]:
    """Open a laboratory; at its end nothing of it runs any more."""
    directory.mkdir(parents=True, exist_ok=True)
    async with Sandbox(directory / "sandbox") as sandbox:
        lab = Lab(sandbox, directory)
        async with running_agent(sandbox.environment(), directory / "agent", **settings) as agent:
            lab.watch(agent)

            async def walked() -> bool | None:
                return bool(agent.events("reconciled")) or None

            await until(walked, "the walk at the start", agent.log)  # or it would find what webhooks are to tell
            try:
                yield lab
            finally:  # also the agents that came after the first
                await asyncio.gather(*(each.stop() for each in lab.agents if each.process.returncode is None))
