"""What each address of the agent takes and answers. A test holds this table against the router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.domain.job import State, Verdict
from agent.web import answers
from agent.web.payloads import ORGANIZATION, PAYLOAD_EXAMPLES, WISH_EXAMPLES, Schema
from agent.web.state import MAX_LISTED, MAX_LOG_OFFSET, MAX_SINCE_SECONDS, MAX_TAIL, MOST_ORGANIZATION

_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is no error: its meaning, and the type of its JSON; none: text of the media type `text`."""

    description: str
    type: Any = None
    headers: Mapping[str, Schema] = field(default_factory=dict)
    text: str = "text/plain"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one address. `problems` are names in `PROBLEMS`; `security` lists alternatives."""

    name: str
    tag: str
    summary: str
    answers: Mapping[int, Answer]
    description: str = ""
    problems: tuple[str, ...] = ()
    parameters: tuple[Schema, ...] = ()
    body: Schema | None = None
    security: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """An error: its status, its meaning, and the headers that always come with it."""

    status: int
    description: str
    headers: Mapping[str, Schema] = field(default_factory=dict)


def _header(description: str, **schema: Any) -> Schema:
    return {"description": description, "required": True, "schema": {"type": "string", **schema}}


_CLOSE = {"Connection": _header("The rest of the body is not read.", const="close")}
_RETRY_AFTER = {"Retry-After": _header("Seconds to wait before the next try.", pattern="^[0-9]+$")}
_LOCATION = {"Location": _header("Where the person who asked finds the job.", format="uri-reference")}
_LOG_OFFSET = {"Log-Offset": _header("The number of the first byte that is sent.", pattern="^[0-9]+$")}
_LOG_PROCESS = {"Log-Process": _header("Names the process whose lines these are.", pattern="^[0-9a-f]+$")}
_CHALLENGE = "How to authenticate."

PROBLEMS: dict[str, Problem] = {
    "Unreadable": Problem(400, "The request cannot be read, or a parameter has no such value; the detail says which."),
    "NotTheSender": Problem(
        401, "The credentials of webhooks are missing or wrong.", {"WWW-Authenticate": _header(_CHALLENGE)}
    ),
    "NoBearer": Problem(
        401,
        "The bearer token is missing or not valid.",
        {"WWW-Authenticate": _header(_CHALLENGE, pattern="^Bearer ")},
    ),
    "NotFound": Problem(404, "There is no such thing, or it is not for the caller."),
    "TooSlow": Problem(408, "The body did not come in time.", _CLOSE),
    "Conflict": Problem(409, "It cannot be done as things stand; the detail says why."),
    "TooLarge": Problem(413, "The body is larger than 64 KiB. It is not read to its end.", _CLOSE),
    "Compressed": Problem(415, "The body is compressed. Send it as it is.", _CLOSE),
    "Bug": Problem(500, "A bug of the agent's. Its log says more."),
    "Away": Problem(503, "The database or Ovation is away. Send the request again.", _RETRY_AFTER),
}
# Of what is in no operation: an address or a method that does not exist.
STRANGERS: dict[str, Problem] = {
    "NoSuchMethod": Problem(
        405, "The address does not have this method.", {"Allow": _header("The methods that it has.")}
    ),
}
_BODY_PROBLEMS = ("Unreadable", "TooSlow", "TooLarge", "Compressed", "Bug", "Away")

SECURITY: dict[str, Schema] = {
    "webhookBasic": {
        "type": "http",
        "scheme": "basic",
        "description": "AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD. Ovation's research service sends its key as"
        " both. An agent with AGENT_WEBHOOK_ANONYMOUS takes webhooks without.",
    },
    **{
        f"webhook{name.title()}": {"type": "apiKey", "in": "header", "name": f"webhook-{name}", "description": text}
        for name, text in (
            ("id", "Standard Webhooks: the message's id, the same at each try."),
            ("timestamp", "Standard Webhooks: seconds since 1970, at most five minutes from the agent's clock."),
            ("signature", "Standard Webhooks: `v1,` and the base64 of an HMAC-SHA256; several with spaces between."),
        )
    },
    "person": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A person's Ovation token. It shows what its owner may read, and is not kept.",
    },
    "admin": {
        "type": "http",
        "scheme": "bearer",
        "description": "AGENT_ADMIN_TOKEN, or the one in the data directory.",
    },
}
_WEBHOOK = (("webhookBasic",), ("webhookId", "webhookTimestamp", "webhookSignature"))
_PERSON, _ADMIN = (("person",),), (("admin",),)


def _parameter(place: str, name: str, schema: Schema, description: str) -> Schema:
    found = {"name": name, "in": place, "description": description, "schema": schema}
    return {**found, "required": True} if place == "path" else found


_OVATION_ID = {"$ref": "#/components/schemas/OvationId"}
_JOB = _parameter("path", "id", {"type": "string", "format": "uuid"}, "The job's id.")
_ORG = _parameter("path", "org", ORGANIZATION, f"The organization, 0 to {MOST_ORGANIZATION}; it wins over the body's.")


def _body(schema: str, examples: Mapping[str, Schema]) -> Schema:
    content = {"schema": {"$ref": f"#/components/schemas/{schema}"}, "examples": dict(examples)}
    return {"required": True, "content": {_JSON: content}}


def _webhook(name: str, summary: str, *parameters: Schema, problems: tuple[str, ...] = ()) -> Operation:
    return Operation(
        name,
        "webhooks",
        summary,
        {202: Answer("It is committed; what comes of it is decided later.", answers.Accepted)},
        description="Every form of both generations of Ovation's webhooks. A delivery is a hint: the Activity is read"
        " from Ovation before anything is decided, so late, doubled and reordered ones do no harm.",
        problems=("NotTheSender", *problems, *_BODY_PROBLEMS),
        parameters=parameters,
        body=_body("Payload", PAYLOAD_EXAMPLES),
        security=_WEBHOOK,
    )


_CHANGED = "Tell the agent that something has changed"
_DELETED = "Tell the agent that something was deleted"

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/webhooks/ovation"): _webhook("tell_changed", _CHANGED),
    ("delete", "/webhooks/ovation"): _webhook("tell_deleted", _DELETED),
    ("post", "/webhooks/ovation/{org}"): _webhook(
        "tell_changed_in", f"{_CHANGED} in an organization", _ORG, problems=("NotFound",)
    ),
    ("delete", "/webhooks/ovation/{org}"): _webhook(
        "tell_deleted_in", f"{_DELETED} in an organization", _ORG, problems=("NotFound",)
    ),
    ("post", "/hpc_run"): Operation(
        "hpc_run",
        "people",
        "Start a run, as with the first compute manager",
        {201: Answer("The run is under way; asked again, it is the same.", answers.Started, _LOCATION)},
        description="For whoever can read the Activity and each of its inputs.",
        problems=("NoBearer", "NotFound", "Conflict", *_BODY_PROBLEMS),
        body=_body("Wish", WISH_EXAMPLES),
        security=_PERSON,
    ),
    ("get", "/hpc_run/{job_id}"): Operation(
        "get_hpc_run",
        "people",
        "See how far a run is",
        {200: Answer("The job.", answers.JobAnswer)},
        description="For whoever can read its Activity and each of its inputs.",
        problems=("NoBearer", "NotFound", "Bug", "Away"),
        parameters=(_parameter("path", "job_id", {"type": "string", "format": "uuid"}, "The job's id."),),
        security=_PERSON,
    ),
    ("get", "/api/jobs"): Operation(
        "list_jobs",
        "administration",
        "List jobs, newest first",
        {200: Answer("The jobs.", answers.JobList)},
        problems=("Unreadable", "NoBearer", "Bug", "Away"),
        parameters=(
            _parameter("query", "activity_id", _OVATION_ID, "Only this Activity's."),
            _parameter("query", "project_id", _OVATION_ID, "Only this Project's."),
            _parameter("query", "state", {"enum": list(State)}, "Only those in this state."),
            _parameter("query", "verdict", {"enum": list(Verdict)}, "Only those whose container ended so."),
            _parameter(
                *("query", "since", {"type": "integer", "minimum": 1, "maximum": MAX_SINCE_SECONDS}),
                "Only those that have not ended, or not more than so many seconds ago.",
            ),
            _parameter(
                *("query", "stuck", {"type": "integer", "enum": [0, 1], "default": 0}),
                "1: only those that have not come on for ten minutes, though not because their container runs.",
            ),
            _parameter(
                *("query", "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": 100}),
                "No more than so many.",
            ),
        ),
        security=_ADMIN,
    ),
    ("get", "/api/jobs/{id}"): Operation(
        "get_job",
        "administration",
        "Show a job",
        {200: Answer("The job.", answers.JobAnswer)},
        problems=("NoBearer", "NotFound", "Bug", "Away"),
        parameters=(_JOB,),
        security=_ADMIN,
    ),
    ("get", "/api/jobs/{id}/events"): Operation(
        "list_events",
        "administration",
        "Tell a job's story",
        {200: Answer("Every move with its time.", answers.EventList)},
        problems=("NoBearer", "NotFound", "Bug", "Away"),
        parameters=(_JOB,),
        security=_ADMIN,
    ),
    ("get", "/api/jobs/{id}/logs/{stream}"): Operation(
        "read_log",
        "administration",
        "Read what the container writes",
        {200: Answer("What it wrote so far, or until it ends.", headers=_LOG_OFFSET)},
        problems=("Unreadable", "NoBearer", "NotFound", "Bug", "Away"),
        parameters=(
            _JOB,
            _parameter("path", "stream", {"enum": ["stdout", "stderr"]}, "Which of the two."),
            _parameter(
                *("query", "follow", {"type": "integer", "enum": [0, 1], "default": 0}),
                "1: go on sending until the container ends.",
            ),
            _parameter(
                *("query", "offset", {"type": "integer", "minimum": 0, "maximum": MAX_LOG_OFFSET}),
                "Only from this byte on: whoever was cut off goes on where it had come to.",
            ),
            _parameter(
                *("query", "tail", {"type": "integer", "minimum": 0, "maximum": MAX_TAIL}),
                "Of what is there by now, no more than so many last lines.",
            ),
        ),
        security=_ADMIN,
    ),
    ("post", "/api/jobs/{id}/cancel"): Operation(
        "cancel_job",
        "administration",
        "Ask for a job's end",
        {202: Answer("It is asked for. What the run wrote so far is still delivered.", answers.JobAnswer)},
        problems=("NoBearer", "NotFound", "Conflict", "Bug", "Away"),
        parameters=(_JOB,),
        security=_ADMIN,
    ),
    ("post", "/api/jobs/{id}/rerun"): Operation(
        "rerun_job",
        "administration",
        "Run a job's Activity again with the same image name, as it stands in Ovation now, or exactly",
        {
            200: Answer("A run of the Activity is under way already: this one.", answers.JobAnswer),
            201: Answer("The new job.", answers.JobAnswer),
        },
        problems=("Unreadable", "NoBearer", "NotFound", "Conflict", "Bug", "Away"),
        parameters=(
            _JOB,
            _parameter(
                *("query", "exact", {"type": "integer", "enum": [0, 1], "default": 0}),
                "1: the very Revisions and image of that run, and not today's.",
            ),
        ),
        security=_ADMIN,
    ),
    ("get", "/api/log"): Operation(
        "read_agent_log",
        "administration",
        "Read the agent's own log",
        {
            200: Answer(
                "Its last lines, each a JSON object with its `number`; the oldest come first.",
                headers=_LOG_PROCESS,
                text="application/x-ndjson",
            )
        },
        problems=("Unreadable", "NoBearer", "Bug"),
        parameters=(
            _parameter(
                *("query", "follow", {"type": "integer", "enum": [0, 1], "default": 0}), "1: and those that come."
            ),
            _parameter(
                *("query", "after", {"type": "integer", "minimum": 0, "maximum": MAX_LOG_OFFSET}),
                "Only those after the line of this number.",
            ),
            _parameter(
                *("query", "process", {"type": "string", "pattern": "^[0-9a-f]{1,64}$"}),
                "The `Log-Process` that numbered it: of another process, all lines come.",
            ),
            _parameter(
                *("query", "tail", {"type": "integer", "minimum": 0, "maximum": MAX_TAIL}),
                "Of what is there by now, no more than so many last lines.",
            ),
        ),
        security=_ADMIN,
    ),
    **{
        (method, path): Operation(
            name,
            "administration",
            summary,
            {200: Answer("How it stands now.", answers.Admission)},
            problems=("NoBearer", "Bug", "Away"),
            security=_ADMIN,
        )
        for method, path, name, summary in (
            ("get", "/api/admission", "get_admission", "See whether queued jobs are let in"),
            ("post", "/api/admission/stop", "stop_admission", "Let no queued job in; what was let in goes on"),
            ("post", "/api/admission/start", "start_admission", "Let queued jobs in again"),
        )
    },
    ("get", "/api/jobs/{id}/comparison"): Operation(
        "get_comparison",
        "administration",
        "Compare an exact repetition with the run that it repeats, output by output",
        {200: Answer("Which outputs have the same bytes.", answers.Comparison)},
        problems=("NoBearer", "NotFound", "Conflict", "Bug", "Away"),
        parameters=(_JOB,),
        security=_ADMIN,
    ),
    ("get", "/api/jobs/{id}/provenance"): Operation(
        "get_provenance",
        "administration",
        "Tell the chain of runs that led to a job's outputs",
        {200: Answer("The run, and those whose outputs it had as inputs.", answers.Chain)},
        problems=("NoBearer", "NotFound", "Bug", "Away"),
        parameters=(_JOB,),
        security=_ADMIN,
    ),
    ("get", "/api/activities/{id}"): Operation(
        "get_activity",
        "administration",
        "Say what led to an Activity's runs, or why there is none",
        {200: Answer("The last judgement, what led to it, and the jobs.", answers.ActivityAnswer)},
        problems=("NoBearer", "NotFound", "Bug", "Away"),
        parameters=(_parameter("path", "id", _OVATION_ID, "The Activity's id."),),
        security=_ADMIN,
    ),
    **{
        ("get", path): Operation(
            name, "health", "See whether the agent is there", {200: Answer("It is.", answers.Alive)}, problems=("Bug",)
        )
        for path, name in (("/", "greet"), ("/healthz", "get_health"))
    },
    ("get", "/metrics"): Operation(
        "get_metrics",
        "health",
        "Read the agent's numbers",
        {200: Answer("Prometheus's text format.")},
        problems=("Bug",),
    ),
    ("get", "/readyz"): Operation(
        "get_readiness",
        "health",
        "See whether the agent can work",
        {200: Answer("It can: its database answers, its loops come round, and no work is old.", answers.Readiness)},
        problems=("Bug", "Away"),
    ),
    ("get", "/openapi.json"): Operation(
        "get_openapi",
        "health",
        "Read this document",
        {200: Answer("OpenAPI 3.1.", dict[str, Any])},
        problems=("Bug",),
    ),
}
