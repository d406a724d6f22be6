"""The XML that S3 speaks."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from agent.sandbox.errors import S3Error

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
MAXIMUM_XML_BYTES = 8 * 1024 * 1024

# a tree of elements: (name, text) or (name, [children])
Node = tuple[str, Any]


def timestamp(seconds: float) -> str:
    """Return the time as S3's documents write it."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def xml_response(root: str, children: Iterable[Node], *, namespace: bool = True, **kwargs: Any) -> web.Response:
    """Return an answer with an XML document."""
    element = ET.Element(root, {"xmlns": NAMESPACE} if namespace else {})
    _fill(element, children)
    body = ET.tostring(element, encoding="utf-8", xml_declaration=True)
    return web.Response(body=body, content_type="application/xml", **kwargs)


def error_response(error: S3Error, resource: str, request_id: str, *, head: bool) -> web.Response:
    """Return S3's answer to a refused request; the answer to a HEAD has no body."""
    headers = {**error.headers, "x-amz-request-id": request_id}
    if head:
        return web.Response(status=error.status, headers=headers)
    nodes: list[Node] = [("Code", error.code), ("Message", error.message), *error.fields.items()]
    nodes += [("Resource", resource), ("RequestId", request_id)]
    return xml_response("Error", nodes, namespace=False, status=error.status, headers=headers)


async def read_xml(request: web.Request) -> ET.Element:
    """Return the request's XML document without namespaces; 400 `MalformedXML` when it is none."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > MAXIMUM_XML_BYTES:
            raise S3Error(400, "MaxMessageLengthExceeded", "Your request was too large.")
    message = "The XML you provided was not well-formed or did not validate against our published schema"
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        raise S3Error(400, "MalformedXML", message)
    try:
        root = ET.fromstring(bytes(body))  # noqa: S314 - entities were refused above
    except ET.ParseError as error:
        raise S3Error(400, "MalformedXML", message) from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _fill(element: ET.Element, children: Iterable[Node]) -> None:
    for name, content in children:
        child = ET.SubElement(element, name)
        if isinstance(content, str):
            child.text = content
        else:
            _fill(child, content)
