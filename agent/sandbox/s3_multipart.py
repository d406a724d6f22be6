"""Multipart uploads: create, upload part, list parts, complete, abort, list uploads."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING

from aiohttp import web

from agent.sandbox.bodies import ALGORITHMS, receive
from agent.sandbox.errors import S3Error
from agent.sandbox.objects import Part, StoredObject, Upload
from agent.sandbox.s3_objects import check_write_conditions, kept_headers, written_headers
from agent.sandbox.s3_xml import Node, read_xml, timestamp, xml_response

if TYPE_CHECKING:
    from agent.sandbox.s3 import Call

MAXIMUM_PARTS = 10_000
CHECKSUM_TYPE = "x-amz-checksum-type"


async def create(call: Call) -> web.StreamResponse:
    """Start a multipart upload; the object's headers are given here."""
    headers = kept_headers(call)
    if call.request.headers.get(CHECKSUM_TYPE):
        headers[CHECKSUM_TYPE] = call.request.headers[CHECKSUM_TYPE].upper()
    upload = call.store.begin_upload(call.bucket, call.key, headers, call.settings.clock())
    answer = {"x-amz-server-side-encryption": headers["x-amz-server-side-encryption"]}
    for name in ("x-amz-checksum-algorithm", CHECKSUM_TYPE):
        if name in call.request.headers:
            answer[name] = call.request.headers[name]
    nodes = [("Bucket", call.bucket), ("Key", call.key), ("UploadId", upload.id)]
    return xml_response("InitiateMultipartUploadResult", nodes, headers=answer)


async def upload_part(call: Call) -> web.StreamResponse:
    """Store one part."""
    number = call.query.get("partNumber", "")
    if not number.isdigit() or not 1 <= int(number) <= MAXIMUM_PARTS:
        message = f"Part number must be an integer between 1 and {MAXIMUM_PARTS}, inclusive"
        raise S3Error(400, "InvalidArgument", message)
    upload = _under_way(call)
    with call.store.writer() as writer:
        checksums = await receive(call.request, call.signed, writer)
        # the upload may have been completed or aborted while the bytes came
        _under_way(call)
        blob = writer.finish()
    call.store.add_part(upload.id, Part(int(number), blob, call.settings.clock(), checksums))
    headers = {"ETag": f'"{blob.md5}"', "x-amz-server-side-encryption": "AES256"}
    return web.Response(headers=headers | {f"x-amz-checksum-{name}": value for name, value in checksums.items()})


async def complete(call: Call) -> web.StreamResponse:
    """Make the listed parts one object; asking again for the same gives the same answer."""
    document = await read_xml(call.request)
    upload = _find(call)
    if upload.completed is not None:
        there = call.store.stat(call.bucket, call.key)
        if there is None or there.etag != upload.completed:
            raise _no_such_upload()
        return _completed(call, there)
    check_write_conditions(call)
    parts = _chosen(call, upload, [_wanted(element) for element in document.iter("Part")])
    digest = hashlib.md5(b"".join(bytes.fromhex(part.blob.md5) for part in parts), usedforsecurity=False)
    stored = StoredObject(
        bucket=call.bucket,
        key=call.key,
        etag=f"{digest.hexdigest()}-{len(parts)}",
        size=sum(part.blob.size for part in parts),
        version=secrets.token_urlsafe(24),
        modified=call.settings.clock(),
        headers={name: value for name, value in upload.headers.items() if name != CHECKSUM_TYPE},
        checksums={} if upload.headers.get(CHECKSUM_TYPE) == "FULL_OBJECT" else _composite(parts),
        blobs=tuple(part.blob for part in parts),
    )
    call.store.finish_upload(upload, stored)
    return _completed(call, stored)


async def abort(call: Call) -> web.StreamResponse:
    """Throw the upload and its parts away."""
    call.store.abort_upload(_under_way(call))
    return web.Response(status=204)


