"""The object store's front door: who asks, for which object, and for what (path style only)."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from agent.sandbox import s3_listing, s3_multipart, s3_objects
from agent.sandbox.errors import S3Error
from agent.sandbox.faults import FAULT, FaultBook, FaultKind, fault_middleware
from agent.sandbox.objects import ObjectStore
from agent.sandbox.s3_xml import error_response
from agent.sandbox.settings import BUCKET, SandboxSettings
from agent.sandbox.signatures import Credential, Signed, verify

log = structlog.get_logger(__name__)

# query parameters that name a part of S3 that nothing here needs
UNSUPPORTED = frozenset(
    {
        "acl",
        "accelerate",
        "analytics",
        "attributes",
        "cors",
        "encryption",
        "intelligent-tiering",
        "inventory",
        "legal-hold",
        "lifecycle",
        "logging",
        "metrics",
        "notification",
        "object-lock",
        "ownershipControls",
        "policy",
        "policyStatus",
        "publicAccessBlock",
        "replication",
        "requestPayment",
        "restore",
        "retention",
        "select",
        "tagging",
        "torrent",
        "versioning",
        "versions",
        "website",
    }
)


@dataclass(frozen=True, slots=True)
class Call:
    """One verified request."""

    request: web.Request
    signed: Signed
    bucket: str
    key: str
    query: dict[str, str]
    store: ObjectStore
    settings: SandboxSettings


Operation = Callable[[Call], Awaitable[web.StreamResponse]]


def make_application(
    store: ObjectStore,
    find: Callable[[str], Credential | None],
    settings: SandboxSettings,
    faults: FaultBook,
) -> web.Application:
    """Return the object store as an aiohttp application."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.raw_path in {"/healthz", "/healthz/"}:
            return web.json_response({"status": "alive"})
        signed = verify(request.method, request.raw_path, request.headers, find, settings.clock)
        path, _, query = request.raw_path.partition("?")
        bucket, _, key = unquote(path.removeprefix("/")).partition("/")
        given = dict(parse_qsl(query, keep_blank_values=True))
        call = Call(request, signed, bucket, key, given, store, settings)
        if not signed.credential.allows(bucket, key):
            raise S3Error(403, "AccessDenied", "Access Denied")
        if bucket not in {"", BUCKET}:
            raise S3Error(404, "NoSuchBucket", "The specified bucket does not exist", fields={"BucketName": bucket})
        return await choose(request.method, call)(call)

    application = web.Application(middlewares=[_answers, fault_middleware(faults, "store", _refuse)])
    application.router.add_route("*", "/{path:(?s:.*)}", handle)
    return application


def choose(method: str, call: Call) -> Operation:
    """Return what does this request's work.

    Raises:
        S3Error: 501 for a part of S3 that is not here, 405 for a method that does not fit.
    """
    query = call.query
    unsupported = UNSUPPORTED & query.keys()
    if unsupported or "x-amz-copy-source" in call.request.headers:
        name = ", ".join(sorted(unsupported)) or "copy"
        raise S3Error(501, "NotImplemented", f"The sandbox's store does not implement: {name}")
    if not call.key:
        bucket_operations: dict[str, Operation] = {
            "GET": _bucket_get(call),
            "HEAD": s3_listing.head_bucket,
            "POST": s3_listing.delete_objects,
        }
        found = bucket_operations.get(method) if method != "POST" or "delete" in query else None
    elif "uploadId" in query:
        upload_operations: dict[str, Operation] = {
            "PUT": s3_multipart.upload_part,
            "POST": s3_multipart.complete,
            "DELETE": s3_multipart.abort,
            "GET": s3_multipart.list_parts,
        }
        found = upload_operations.get(method)
    elif "uploads" in query:
        found = s3_multipart.create if method == "POST" else None
    else:
        object_operations: dict[str, Operation] = {
            "PUT": s3_objects.put_object,
            "GET": s3_objects.get_object,
            "HEAD": s3_objects.get_object,
            "DELETE": s3_objects.delete_object,
        }
        found = object_operations.get(method)
    if found is None:
        raise S3Error(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")
    return found


def _bucket_get(call: Call) -> Operation:
    if not call.bucket:
        return s3_listing.list_buckets
    if "location" in call.query:
        return s3_listing.location
    if "uploads" in call.query:
        return s3_multipart.list_uploads
    return s3_listing.list_objects


@web.middleware
async def _answers(request: web.Request, handler: Handler) -> web.StreamResponse:
    request_id = secrets.token_hex(8).upper()
    try:
        response = await handler(request)
    except S3Error as error:
        path = request.raw_path.partition("?")[0]
        log.info("store_refused", method=request.method, path=path, status=error.status, code=error.code)
        return error_response(error, path, request_id, head=request.method == "HEAD")
    if not response.prepared:
        response.headers.setdefault("x-amz-request-id", request_id)
    return response


def _refuse(request: web.Request) -> None:
    """Answer what S3 answers when the fault is one of S3's own kinds."""
    fault = request[FAULT]
    if fault.kind is FaultKind.EXPIRED_URL:
        raise S3Error(403, "AccessDenied", "Request has expired")
    codes = {429: "SlowDown", 500: "InternalError", 503: "SlowDown"}
    if fault.kind is FaultKind.STATUS and not fault.body:
        code = codes.get(fault.status, "ServiceUnavailable")
        raise S3Error(fault.status, code, "Please reduce your request rate.", headers=fault.headers)
