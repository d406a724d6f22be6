"""The promise, checked at the end of a simulation against what really happened in its world."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.adapters import documents
from agent.adapters.executor import Ending
from agent.db.jobs import plan_from
from agent.domain.activity import Activity, NotReady, key, readiness
from agent.sandbox.records import Entity
from tests import promise_database
from tests.promise_database import named
from tests.simulation.agents import Agent
from tests.simulation.database import Server
from tests.simulation.machine import Container
from tests.simulation.ovation import SimulatedOvation
from tests.simulation.people import People
from tests.simulation.store import Store
from tests.simulation.world import World

_SUFFIXES = (".sif",)
_UNFORESEEN = frozenset({"ro-crate-metadata.json"})
_SET_ASIDE_AFTER = 6  # deaths of agents
_NAME = re.compile(r"ovation-(?P<job>.+)-(?P<launch>\d+)")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Scene:
    """Where to look."""

    world: World
    server: Server
    ovation: SimulatedOvation
    store: Store
    agents: Sequence[Agent]
    people: People

    def containers(self) -> dict[tuple[str, int], Container]:
        """Return every container that was ever started, by job and launch."""
        machines = {agent.machine for agent in self.agents}
        found = {}
        for machine in sorted(machines, key=lambda each: each.name):
            for container in machine.containers.values():
                match = _NAME.fullmatch(container.name)
                assert match is not None, container.name
                found[match["job"], int(match["launch"])] = container
        return found

    def jobs(self) -> Sequence[Row]:
        """Return every job."""
        return self.server.rows("SELECT * FROM jobs ORDER BY activity_id, run")


def unfinished(scene: Scene) -> list[str]:
    """Return what is still to be done; nothing once all has come to rest."""
    jobs = scene.jobs()
    found = [f"{named(job)}: {job['state']}" for job in jobs if job["finished_at"] is None]
    looks = scene.server.rows("SELECT entity_id FROM watched WHERE due_at IS NOT NULL OR lease_until IS NOT NULL")
    found += [f"{each['entity_id']}: to be looked at" for each in looks]
    return [*found, *_missing(scene, jobs)]


def walks(scene: Scene) -> list[str]:
    """Return where somebody walks, or died on the way: which nobody waits for."""
    rows = scene.server.rows("SELECT organization FROM reconciliations WHERE lease_until IS NOT NULL")
    return [f"organization {row['organization']}: somebody walks there" for row in rows]


def violations(scene: Scene) -> list[str]:
    """Return what breaks the promise, once nothing is to be done any more."""
    server = scene.server
    server.tell(scene.world.wall)
    jobs = scene.jobs()
    containers = scene.containers()
    found = [*scene.world.problems, *server.run(promise_database.violations(server.fetch)), *_missing(scene, jobs)]
    found += _unjustified(scene, jobs)
    found += _starts(scene)
    for job in jobs:
        found += _verdict(scene, job, containers)
    found += _delivered(scene, jobs, containers)
    found += _on_disk(scene, jobs)
    for agent in scene.agents:
        found += _told_once(agent)
    return found


def _missing(scene: Scene, jobs: Sequence[Row]) -> Iterator[str]:
    """Whatever makes an Activity ready for a run has led to one."""
    for entity in scene.people.activities:
        ran = [key(plan_from(job["plan"])) for job in jobs if job["activity_id"] == entity.id]
        if not isinstance(readiness(_activity(scene.ovation, entity), _SUFFIXES, ran), NotReady):
            yield f"{entity.id}: it is ready for a run, and there was none"


def _activity(ovation: SimulatedOvation, entity: Entity) -> Activity:
    inputs, related = ovation.related(entity, "inputs"), ovation.related(entity, "actions")
    return Activity(
        id=entity.id,
        organization=0,
        name=entity.attributes["name"],
        project_id=entity.roots[0],
        inputs=tuple(documents.entity(ovation.document(each)) for each in inputs),
        related=tuple(documents.entity(ovation.document(each)) for each in related),
    )


def _unjustified(scene: Scene, jobs: Sequence[Row]) -> Iterator[str]:
    """A run that nobody asked for has something that none before it had."""
    before: dict[str, set[str]] = {}
    asked = 0
    for job in jobs:
        had = before.setdefault(job["activity_id"], set())
        needed = key(plan_from(job["plan"]))
        if job["trigger"] in {"rerun", "hpc_run"}:
            asked += 1
        elif needed <= had:
            yield f"{named(job)}: nothing is new in it"
        had |= needed
    if asked > scene.people.asked.runs:
        yield f"{asked} runs were made on request, {scene.people.asked.runs} were asked for"
    there = {str(job["id"]) for job in jobs}
    yield from (f"job {each}: promised and not there" for each in scene.people.asked.accepted if each not in there)


def _starts(scene: Scene) -> Iterator[str]:
    """No container starts twice for one launch."""
    starts = sum((agent.machine.starts for agent in _one_of_each_machine(scene.agents)), Counter[str]())
    yield from (f"{name}: started {times} times" for name, times in starts.items() if times > 1)


def _one_of_each_machine(agents: Sequence[Agent]) -> list[Agent]:
    return list({agent.machine.name: agent for agent in agents}.values())


def _verdict(scene: Scene, job: Row, containers: Mapping[tuple[str, int], Container]) -> Iterator[str]:
    """The verdict is what became of the container, and nothing else."""
    job_id = str(job["id"])
    if _was_set_aside(scene, job):
        return
    launches = sorted(launch for of, launch in containers if of == job_id)
    was_cancelled = job_id in scene.people.asked.cancelled
    got = (job["state"], job["fault_class"], job["exit_code"])
    allowed: set[tuple[str, str | None, int | None]] = set()
    if was_cancelled and (not launches or containers[job_id, launches[-1]].ending is Ending.LOST):
        allowed.add(("cancelled", None, None))
    if launches:
        last = containers[job_id, launches[-1]]
        code = last.program.exit_code
        if last.ending is Ending.EXITED:
            fault = {0: None, 137: "memory"}.get(code, "user_code")
            allowed.add(("failed" if code else "succeeded", fault, code))
        elif last.ending is Ending.TIME_LIMIT:
            allowed.add(("failed", "time_limit", None))
        elif last.ending is Ending.CANCELLED and was_cancelled:
            allowed.add(("cancelled", None, None))
        elif last.ending is Ending.LOST and launches[-1] > 1:
            allowed.add(("failed", "node", None))
    if got not in allowed:
        what = ", ".join(f"launch {each}: {containers[job_id, each].ending}" for each in launches) or "none started"
        wanted = " or ".join(map(str, sorted(allowed, key=str))) or "something else"
        message = f" ({job['fault_message']})" if job["fault_message"] else ""
        yield f"{named(job)}: {got}{message}, expected {wanted}; containers: {what}"


def _was_set_aside(scene: Scene, job: Row) -> bool:
    """Whether its step was given up because agents died in it, and enough of them did."""
    deaths = sum(len(agent.processes) - 1 for agent in scene.agents) + sum(agent.holds for agent in scene.agents)
    return job["fault_class"] == "agent" and deaths >= _SET_ASIDE_AFTER


def _expected(
    scene: Scene, job: Row, containers: Mapping[tuple[str, int], Container]
) -> tuple[dict[str, bytes], frozenset[str]]:
    """Return the files that a run is to have on its Activity, and those that it may have besides."""
    container = containers.get((str(job["id"]), job["launch"]))
    logs = frozenset({"stdout.log", "stderr.log"})
    if container is None:
        return {}, logs
    files = dict(container.program.logs())
    if container.ending is Ending.EXITED:
        plan = plan_from(job["plan"])
        inputs = {each.file_name: _bytes(scene, each.entity_id) for each in plan.inputs}
        program = scene.people.programs[plan.image.entity_id]
        files |= program.results(inputs)
    return files, frozenset()


def _bytes(scene: Scene, revision_id: str) -> bytes:
    return scene.ovation.content(scene.ovation.entities[revision_id]) or b""


def _delivered(scene: Scene, jobs: Sequence[Row], containers: Mapping[tuple[str, int], Container]) -> Iterator[str]:
    """Each run's Folder has what it is to have, once, with the right bytes, linked to the Activity."""
    ovation = scene.ovation
    folders = ovation.related(scene.people.project, "folders")
    of_name = {f"{job['activity_name']} run {job['run']}": job for job in jobs}
    for name, times in Counter(folder.attributes["name"] for folder in folders).items():
        if name not in of_name:
            yield f"Folder {name!r}: there is no such run"
        elif times > 1:
            yield f"Folder {name!r}: there {times} times"
    delivered: set[str] = set()
    for name, job in of_name.items():
        found: dict[str, list[Entity]] = {}
        for folder in folders:
            if folder.attributes["name"] == name:
                _walk(ovation, folder, "", found)
        yield from _run(scene, job, found, _expected(scene, job, containers), delivered)
    for entity in scene.people.activities:
        linked = {each.id for each in ovation.related(entity, "outputs")}
        yield from (f"{entity.id}: {each} is linked, and in no run's Folder" for each in sorted(linked - delivered))
    for revision in ovation.entities.values():
        if revision.attributes.get("upload-status") == "in-progress":
            yield f"{revision.id} ({revision.attributes['name']}): its upload is still going on"
    yield from (
        f"{each.key}: it is still being sent in parts"
        for each in scene.store.uploads.values()
        if each.until > scene.world.now
    )


