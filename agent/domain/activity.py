"""What an Activity is, as far as a run is concerned, and whether it is ready for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from agent.domain.job import Plan, PlannedFile
from agent.domain.resources import wishes
from agent.domain.workdir import unique_names

IMAGE_PROPERTY = "compute.image"
AUTO_PROPERTY = "compute.auto"
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_NO = frozenset({"false", "no", "off", "0"})
_YES = frozenset({"true", "yes", "on", "1"})


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
    properties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # every user's value of each key
    created_at: str = ""  # ISO 8601, as Ovation writes it


@dataclass(frozen=True, slots=True)
class Listed:
    """An Activity as the list of its organization shows it; the times are ISO 8601, as Ovation writes them."""

    id: str
    created_at: str
    updated_at: str


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
    history: frozenset[str] = frozenset(),
) -> Ready | NotReady:
    """Judge whether `activity` can be run now.

    Args:
        activity: as read from Ovation.
        suffixes: a related file whose name ends in one of these is a compute image; case does not matter.
        ran: for each earlier run of this Activity, the ids of its inputs and its image.
        image_name: run this related file, whatever its suffix and whatever ran before (`hpc_run`).
        history: ids that were there before the agent was; they are no reason for a run.
    """
    if image_name is None and (reason := _switched_off(activity)):
        return NotReady((reason,))
    if not activity.inputs:
        return NotReady(("the Activity has no inputs",))
    image = _named(activity, image_name) if image_name is not None else _image(activity, tuple(suffixes))
    if isinstance(image, NotReady):
        return image
    needed = (*activity.inputs, image)
    if incomplete := _incomplete(needed):
        return incomplete
    if image_name is None and (reason := _nothing_gained({entity.id for entity in needed}, ran, history)):
        return NotReady((reason,))
    return Ready(_plan(activity, image))


def history(activity: Activity, installed_at: datetime) -> frozenset[str]:
    """Return the ids among an Activity's inputs and related files that are older than the agent.

    Nobody told of them, so it cannot be known when they were linked; an Activity that is younger has no history.
    """
    if _moment(activity.created_at) >= installed_at:
        return frozenset()
    linked = (*activity.inputs, *activity.related)
    return frozenset(entity.id for entity in linked if _moment(entity.created_at) < installed_at)


def is_recent(listed: Listed, installed_at: datetime) -> bool:
    """Return whether an Activity was made or changed since the agent was installed."""
    return max(_moment(listed.created_at), _moment(listed.updated_at)) >= installed_at


def _moment(text: str) -> datetime:
    """Read a time as Ovation writes it; what cannot be read is old."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return _LONG_AGO
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _nothing_gained(needed: set[str], ran: Iterable[frozenset[str]], history: frozenset[str]) -> str | None:
    before = frozenset().union(*ran)
    if needed <= before:
        return "nothing new since the last run: its inputs and image have all been run before"
    if needed <= before | history:
        return "nothing new since the agent was installed: add an input or an image, or ask for a run"
    return None


def key(plan: Plan) -> frozenset[str]:
    """Return what a later run is compared with: the ids of the inputs and the image."""
    return frozenset({file.entity_id for file in plan.inputs} | {plan.image.entity_id})


def _incomplete(needed: Iterable[Entity]) -> NotReady | None:
    listed = list(needed)
    if broken := [entity for entity in listed if entity.upload is Upload.ERROR]:
        return NotReady(tuple(f"the upload of {entity.name} failed: upload it again or remove it" for entity in broken))
    if waiting := [entity for entity in listed if entity.upload is Upload.IN_PROGRESS]:
        return NotReady(tuple(f"waiting for {entity.name} to finish uploading" for entity in waiting), waiting=True)
    return None


def _named(activity: Activity, image_name: str) -> Entity | NotReady:
    found = [entity for entity in activity.related if entity.name == image_name]
    if found:
        return _newest(found)
    names = ", ".join(sorted({entity.name for entity in activity.related})) or "none"
    return NotReady((f"no related file is named {image_name}; the related files are: {names}",))


def _switched_off(activity: Activity) -> str | None:
    values = {value.strip().lower() for value in activity.properties.get(AUTO_PROPERTY, ())}
    if values & _NO:
        return f"the property {AUTO_PROPERTY} switches automatic runs off; somebody may still ask for one"
    if unclear := values - _YES:
        return f"the property {AUTO_PROPERTY} is {', '.join(sorted(unclear))}, which is neither true nor false"
    return None


def _image(activity: Activity, suffixes: tuple[str, ...]) -> Entity | NotReady:
    wanted = sorted({value.strip() for value in activity.properties.get(IMAGE_PROPERTY, ()) if value.strip()})
    if len(wanted) > 1:
        return NotReady((f"the property {IMAGE_PROPERTY} has several values: {', '.join(wanted)}; keep one of them",))
    if wanted:
        named = _named(activity, wanted[0])
        return named if isinstance(named, Entity) else NotReady((f"{IMAGE_PROPERTY}: {named.reasons[0]}",))
    images = [entity for entity in activity.related if entity.name.lower().endswith(suffixes)]
    names = sorted({entity.name for entity in images})
    if not images:
        return NotReady((f"no related file is a compute image (a name that ends in {', '.join(suffixes)})",))
    if len(names) > 1:
        listed = ", ".join(names)
        return NotReady(
            (f"{len(names)} images among the related files and no {IMAGE_PROPERTY} property names one: {listed}",)
        )
    return _newest(images)


def _newest(entities: list[Entity]) -> Entity:
    return max(entities, key=lambda entity: (entity.created_at, entity.id))


def _plan(activity: Activity, image: Entity) -> Plan:
    # A related file that is not whole yet is left out: only inputs and the image decide when a run starts.
    related = [entity for entity in activity.related if entity.upload is Upload.COMPLETE]
    files = dict(zip((entity.id for entity in related), _pinned(related), strict=True))
    return Plan(
        inputs=tuple(_pinned(activity.inputs)),
        related=tuple(files.values()),
        image=files[image.id],
        wishes=wishes(activity.properties),
    )


def _pinned(entities: Iterable[Entity]) -> list[PlannedFile]:
    listed = list(entities)
    shown = [entity.name if entity.type == "Revision" else f"{entity.name}.source.json" for entity in listed]
    names = unique_names(zip(shown, (entity.id for entity in listed), strict=True))
    return [
        PlannedFile(entity_id=entity.id, type=entity.type, name=entity.name, file_name=file_name)
        for entity, file_name in zip(listed, names, strict=True)
    ]
