"""The sandbox's decisions that need no sockets: signatures, ranges over parts, webhook addresses, faults."""

from __future__ import annotations

import calendar
import time
from urllib.parse import quote

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from agent.sandbox.errors import S3Error
from agent.sandbox.faults import FaultBook
from agent.sandbox.objects import Blob
from agent.sandbox.outbox import substituted
from agent.sandbox.s3_objects import _slices
from agent.sandbox.signatures import Credential, presign, verify

CREDENTIAL = Credential("ASIAKEY", "secret", "token", None, None, None)
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


def find(access_key: str) -> Credential | None:
    return CREDENTIAL if access_key == CREDENTIAL.access_key else None


@given(key=KEYS, ahead=st.integers(0, 59))
def test_a_presigned_url_holds_for_any_key_while_it_lasts(key: str, ahead: int) -> None:
    now = 1_800_000_000.0
    url = presign(CREDENTIAL, "GET", "http://127.0.0.1:1", "bucket", key, now, 60)
    target = url.removeprefix("http://127.0.0.1:1")
    verify("GET", target, CaseInsensitive({"Host": "127.0.0.1:1"}), find, lambda: now + ahead)
    with pytest.raises(S3Error, match="Request has expired"):
        verify("GET", target, CaseInsensitive({"Host": "127.0.0.1:1"}), find, lambda: now + 61)
    for method, changed, host in (
        ("PUT", target, "127.0.0.1:1"),
        ("GET", target.replace("/bucket/", "/bucket/x"), "127.0.0.1:1"),
        ("GET", target, "127.0.0.1:2"),
    ):
        with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
            verify(method, changed, CaseInsensitive({"Host": host}), find, lambda: now)


@given(key=KEYS, value=st.text("abc %/+=&é", max_size=10), header=st.text("ab, cd", max_size=10))
def test_a_header_signature_of_botocores_holds(key: str, value: str, header: str) -> None:
    url = f"http://127.0.0.1:1/bucket/{quote(key, safe='/~')}?prefix={quote(value, safe='-_.~')}&uploads"
    request = AWSRequest("POST", url, headers={"x-amz-meta-a": header, "Host": "127.0.0.1:1"})
    S3SigV4Auth(Credentials("ASIAKEY", "secret", "token"), "s3", "us-east-1").add_auth(request)
    signed_at = calendar.timegm(time.strptime(request.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ"))
    headers = CaseInsensitive(dict(request.headers.items()))
    target = url.removeprefix("http://127.0.0.1:1")
    verify("POST", target, headers, find, lambda: signed_at)
    headers["x-amz-meta-a"] = header + "x"
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        verify("POST", target, headers, find, lambda: signed_at)


class CaseInsensitive(dict[str, str]):
    """Headers as aiohttp gives them: found whatever their case."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__({name.lower(): value for name, value in headers.items()})

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def get(self, name: str, default: str = "") -> str:  # type: ignore[override]  # a header is a string
        return super().get(name.lower(), default)


@given(sizes=st.lists(st.integers(0, 20), max_size=6), data=st.data())
def test_a_range_over_parts_is_that_range(sizes: list[int], data: st.DataObject) -> None:
    whole = bytes(range(sum(sizes)))
    contents, position = [], 0
    for size in sizes:
        contents.append(whole[position : position + size])
        position += size
    blobs = tuple(Blob(str(number), len(content), "") for number, content in enumerate(contents))
    start = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - start))
    slices = _slices(blobs, start, count)
    joined = b"".join(contents[int(blob.file)][offset : offset + length] for blob, offset, length in slices)
    assert joined == whole[start : start + count]
    assert all(length > 0 for _, _, length in slices)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:8080/hooks/:organization_id", "http://h:8080/hooks/7"),
        ("http://h/:name/x?rel=:rel", "http://h/a%2Fb%20c/x?rel=inputs"),
        ("http://h:80", "http://h:80"),
        ("https://h/:unknown/:8080", "https://h/:unknown/:8080"),
    ],
)
def test_fields_are_put_into_a_webhooks_address(url: str, expected: str) -> None:
    assert substituted(url, {"organization_id": 7, "name": "a/b c", "rel": "inputs"}) == expected


def test_the_first_fault_that_matches_is_used_as_often_as_ordered() -> None:
    book = FaultBook()
    book.add("status", "^GET /a", times=1, status=500)
    book.add("latency", "/a", target="store", skip=1, seconds=1.0)
    kinds = [found and found.kind for found in (book.match("store", "GET", "/a") for _ in range(4))]
    assert kinds == ["status", None, "latency", "latency"]
    assert book.match("api", "GET", "/a") is None
    assert book.match("store", "PUT", "/b") is None
    book.remove()
    assert book.match("store", "GET", "/a") is None


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"kind": "nonsense"},
        {"kind": "status", "path": "("},
        {"kind": "status", "target": "moon"},
        {"kind": "drop", "target": "api"},
        {"kind": "status", "target": "webhooks"},
        {"kind": "status", "colour": "red"},
    ],
)
def test_a_fault_that_is_none_is_refused(document: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"."):
        FaultBook().add_document(document)