def _run(
    scene: Scene,
    job: Row,
    found: Mapping[str, Sequence[Entity]],
    expected: tuple[Mapping[str, bytes], frozenset[str]],
    delivered: set[str],
) -> Iterator[str]:
    wanted, allowed = expected
    outputs = scene.ovation.related(scene.ovation.entities[job["activity_id"]], "outputs")
    if not _was_set_aside(scene, job):
        yield from (f"{named(job)}: {path} is missing" for path in sorted(wanted.keys() - found.keys()))
    for path, files in sorted(found.items()):
        if path not in wanted and path not in allowed and path not in _UNFORESEEN:
            yield f"{named(job)}: {path} was not expected"
        if len(files) > 1:
            yield f"{named(job)}: {path} is there {len(files)} times"
        revisions = [each for file in files for each in scene.ovation.related(file, "revisions")]
        complete = [each for each in revisions if each.attributes["upload-status"] == "complete"]
        delivered |= {each.id for each in complete}
        if len(complete) != 1:
            yield f"{named(job)}: {path} has {len(complete)} complete Revisions"
        for revision in complete:
            if revision not in outputs:
                yield f"{named(job)}: {path} ({revision.id}) is not linked to the Activity"
            content = scene.ovation.content(revision)
            if path in wanted and content != wanted[path]:
                yield f"{named(job)}: {path} is {content!r}, expected {wanted[path]!r}"


