"""What a person finds in Ovation after the runs: each Folder, File, Revision and link as expected, and once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from agent.sandbox.records import Entity
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET
from tests.lab import Lab

_UNFORESEEN = frozenset({"ro-crate-metadata.json"})
"""What a run tells of itself: it is there once, and what it says is another test's business."""


@dataclass(slots=True)
class _Tree:
    """The Files of a run by path, the directories, and what stands twice."""

    files: dict[str, Entity] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    twice: list[str] = field(default_factory=list)


def violations(
    lab: Lab, jobs: Sequence[Mapping[str, Any]], expected: Mapping[str, Mapping[str, bytes]]
) -> Iterator[str]:
    """Return what is missing, there twice, different or unfinished; `expected` is path → bytes by Activity id."""
    sandbox = lab.sandbox
    project = _entity(sandbox, lab.project_id)
    folders = [(str(each.attributes["name"]), each) for each in _related(sandbox, project, "folders")]
    wanted = {f"{job['activity_name']} run {job['run']}": job for job in jobs if job["activity_id"] in expected}
    counts = Counter(name for name, _ in folders)
    for name in sorted({*counts, *wanted}):
        if counts[name] != (1 if name in wanted else 0):
            yield f"Folder {name!r}: there {counts[name]} times, {1 if name in wanted else 0} expected"
    delivered: dict[str, set[str]] = {activity_id: set() for activity_id in expected}
    for name, folder in folders:
        if name in wanted:
            activity_id = wanted[name]["activity_id"]
            yield from _run(sandbox, name, folder, expected[activity_id], delivered[activity_id])
    for activity_id, revisions in delivered.items():
        yield from _links(sandbox, activity_id, revisions)
    yield from _unfinished(sandbox)


def _run(
    sandbox: Sandbox, name: str, folder: Entity, expected: Mapping[str, bytes], delivered: set[str]
) -> Iterator[str]:
    """Compare one run's Folder with what is expected there, and add its Revisions to `delivered`."""
    tree = _Tree()
    _walk(sandbox, folder, "", tree)
    yield from (f"{name}: {path} is there twice" for path in tree.twice)
    parents = {str(parent) for path in expected for parent in PurePosixPath(path).parents} - {"."}
    yield from (f"{name}: the Folder {path} is missing" for path in sorted(parents - tree.folders))
    yield from (f"{name}: the Folder {path} was not expected" for path in sorted(tree.folders - parents))
    for path in sorted(expected.keys() - tree.files.keys()):
        yield f"{name}: {path} is missing"
    for path, file in sorted(tree.files.items()):
        if path not in expected and path not in _UNFORESEEN:
            yield f"{name}: {path} was not expected"
        complete = [each for each in _related(sandbox, file, "revisions") if _status(each) == "complete"]
        delivered |= {each.id for each in complete}
        if len(complete) != 1:
            yield f"{name}: {path} has {len(complete)} complete Revisions"
        for revision in complete:
            content = _bytes(sandbox, revision)
            if content is None:
                yield f"{name}: {path} has no bytes in the object store"
            elif path in expected and content != expected[path]:
                yield f"{name}: {path} is {_shown(content)}, {_shown(expected[path])} expected"


def _walk(sandbox: Sandbox, folder: Entity, path: str, tree: _Tree) -> None:
    for file in _related(sandbox, folder, "files"):
        where = f"{path}{file.attributes['name']}"
        if where in tree.files:
            tree.twice.append(where)
        tree.files[where] = file
    for inner in _related(sandbox, folder, "folders"):
        where = f"{path}{inner.attributes['name']}"
        if where in tree.folders:
            tree.twice.append(where)
        tree.folders.add(where)
        _walk(sandbox, inner, f"{where}/", tree)


def _links(sandbox: Sandbox, activity_id: str, delivered: set[str]) -> Iterator[str]:
    """What the Activity shows as outputs is what was delivered, each once."""
    links = sandbox.model.records.relations(activity_id, "outputs")
    linked = Counter(each.target_id if each.source_id == activity_id else each.source_id for each in links)
    for revision_id, times in linked.items():
        if times > 1:
            yield f"Activity {activity_id}: {_label(sandbox, revision_id)} is linked {times} times"
    for revision_id in sorted(delivered - linked.keys()):
        yield f"Activity {activity_id}: {_label(sandbox, revision_id)} is not linked"
    for revision_id in sorted(linked.keys() - delivered):
        yield f"Activity {activity_id}: {_label(sandbox, revision_id)} is linked, and not in the Folder of a run"


def _unfinished(sandbox: Sandbox) -> Iterator[str]:
    for revision in sandbox.model.records.entities_of_type(0, "Revision"):
        if _status(revision) == "in-progress":
            yield f"{_label(sandbox, revision.id)} is left in-progress"
    for upload in sandbox.store.uploads(BUCKET, ""):
        # One without parts holds nothing, and nobody who lost the answer that told its id can find it again: what
        # Ovation gives to upload with is good for one object, not for a listing.
        if parts := sandbox.store.parts(upload.id):
            yield f"a multipart upload is left, with {len(parts)} parts: {upload.key}"


def _entity(sandbox: Sandbox, entity_id: str) -> Entity:
    found = sandbox.model.records.entity(entity_id)
    assert found is not None, f"{entity_id} is not in the sandbox"
    return found


def _related(sandbox: Sandbox, entity: Entity, rel: str) -> list[Entity]:
    return [each for each in sandbox.model.records.related(entity.id, rel) if each.trash_info is None]


def _status(revision: Entity) -> str:
    return str(revision.attributes.get("upload-status"))


def _bytes(sandbox: Sandbox, revision: Entity) -> bytes | None:
    stored = sandbox.store.stat(BUCKET, str(revision.object_key))
    return None if stored is None else b"".join(sandbox.store.path(blob).read_bytes() for blob in stored.blobs)


def _label(sandbox: Sandbox, revision_id: str) -> str:
    return f"Revision {revision_id} ({_entity(sandbox, revision_id).attributes['name']})"


def _shown(content: bytes) -> str:
    most = 60
    return repr(content) if len(content) <= most else f"{len(content)} bytes beginning with {content[:20]!r}"
