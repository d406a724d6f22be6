"""Buckets and lists of objects, as far as s5cmd and other tools need them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote

from aiohttp import web

from agent.sandbox.errors import S3Error
from agent.sandbox.objects import StoredObject
from agent.sandbox.s3_xml import Node, read_xml, timestamp, xml_response
from agent.sandbox.settings import BUCKET, REGION

if TYPE_CHECKING:
    from agent.sandbox.s3 import Call

MAXIMUM_KEYS = 1000


async def list_buckets(_call: Call) -> web.StreamResponse:
    """List the one bucket."""
    bucket: Node = ("Bucket", [("Name", BUCKET), ("CreationDate", timestamp(0))])
    return xml_response("ListAllMyBucketsResult", [("Buckets", [bucket])])


async def head_bucket(_call: Call) -> web.StreamResponse:
    """Say that the bucket is there."""
    return web.Response(headers={"x-amz-bucket-region": REGION})


async def location(_call: Call) -> web.StreamResponse:
    """Name the bucket's region; us-east-1 is the empty one."""
    return xml_response("LocationConstraint", [])


async def delete_objects(call: Call) -> web.StreamResponse:
    """Delete many objects; all of them count as deleted, whether or not they were there."""
    document = await read_xml(call.request)
    keys = [element.findtext("Key") or "" for element in document.iter("Object")]
    if not keys or len(keys) > MAXIMUM_KEYS or not all(keys):
        raise S3Error(400, "MalformedXML", f"Between 1 and {MAXIMUM_KEYS} keys are needed")
    for key in keys:
        call.store.delete(call.bucket, key)
    quiet = document.findtext("Quiet") == "true"
    return xml_response("DeleteResult", [] if quiet else [("Deleted", [("Key", key)]) for key in keys])


async def list_objects(call: Call) -> web.StreamResponse:
    """List objects and common prefixes, version 1 and 2."""
    query = call.query
    second = query.get("list-type") == "2"
    after = query.get("start-after", "") if second else query.get("marker", "")
    token = query.get("continuation-token")
    if second and token is not None:
        after = _read_token(token)
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    wanted = query.get("max-keys", "")
    limit = min(int(wanted), MAXIMUM_KEYS) if wanted.isdigit() else MAXIMUM_KEYS
    entries: list[StoredObject | str] = []
    last, truncated = after, False
    for entry, position in _entries(call, prefix, delimiter, after):
        if len(entries) == limit:
            truncated = True
            break
        entries.append(entry)
        last = position

    def shown(text: str) -> str:
        return quote(text, safe="/") if query.get("encoding-type") == "url" else text

    nodes: list[Node] = [
        ("Name", call.bucket),
        ("Prefix", shown(prefix)),
        ("Delimiter", shown(delimiter)),
        ("MaxKeys", str(limit)),
        ("IsTruncated", str(truncated).lower()),
    ]
    if "encoding-type" in query:
        nodes.append(("EncodingType", query["encoding-type"]))
    if second:
        nodes.append(("KeyCount", str(len(entries))))
    if truncated:
        nodes.append(("NextContinuationToken", _make_token(last)) if second else ("NextMarker", shown(last)))
    nodes += [_node(entry, shown) for entry in entries]
    return xml_response("ListBucketResult", nodes)


def _entries(call: Call, prefix: str, delimiter: str, after: str) -> Iterator[tuple[StoredObject | str, str]]:
    """Yield objects and common prefixes, each with the position from which a list goes on after it."""
    previous = None
    for stored in call.store.keys(call.bucket, prefix, after):
        head, found, _ = stored.key[len(prefix) :].partition(delimiter) if delimiter else (stored.key, "", "")
        if not found:
            yield stored, stored.key
            continue
        common = prefix + head + delimiter
        # the last character that there is: the list goes on behind everything under the common prefix
        position = common + "\U0010ffff"
        if common != previous and position != after:
            yield common, position
        previous = common


def _node(entry: StoredObject | str, shown: object) -> Node:
    assert callable(shown)  # noqa: S101 - narrows the type for mypy
    if isinstance(entry, str):
        return "CommonPrefixes", [("Prefix", shown(entry))]
    return "Contents", [
        ("Key", shown(entry.key)),
        ("LastModified", timestamp(entry.modified)),
        ("ETag", f'"{entry.etag}"'),
        ("Size", str(entry.size)),
        ("StorageClass", "STANDARD"),
    ]


def _make_token(position: str) -> str:
    return base64.urlsafe_b64encode(position.encode()).decode()


def _read_token(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token.encode()).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise S3Error(400, "InvalidArgument", "The continuation token provided is incorrect") from error
