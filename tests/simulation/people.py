"""What people do in Ovation and ask of agents, and how Ovation tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.db.jobs import Jobs
from agent.domain.activity import NotReady, readiness
from agent.domain.delivery import Delivery, Receipt
from agent.domain.job import TERMINAL
from agent.domain.webhook import Unreadable, parse
from agent.errors import DatabaseError, OvationError
from agent.sandbox.documents import relation_document
from agent.sandbox.records import Entity, Relation
from agent.web.state import Services
from tests.simulation.agents import Agent
from tests.simulation.machine import Program
from tests.simulation.ovation import OWNER, SimulatedOvation
from tests.simulation.world import World

_ANSWER_SECONDS = 10.0  # how long a webhook's sender waits
_RESEND_SECONDS = (3.0, 10.0, 20.0)


@dataclass(slots=True)
class Post:
    """How webhooks fare, until all is calm: probabilities."""

    dropped: float = 0.0
    doubled: float = 0.0
    late: float = 0.0


@dataclass(slots=True)
class Asked:
    """What was asked of agents."""

    runs: int = 0
    accepted: list[str] = field(default_factory=list)  # jobs whose ids people were given
    cancelled: set[str] = field(default_factory=set)  # jobs whose end was asked for


class People:
    """Everybody who is no agent."""

    def __init__(self, world: World, ovation: SimulatedOvation, agents: Sequence[Agent], post: Post) -> None:
        self._world = world
        self._ovation = ovation
        self._agents = agents
        self._post = post
        self._sent = 0
        self._asking: set[asyncio.Task[None]] = set()
        self.project = ovation.add("Project", "A project", [])
        self.activities: list[Entity] = []
        self.programs: dict[str, Program] = {}  # by the image's Revision
        self.asked = Asked()
        self.lost_webhooks = 0
        self.uploads: set[str] = set()  # Revisions whose bytes are still to come
        ovation.on_link = self._tell

    # In Ovation.

    def make_activity(self, inputs: int, *, uploading: bool) -> Entity:
        """Make an Activity with an image and inputs; with `uploading` the last input's bytes come later."""
        number = len(self.activities) + 1
        activity = self._ovation.add("Activity", f"activity {number}", self.project.roots)
        self.activities.append(activity)
        self._ovation.link(self.project, "activities", activity)
        self._world.note("people", f"make {activity.id}")
        for index in range(inputs):
            self.add_input(activity, uploading=uploading and index == inputs - 1)
        self.add_image(activity)
        return activity

    def add_input(self, activity: Entity, *, uploading: bool = False) -> None:
        """Add an input to an Activity."""
        count = len(self._ovation.related(activity, "inputs"))
        name = f"input {count + 1}"
        revision = self._revision(name, None if uploading else _content(activity, name))
        self._world.note("people", f"add {revision.id} to {activity.id}{', uploading' if uploading else ''}")
        self._ovation.link(activity, "inputs", revision)
        if uploading:
            seconds = self._world.chance.between(1, 20, f"upload {revision.id}")
            self.uploads.add(revision.id)
            self._world.later(seconds, self._end_upload, revision, _content(activity, name))

    def remove_input(self, activity: Entity) -> None:
        """Take an Activity's newest input away, unless it is the only one."""
        inputs = self._ovation.related(activity, "inputs")
        if len(inputs) > 1:
            self._world.note("people", f"remove {inputs[-1].id} from {activity.id}")
            self._ovation.unlink(activity, "inputs", inputs[-1])

    def add_image(self, activity: Entity) -> None:
        """Add an image to an Activity."""
        chance, what = self._world.chance, f"program of {activity.id}"
        files = ("table.csv", "figures/one.png", "figures/two.png", "deep/er/log.txt", "long report.txt")
        program = Program(
            seconds=chance.between(0.5, 40, what) if chance.happens(0.95, what) else 100.0,
            exit_code=chance.one_of((0, 0, 0, 0, 0, 0, 3, 137), what),
            outputs=tuple(file for file in files if chance.happens(0.5, what)),
        )
        image = self._revision("image.sif", program.image())
        self.programs[image.id] = program
        self._ovation.link(activity, "actions", image)

    def _revision(self, name: str, content: bytes | None) -> Entity:
        file = self._ovation.add("File", name, self.project.roots)
        return self._ovation.revision(file, name, content)

    def _end_upload(self, revision: Entity, content: bytes) -> None:
        self._world.note("people", f"{revision.id} is uploaded")
        self._ovation.upload(revision, content)
        self.uploads.discard(revision.id)

    # What Ovation tells.

    def _tell(self, relation: Relation) -> None:
        document = relation_document(relation)
        hints = parse(document)
        if isinstance(hints, Unreadable) or not hints or relation.rel == "outputs":
            return
        self._sent += 1
        what = f"webhook {self._sent}"
        chance, post = self._world.chance, self._post
        copies = 2 if chance.happens(post.doubled, f"{what} doubled") else 1
        if chance.happens(post.dropped, f"{what} dropped"):
            self._world.note("ovation", f"{what} of {relation.id} is lost")
            self.lost_webhooks += 1
            return
        for copy in range(copies):
            late = chance.happens(post.late, f"{what}.{copy} late")
            least, most = (0.5, 40.0) if late else chance.one_of(((0.003, 0.03), (0.01, 0.3)), f"{what}.{copy}")
            seconds = chance.between(least, most, f"{what}.{copy}")
            self._world.later(seconds, self._deliver, f"{what}.{copy}", Delivery(hints), 0)

    def _deliver(self, what: str, delivery: Delivery, tries: int) -> None:
        agent = self._world.chance.one_of(self._agents, f"{what} to")
        answered = [False]

        def again() -> None:
            if answered[0]:
                return
            if tries == len(_RESEND_SECONDS):
                self._world.note("ovation", f"{what} is given up")
                self.lost_webhooks += 1
            else:
                self._world.later(_RESEND_SECONDS[tries], self._deliver, what, delivery, tries + 1)

        services, process = agent.services, agent.process
        if services is None or process is None:
            again()
            return

        async def post() -> None:
            try:
                answered[0] = await services.inbox.store(delivery) in {Receipt.STORED, Receipt.REPEATED}
            except DatabaseError:
                return

        self._keep(process.spawn(post(), what))
        self._world.later(_ANSWER_SECONDS, again)

    # What people ask of agents.

    def ask_for_a_run(self, activity: Entity) -> None:
        """Ask an agent to run an Activity again, whatever ran before."""
        what = f"rerun of {activity.id}"
        agent = self._world.chance.one_of(self._agents, what)
        if agent.answers and agent.process is not None and agent.services is not None:
            self.asked.runs += 1
            self._world.note("people", f"ask {agent.name} to run {activity.id}")
            self._keep(agent.process.spawn(self._run(agent.services, activity), what))

    def cancel(self, activity: Entity) -> None:
        """Ask an agent for the end of an Activity's run."""
        what = f"cancel {activity.id}"
        agent = self._world.chance.one_of(self._agents, what)
        if agent.answers and agent.process is not None and agent.services is not None:
            self._world.note("people", f"ask {agent.name} to cancel {activity.id}")
            self._keep(agent.process.spawn(self._cancel(agent.services, activity), what))

    async def _run(self, services: Services, activity: Entity) -> None:
        """Do as `agent.web` does."""
        try:
            found = await services.ovation.activity(0, activity.id)
            judgement = readiness(found, services.settings.agent.image_suffixes, image_name="image.sif")
            if isinstance(judgement, NotReady):
                return
            job, _ = await services.watch_list.start(found, judgement.plan, "rerun")
        except (DatabaseError, OvationError):
            return
        services.on_job()
        self.asked.accepted.append(job.id)

    async def _cancel(self, services: Services, activity: Entity) -> None:
        jobs: Jobs = services.jobs
        try:
            for job in await jobs.newest(activity.id):
                if job.state not in TERMINAL:
                    self.asked.cancelled.add(job.id)  # it may be done although the answer is lost
                    await jobs.cancel(job.id)
                    services.on_cancel(job.id)
        except DatabaseError:
            return

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._asking.add(task)
        task.add_done_callback(self._asking.discard, context=self._world.context)


def _content(activity: Entity, name: str) -> bytes:
    return f"{name} of {activity.id}\n".encode() * 3


__all__ = ["OWNER", "People", "Post"]
