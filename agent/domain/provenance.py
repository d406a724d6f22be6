"""A run's provenance as a Process Run Crate: what produced each file, from what, by whom, and how to do it again.

RO-Crate 1.1 (https://w3id.org/ro/crate/1.1) with the profile Process Run Crate 0.5
(https://w3id.org/ro/wfrun/process/0.5). The crate lies beside the outputs, so outputs are named by their paths; inputs
and the image are named by their addresses in Ovation. There is no token, no presigned address and no path of the
agent's machine in it. The same run always makes the same crate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from agent.domain.job import Fault, Verdict

FILE_NAME = "ro-crate-metadata.json"
_CRATE = "https://w3id.org/ro/crate/1.1"
_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_TERMS = "https://w3id.org/ro/terms/workflow-run"
# The terms beyond RO-Crate 1.1, one by one, so that no second document is needed to read a crate.
_CONTEXT = [
    f"{_CRATE}/context",
    {name: f"{_TERMS}#{name}" for name in ("ContainerImage", "environment", "resourceUsage", "sha256")},
]
_PARAMETER_STEMS = ("parameters", "params", "config", "configuration", "settings", "options")
_PARAMETER_SUFFIXES = frozenset({".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".txt", ".properties"})

Entity = dict[str, Any]
Comparison = Literal["identical", "differs", "missing", "new"]


@dataclass(frozen=True, slots=True)
class Source:
    """An input, a related file or the image: which Revision, and the bytes that the run had of it.

    `size` and `sha256` are missing where it was never fetched.
    """

    entity_id: str
    type: str  # "Revision" or "Source"
    name: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """An output or a log, by its path beside the crate."""

    path: str
    revision_id: str
    size: int
    sha256: str
    content_type: str
    is_log: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """What the image says of itself, and the runtime that ran it; empty where it was not read."""

    labels: Mapping[str, str]
    runscript: str = ""
    definition: str = ""
    runtime: str = ""


@dataclass(frozen=True, slots=True)
class Person:
    """Who asked for the run, or is an operator of the Activity. `id` is Ovation's."""

    id: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that is known of a run that has ended.

    `command` is the command line with paths relative to the job's directory. `amounts` are named figures of what it was
    given and used, with their units.
    """

    api_url: str
    organization: int
    activity_id: str
    activity_name: str
    number: int
    job_id: str
    launch: int
    trigger: str
    verdict: Verdict
    fault: Fault | None
    exit_code: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    inputs: Sequence[Source]
    related: Sequence[Source]
    image: Source
    image_facts: Image
    results: Sequence[Result]
    agent_version: str
    executor: str
    native_id: str | None = None
    requested_by: Person | None = None
    operators: Sequence[Person] = ()
    command: Sequence[str] = ()
    amounts: Sequence[tuple[str, float, str]] = ()
    notes: Sequence[str] = ()


def crate(run: Run) -> Entity:
    """Return the document of a run's crate."""
    action_id = f"#run-{run.job_id}"
    people = _people(run)
    amounts = [_amount(run, *amount) for amount in run.amounts]
    sources = [_source(run, source) for source in (*run.inputs, *run.related) if source != run.image]
    image, results = _image(run), [_result(run, result) for result in run.results]
    activity = _activity(run)
    ended = run.finished_at or run.started_at or run.created_at
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{run.activity_name} run {run.number}",
        "description": _description(run),
        "datePublished": ended.isoformat(),
        "conformsTo": {"@id": _PROFILE},
        "license": "Not stated: ask the owners of the Project in Ovation.",
        "isPartOf": {"@id": activity["@id"]},
        "hasPart": _references([*results, *sources, image]),
        "mentions": {"@id": action_id},
    }
    action = {
        "@id": action_id,
        "@type": "CreateAction",
        "name": f"Run {run.number} of {run.activity_name}",
        "description": _description(run),
        "identifier": run.job_id,
        "object": _references([*sources, activity]),
        "instrument": {"@id": image["@id"]},
        "result": _references(results),
        "agent": _references(people) or {"@id": "#agent"},
        "startTime": (run.started_at or run.created_at).isoformat(),
        "endTime": ended.isoformat(),
        "actionStatus": {"@id": f"http://schema.org/{_status(run)}"},
        "resourceUsage": _references(amounts),
        "environment": _references(_environment(run)),
        **({"error": _error(run)} if run.verdict is not Verdict.SUCCEEDED else {}),
    }
    graph = [
        _descriptor(),
        root,
        _profile(),
        action,
        image,
        _runtime(run),
        *sources,
        *results,
        activity,
        *people,
        _software(run),
        *amounts,
        *_environment(run),
    ]
    return {"@context": _CONTEXT, "@graph": [_lean(entity) for entity in graph if entity]}


def compare(earlier: Mapping[str, str], later: Mapping[str, str]) -> dict[str, Comparison]:
    """Return, for each path of either run, how its bytes are in the later one. Values are SHA-256 digests."""
    found: dict[str, Comparison] = {}
    for path in earlier.keys() | later.keys():
        if path not in later:
            found[path] = "missing"
        elif path not in earlier:
            found[path] = "new"
        else:
            found[path] = "identical" if earlier[path] == later[path] else "differs"
    return found


def is_parameters(name: str) -> bool:
    """Say whether a file of this name is one of parameters: `parameters.json`, `run-config.yaml`."""
    path = PurePosixPath(name.lower())
    words = path.stem.replace("-", "_").replace(".", "_").split("_")
    return path.suffix in _PARAMETER_SUFFIXES and any(word in _PARAMETER_STEMS for word in words)


def _description(run: Run) -> str:
    what = f"{run.image.name} was run on {len(run.inputs)} inputs of the Activity {run.activity_name}."
    return f"{what} It {_told(run)}"


