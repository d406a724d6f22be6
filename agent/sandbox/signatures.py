"""Signature Version 4, checked and made with botocore's own signers (header, presigned URL and chunk signatures)."""

from __future__ import annotations

import calendar
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials

from agent.sandbox.errors import S3Error
from agent.sandbox.settings import REGION, Clock

ALGORITHM = "AWS4-HMAC-SHA256"
TIMESTAMP = "%Y%m%dT%H%M%SZ"
MAXIMUM_SKEW_SECONDS = 900
MAXIMUM_PRESIGNED_SECONDS = 604_800


@dataclass(frozen=True, slots=True)
class Credential:
    """Keys for the store; for one object when `key` is set, until `expires_at` when that is set."""

    access_key: str
    secret_key: str
    session_token: str
    bucket: str | None
    key: str | None
    expires_at: float | None

    def allows(self, bucket: str, key: str) -> bool:
        """Say whether these keys are good for the object; an empty `key` means the bucket itself."""
        return self.key is None or (self.bucket == bucket and bool(key) and self.key == key)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request says about its own signature."""

    access_key: str
    scope: tuple[str, str, str]  # date, region, service
    timestamp: str
    signed_headers: tuple[str, ...]
    signature: str
    session_token: str
    lifetime_seconds: int | None  # of a presigned URL


@dataclass(frozen=True, slots=True)
class Signed:
    """A request whose signature holds, with what the signatures of its chunks are checked with."""

    credential: Credential
    claim: Claim
    signer: Any
    request: Any

    def chunk_signature(self, previous: str, digest: str, *, trailer: bool = False) -> str:
        """Return the signature that a chunk, or the trailer, with that SHA-256 must carry."""
        kind = "TRAILER" if trailer else "PAYLOAD"
        scope = "/".join((*self.claim.scope, "aws4_request"))
        lines = [f"{ALGORITHM}-{kind}", self.claim.timestamp, scope, previous]
        lines += [digest] if trailer else [hashlib.sha256(b"").hexdigest(), digest]
        return str(self.signer.signature("\n".join(lines), self.request))


class _HeaderVerifier(S3SigV4Auth):  # type: ignore[misc]  # botocore publishes no types
    """Signs exactly the headers that the request lists as signed."""

    def headers_to_sign(self, request: Any) -> Any:
        return _lowercase(request.headers)


class _QueryVerifier(S3SigV4QueryAuth):  # type: ignore[misc]  # botocore publishes no types
    def headers_to_sign(self, request: Any) -> Any:
        return _lowercase(request.headers)


def _lowercase(headers: Any) -> Any:
    chosen = HTTPHeaders()
    for name, value in headers.items():
        chosen[name.lower()] = value
    return chosen


def verify(
    method: str,
    target: str,
    headers: Mapping[str, str],
    find: Callable[[str], Credential | None],
    clock: Clock,
) -> Signed:
    """Check a request's signature, credentials and times; `target` is its path and query as on the wire.

    Raises:
        S3Error: as S3 would answer it.
    """
    path, _, query = target.partition("?")
    presigned = "X-Amz-Signature=" in query
    if "AWSAccessKeyId=" in query or headers.get("Authorization", "").startswith("AWS "):
        message = "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256."
        raise S3Error(400, "InvalidRequest", message)
    claim = _presigned_claim(query) if presigned else _header_claim(headers)
    credential = find(claim.access_key)
    if credential is None:
        message = "The AWS Access Key Id you provided does not exist in our records."
        raise S3Error(403, "InvalidAccessKeyId", message, fields={"AWSAccessKeyId": claim.access_key})
    signed = _recompute(method, _canonical(path, query), headers, claim, credential)
    _check_times(claim, clock())
    if not hmac.compare_digest(claim.session_token.encode(), credential.session_token.encode()):
        raise S3Error(400, "InvalidToken", "The provided token is malformed or otherwise invalid.")
    if credential.expires_at is not None and credential.expires_at <= clock():
        raise S3Error(400, "ExpiredToken", "The provided token has expired.")
    return signed


def _canonical(path: str, query: str) -> str:
    """Return path and query with every character encoded the one way that signatures know, as S3 does first."""
    pairs = [part.partition("=") for part in query.split("&") if part and not part.startswith("X-Amz-Signature=")]
    encoded = [f"{_recoded(name, '-_.~')}={_recoded(value, '-_.~')}" for name, _, value in pairs]
    recoded = _recoded(path, "/-_.~")
    return f"{recoded}?{'&'.join(encoded)}" if encoded else recoded


def _recoded(text: str, safe: str) -> str:
    return quote(unquote_to_bytes(text), safe=safe)


def presign(
    credential: Credential, method: str, base_url: str, bucket: str, key: str, signed_at: float, lifetime_seconds: int
) -> str:
    """Return a presigned URL as of the given time."""
    keys = Credentials(credential.access_key, credential.secret_key, credential.session_token)
    signer = S3SigV4QueryAuth(keys, "s3", REGION, expires=lifetime_seconds)
    request = AWSRequest(method=method, url=f"{base_url}/{bucket}/{quote(key, safe='/~')}")
    request.context["timestamp"] = time.strftime(TIMESTAMP, time.gmtime(signed_at))
    # what add_auth does, but with a time of ours
    signer._modify_request_before_signing(request)  # noqa: SLF001
    text = signer.string_to_sign(request, signer.canonical_request(request))
    signer._inject_signature_to_request(request, signer.signature(text, request))  # noqa: SLF001
    return str(request.url)


def _recompute(method: str, target: str, headers: Mapping[str, str], claim: Claim, credential: Credential) -> Signed:
    keys = Credentials(credential.access_key, credential.secret_key, credential.session_token)
    _, region, service = claim.scope
    kind = _HeaderVerifier if claim.lifetime_seconds is None else _QueryVerifier
    signer = kind(keys, service, region)
    chosen = {name: headers[name] for name in claim.signed_headers if name in headers}
    if "host" not in chosen:
        raise S3Error(403, "AccessDenied", "The host header is not signed")
    request = AWSRequest(method=method, url=f"http://{headers['Host']}{target}", headers=chosen)
    request.context["timestamp"] = claim.timestamp
    unsigned = [name for name in headers if name.lower().startswith("x-amz-") and name.lower() not in chosen]
    if unsigned:
        message = "There were headers present in the request which were not signed"
        raise S3Error(403, "AccessDenied", message, fields={"HeadersNotSigned": ", ".join(unsigned)})
    if claim.lifetime_seconds is None and "x-amz-content-sha256" not in chosen:
        raise S3Error(400, "InvalidRequest", "Missing required header for this request: x-amz-content-sha256")
    canonical = signer.canonical_request(request)
    expected = signer.signature(signer.string_to_sign(request, canonical), request)
    if not hmac.compare_digest(str(expected).encode(), claim.signature.encode()):
        message = "The request signature we calculated does not match the signature you provided."
        raise S3Error(403, "SignatureDoesNotMatch", message)
    return Signed(credential, claim, signer, request)


def _header_claim(headers: Mapping[str, str]) -> Claim:
    authorization = headers.get("Authorization", "")
    if not authorization.startswith(ALGORITHM):
        raise S3Error(403, "AccessDenied", "Access Denied")
    pairs = (part.strip().partition("=") for part in authorization[len(ALGORITHM) :].split(","))
    fields = {name: value for name, _, value in pairs}
    timestamp = headers.get("X-Amz-Date", "")
    token = headers.get("X-Amz-Security-Token", "")
    return _claim(fields, timestamp, token, None)


def _presigned_claim(query: str) -> Claim:
    given = dict(parse_qsl(query, keep_blank_values=True))
    if given.get("X-Amz-Algorithm") != ALGORITHM:
        raise S3Error(400, "AuthorizationQueryParametersError", "X-Amz-Algorithm only supports AWS4-HMAC-SHA256")
    lifetime = given.get("X-Amz-Expires", "")
    if not lifetime.isdigit() or not 0 < int(lifetime) <= MAXIMUM_PRESIGNED_SECONDS:
        raise S3Error(400, "AuthorizationQueryParametersError", "X-Amz-Expires must be less than a week (in seconds)")
    fields = {name: given.get(f"X-Amz-{name}", "") for name in ("Credential", "SignedHeaders", "Signature")}
    return _claim(fields, given.get("X-Amz-Date", ""), given.get("X-Amz-Security-Token", ""), int(lifetime))


def _claim(fields: dict[str, str], timestamp: str, token: str, lifetime_seconds: int | None) -> Claim:
    access_key, *scope = fields.get("Credential", "").split("/")
    try:
        time.strptime(timestamp, TIMESTAMP)
        date, region, service, ending = scope
    except ValueError as error:
        raise S3Error(400, "AuthorizationHeaderMalformed", "The authorization header is malformed") from error
    if ending != "aws4_request" or service != "s3" or not timestamp.startswith(date):
        raise S3Error(400, "AuthorizationHeaderMalformed", "The credential scope is malformed")
    if region != REGION:
        message = f"The authorization header is malformed; the region '{region}' is wrong; expecting '{REGION}'"
        raise S3Error(400, "AuthorizationHeaderMalformed", message, fields={"Region": REGION})
    names = tuple(fields.get("SignedHeaders", "").split(";"))
    return Claim(
        access_key, (date, region, service), timestamp, names, fields.get("Signature", ""), token, lifetime_seconds
    )


def _check_times(claim: Claim, now: float) -> None:
    signed_at = calendar.timegm(time.strptime(claim.timestamp, TIMESTAMP))
    if claim.lifetime_seconds is None:
        if abs(now - signed_at) > MAXIMUM_SKEW_SECONDS:
            message = "The difference between the request time and the current time is too large."
            raise S3Error(403, "RequestTimeTooSkewed", message)
    elif now > signed_at + claim.lifetime_seconds:
        raise S3Error(403, "AccessDenied", "Request has expired", fields={"X-Amz-Expires": str(claim.lifetime_seconds)})
    elif signed_at > now + MAXIMUM_SKEW_SECONDS:
        raise S3Error(403, "AccessDenied", "Request is not valid yet")