def _walk(ovation: SimulatedOvation, folder: Entity, path: str, found: dict[str, list[Entity]]) -> None:
    for file in ovation.related(folder, "files"):
        found.setdefault(f"{path}{file.attributes['name']}", []).append(file)
    for inner in ovation.related(folder, "folders"):
        _walk(ovation, inner, f"{path}{inner.attributes['name']}/", found)


def _on_disk(scene: Scene, jobs: Sequence[Row]) -> Iterator[str]:
    """Nothing of an ended run is left where its files were."""
    places = {str(job["id"]): job["place"] for job in jobs}
    for agent in scene.agents:
        place = agent.place()
        for directory in sorted((agent.data_dir / "jobs").glob("*")):
            if places.get(directory.name) == place:
                files = ", ".join(sorted(str(path.relative_to(directory)) for path in directory.rglob("*")))
                yield f"job {directory.name}: left on {agent.name}'s disk: {files or 'an empty directory'}"


def _told_once(agent: Agent) -> Iterator[str]:
    """That somebody is away is told once, and again only after it was said to be back."""
    away: set[tuple[str, str]] = set()
    for when, process, event, values in agent.lines:
        who = (process, str(values.get("party", "database")))
        if event in {"party_away", "database_away"}:
            if who in away:
                yield f"{process}: at {when:.1f} it says again that {who[1]} is away"
            away.add(who)
        elif event in {"party_back", "database_back"}:
            away.discard(who)


def story(scene: Scene) -> list[str]:
    """Return the jobs and what is told of them, for people."""
    lines = []
    for job in scene.jobs():
        lines.append(f"{named(job)}: {job['state']} {job['verdict']} {job['fault_class']} {job['fault_message']}")
        plan = json.dumps([each["entity_id"] for each in job["plan"]["inputs"]])
        lines.append(f"    {job['trigger']}, inputs {plan}, launch {job['launch']}, suspicion {job['suspicion']}")
    return lines