async def list_parts(call: Call) -> web.StreamResponse:
    """List an upload's parts, at most 1,000 at a time."""
    upload = _under_way(call)
    after = _number(call, "part-number-marker", 0)
    limit = min(_number(call, "max-parts", 1000), 1000)
    rest = [part for part in call.store.parts(upload.id) if part.number > after]
    listed = rest[:limit]
    nodes: list[Node] = [
        ("Bucket", call.bucket),
        ("Key", call.key),
        ("UploadId", upload.id),
        ("PartNumberMarker", str(after)),
        ("MaxParts", str(limit)),
        ("IsTruncated", str(len(rest) > len(listed)).lower()),
    ]
    if len(rest) > len(listed) and listed:
        nodes.append(("NextPartNumberMarker", str(listed[-1].number)))
    for part in listed:
        fields: list[Node] = [
            ("PartNumber", str(part.number)),
            ("LastModified", timestamp(part.modified)),
            ("ETag", f'"{part.blob.md5}"'),
            ("Size", str(part.blob.size)),
        ]
        fields += [(f"Checksum{name.upper()}", value) for name, value in part.checksums.items()]
        nodes.append(("Part", fields))
    return xml_response("ListPartsResult", nodes)


async def list_uploads(call: Call) -> web.StreamResponse:
    """List the uploads that are under way."""
    prefix = call.query.get("prefix", "")
    nodes: list[Node] = [("Bucket", call.bucket), ("Prefix", prefix), ("IsTruncated", "false")]
    nodes += [
        ("Upload", [("Key", one.key), ("UploadId", one.id), ("Initiated", timestamp(one.initiated))])
        for one in call.store.uploads(call.bucket, prefix)
    ]
    return xml_response("ListMultipartUploadsResult", nodes)


def _completed(call: Call, stored: StoredObject) -> web.Response:
    headers = written_headers(stored)
    nodes: list[Node] = [
        ("Location", f"http://{call.request.host}{call.request.path}"),
        ("Bucket", call.bucket),
        ("Key", call.key),
        ("ETag", headers.pop("ETag")),
    ]
    nodes += [(f"Checksum{name.upper()}", value) for name, value in stored.checksums.items()]
    if stored.checksums:
        nodes.append(("ChecksumType", "COMPOSITE"))
    return xml_response("CompleteMultipartUploadResult", nodes, headers=headers)


def _wanted(element: object) -> tuple[int, str]:
    fields = {child.tag: (child.text or "").strip() for child in element}  # type: ignore[attr-defined]  # an Element
    if not fields.get("PartNumber", "").isdigit() or "ETag" not in fields:
        raise S3Error(400, "MalformedXML", "Each part needs a PartNumber and an ETag")
    return int(fields["PartNumber"]), fields["ETag"].strip('"')


def _chosen(call: Call, upload: Upload, wanted: list[tuple[int, str]]) -> list[Part]:
    if not wanted:
        raise S3Error(400, "MalformedXML", "You must specify at least one part")
    numbers = [number for number, _ in wanted]
    if numbers != sorted(set(numbers)):
        raise S3Error(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
    there = {part.number: part for part in call.store.parts(upload.id)}
    for number, etag in wanted:
        if number not in there or not hmac.compare_digest(there[number].blob.md5, etag):
            message = "One or more of the specified parts could not be found."
            raise S3Error(400, "InvalidPart", message, fields={"PartNumber": str(number), "ETag": etag})
    parts = [there[number] for number in numbers]
    for part in parts[:-1]:
        if part.blob.size < call.settings.minimum_part_bytes:
            message = "Your proposed upload is smaller than the minimum allowed size"
            fields = {"PartNumber": str(part.number), "ProposedSize": str(part.blob.size)}
            raise S3Error(400, "EntityTooSmall", message, fields=fields)
    return parts


def _composite(parts: list[Part]) -> dict[str, str]:
    """Return the checksums of the parts' checksums, as S3 does for COMPOSITE objects."""
    shared = set.intersection(*(set(part.checksums) for part in parts))
    results = {}
    for name in shared & ALGORITHMS.keys():
        checksum = ALGORITHMS[name]()
        for part in parts:
            checksum.update(base64.b64decode(part.checksums[name]))
        results[name] = f"{checksum.b64digest()}-{len(parts)}"
    return results


def _number(call: Call, name: str, default: int) -> int:
    text = call.query.get(name, "")
    return int(text) if text.isdigit() else default


def _find(call: Call) -> Upload:
    upload = call.store.upload(call.query["uploadId"])
    if upload is None or (upload.bucket, upload.key) != (call.bucket, call.key):
        raise _no_such_upload()
    return upload


def _under_way(call: Call) -> Upload:
    upload = _find(call)
    if upload.completed is not None:
        raise _no_such_upload()
    return upload


def _no_such_upload() -> S3Error:
    message = "The specified upload does not exist. The upload ID may be invalid, or the upload may have been aborted"
    return S3Error(404, "NoSuchUpload", message)