def _told(run: Run) -> str:
    if run.verdict is Verdict.SUCCEEDED:
        return "succeeded."
    if run.verdict is Verdict.CANCELLED:
        return "was cancelled."
    return f"failed: {run.fault.message}" if run.fault else "failed."


def _error(run: Run) -> str:
    if run.fault is not None:
        return f"{run.fault.cls}: {run.fault.message}"
    return "A person cancelled the run." if run.verdict is Verdict.CANCELLED else "The run failed."


def _status(run: Run) -> str:
    return "CompletedActionStatus" if run.verdict is Verdict.SUCCEEDED else "FailedActionStatus"


def _descriptor() -> Entity:
    return {
        "@id": FILE_NAME,
        "@type": "CreativeWork",
        "about": {"@id": "./"},
        "conformsTo": [{"@id": _CRATE}],
    }


def _profile() -> Entity:
    return {"@id": _PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}


def _address(run: Run, entity_id: str) -> str:
    return f"{run.api_url}/api/v1/o/{run.organization}/entities/{quote(entity_id, safe='')}"


def _activity(run: Run) -> Entity:
    return {
        "@id": _address(run, run.activity_id),
        "@type": "CreativeWork",
        "name": run.activity_name,
        "description": "The Activity in Ovation that the run belongs to.",
        "identifier": run.activity_id,
    }


def _source(run: Run, source: Source) -> Entity:
    is_parameters_ = source.type == "Revision" and is_parameters(source.name)
    return {
        "@id": _address(run, source.entity_id),
        "@type": "File",
        "name": source.name,
        "identifier": source.entity_id,
        "contentSize": None if source.size is None else str(source.size),
        "sha256": source.sha256,
        "additionalType": "parameters" if is_parameters_ else f"Ovation {source.type}",
        "description": "Parameters of the run." if is_parameters_ else None,
    }


def _image(run: Run) -> Entity:
    facts = run.image_facts
    labels = "\n".join(f"{name}: {value}" for name, value in sorted(facts.labels.items()))
    return {
        **_source(run, run.image),
        "@type": ["File", "SoftwareApplication", "ContainerImage"],
        "additionalType": {"@id": f"{_TERMS}#SIFImage"},
        "description": "The compute image: its default command is run, without arguments.",
        "softwareVersion": facts.labels.get("org.label-schema.version") or facts.labels.get("Version"),
        "softwareRequirements": {"@id": "#runtime"} if facts.runtime else None,
        "keywords": labels or None,
        "text": facts.runscript or None,
        "abstract": facts.definition or None,
        "url": _address(run, run.image.entity_id),
    }


def _runtime(run: Run) -> Entity:
    name, _, version = run.image_facts.runtime.partition(" version ")
    if not run.image_facts.runtime:
        return {}
    return {
        "@id": "#runtime",
        "@type": "SoftwareApplication",
        "name": name,
        "softwareVersion": version or None,
        "url": "https://apptainer.org",
    }


def _result(run: Run, result: Result) -> Entity:
    return {
        "@id": quote(result.path),
        "@type": "File",
        "name": result.path.rpartition("/")[2],
        "description": "What the run wrote to its standard streams." if result.is_log else None,
        "identifier": result.revision_id,
        "contentSize": str(result.size),
        "sha256": result.sha256,
        "encodingFormat": result.content_type,
        "url": _address(run, result.revision_id),
    }


def _people(run: Run) -> list[Entity]:
    """Return who asked for the run and the operators, each once; without either the agent acted by itself."""
    found: dict[str, Entity] = {}
    asked = [(run.requested_by, "asked for the run")] if run.requested_by else []
    for person, role in (*asked, *((operator, "operator of the Activity") for operator in run.operators)):
        found.setdefault(
            person.id,
            {
                "@id": f"#person-{quote(person.id, safe='')}",
                "@type": "Person",
                "name": person.name or person.id,
                "identifier": person.id,
                "description": role,
            },
        )
    return list(found.values())


def _software(run: Run) -> Entity:
    return {
        "@id": "#agent",
        "@type": "SoftwareApplication",
        "name": "Ovation compute agent",
        "softwareVersion": run.agent_version,
        "url": "https://ovation.io",
    }


def _amount(run: Run, name: str, value: float, unit: str) -> Entity:
    return {
        "@id": f"#run-{run.job_id}-{quote(name.replace(' ', '-'), safe='')}",
        "@type": "PropertyValue",
        "name": name,
        "propertyID": f"ovation:{name.replace(' ', '_')}",
        "value": f"{value:g}" if isinstance(value, float) else str(value),
        "unitText": unit,
    }


def _environment(run: Run) -> list[Entity]:
    """Return what the run's surroundings were, as named values."""
    facts = [
        ("command line", " ".join(_quoted(word) for word in run.command)),
        ("exit code", "" if run.exit_code is None else str(run.exit_code)),
        ("executor", run.executor),
        ("scheduler's job", run.native_id if run.executor == "slurm" else ""),
        ("started by", run.trigger),
        ("start of the container", str(run.launch)),
        *((f"note {number}", note) for number, note in enumerate(run.notes, 1)),
    ]
    return [
        {
            "@id": f"#environment-{quote(name.replace(' ', '-'), safe='')}",
            "@type": "PropertyValue",
            "name": name,
            "value": value,
        }
        for name, value in facts
        if value
    ]


def _quoted(word: str) -> str:
    return word if word and all(c.isalnum() or c in "-_./=,:+@%" for c in word) else f"'{word}'"


def _references(entities: Iterable[Entity]) -> list[Entity]:
    return [{"@id": entity["@id"]} for entity in entities]


def _lean(entity: Entity) -> Entity:
    return {name: value for name, value in entity.items() if value is not None and value != []}
