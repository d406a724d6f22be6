"""What an Activity is, as far as a run is concerned, and whether it is ready for one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from agent.domain.job import Plan, PlannedFile
from agent.domain.workdir import unique_names


class Upload(StrEnum):
    """How far a Revision's bytes are. Ovation leaves it out of old Revisions, which are complete."""

    COMPLETE = "complete"
    IN_PROGRESS = "in-progress"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Entity:
    """A Revision or a Source that an Activity links to."""

    id: str
    type: str
    name: str
    upload: Upload
    created_at: str = ""  # ISO 8601, as Ovation writes it
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Activity:
    """An Activity as it stands in Ovation now."""

    id: str
    organization: int
    name: str
    project_id: str
    inputs: tuple[Entity, ...]
    related: tuple[Entity, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The Activity can be run, with this plan."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class NotReady:
    """Why no run is started, in words that a scientist understands. `waiting`: time alone may change it."""

    reasons: tuple[str, ...]
    waiting: bool = False


def readiness(
    activity: Activity,
    suffixes: Iterable[str],
    ran: Iterable[frozenset[str]] = (),
    image_name: str | None = None,
) -> Ready | NotReady:
    """Judge whether `activity` can be run now.

    Args:
        activity: as read from Ovation.
        suffixes: a related file whose name ends in one of these is a compute image; case does not matter.
        ran: for each earlier run of this Activity, the ids of its inputs and its image.
        image_name: run this related file, whatever its suffix and whatever ran before (`hpc_run`).
    """
    if not activity.inputs:
        return NotReady(("the Activity has no inputs",))
    image = _named(activity, image_name) if image_name is not None else _image(activity, tuple(suffixes))
    if isinstance(image, NotReady):
        return image
    waiting = [entity for entity in (*activity.inputs, image) if entity.upload is Upload.IN_PROGRESS]
    if broken := [entity for entity in (*activity.inputs, image) if entity.upload is Upload.ERROR]:
        return NotReady(tuple(f"the upload of {entity.name} failed: upload it again or remove it" for entity in broken))
    if waiting:
        return NotReady(tuple(f"waiting for {entity.name} to finish uploading" for entity in waiting), waiting=True)
    gained = {entity.id for entity in activity.inputs} | {image.id}
    if image_name is None and gained <= frozenset().union(*ran):
        return NotReady(("nothing new since the last run: its inputs and image have all been run before",))
    return Ready(_plan(activity, image))


def key(plan: Plan) -> frozenset[str]:
    """Return what a later run is compared with: the ids of the inputs and the image."""
    return frozenset({file.entity_id for file in plan.inputs} | {plan.image.entity_id})


def _named(activity: Activity, image_name: str) -> Entity | NotReady:
    found = [entity for entity in activity.related if entity.name == image_name]
    if found:
        return _newest(found)
    names = ", ".join(sorted({entity.name for entity in activity.related})) or "none"
    return NotReady((f"no related file is named {image_name}; the related files are: {names}",))


def _image(activity: Activity, suffixes: tuple[str, ...]) -> Entity | NotReady:
    images = [entity for entity in activity.related if entity.name.lower().endswith(suffixes)]
    names = sorted({entity.name for entity in images})
    if not images:
        return NotReady((f"no related file is a compute image (a name that ends in {', '.join(suffixes)})",))
    if len(names) > 1:
        return NotReady((f"{len(names)} images among the related files: {', '.join(names)}; keep one of them",))
    return _newest(images)


def _newest(entities: list[Entity]) -> Entity:
    return max(entities, key=lambda entity: (entity.created_at, entity.id))


def _plan(activity: Activity, image: Entity) -> Plan:
    # A related file that is not whole yet is left out: only inputs and the image decide when a run starts.
    related = [entity for entity in activity.related if entity.upload is Upload.COMPLETE]
    files = dict(zip((entity.id for entity in related), _pinned(related), strict=True))
    return Plan(inputs=tuple(_pinned(activity.inputs)), related=tuple(files.values()), image=files[image.id])


def _pinned(entities: Iterable[Entity]) -> list[PlannedFile]:
    listed = list(entities)
    shown = [entity.name if entity.type == "Revision" else f"{entity.name}.source.json" for entity in listed]
    names = unique_names(zip(shown, (entity.id for entity in listed), strict=True))
    return [
        PlannedFile(entity_id=entity.id, type=entity.type, name=entity.name, file_name=file_name)
        for entity, file_name in zip(listed, names, strict=True)
    ]
