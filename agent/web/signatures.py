"""Standard Webhooks: who signed a body, under which id, and when. https://www.standardwebhooks.com has the rules.

The `standardwebhooks` package was looked at and not taken (1.1.0): one malformed signature makes it refuse the good one
beside it, with an exception that it does not document, and it reads times and base64 more loosely than the rules do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
_TOLERANCE_SECONDS = 300
_MESSAGE_ID = re.compile(r"[\x21-\x7e]{1,256}")
_SECONDS = re.compile(r"[0-9]{1,12}")
_DIGEST_BYTES = hashlib.sha256().digest_size


class Unsigned(Exception):
    """A request that no key can vouch for; the message says why and repeats nothing of it."""


@dataclass(frozen=True, slots=True)
class Signed:
    """What the headers of a request claim; nothing of it is to be believed before `vouched`."""

    message_id: str
    timestamp: str
    digests: tuple[bytes, ...]

    def vouched(self, body: bytes, keys: Sequence[bytes]) -> bool:
        """Say whether one of the keys made one of the signatures; each is compared in constant time."""
        content = f"{self.message_id}.{self.timestamp}.".encode() + body
        found = False
        for key in keys:
            expected = hmac.digest(key, content, "sha256")
            for digest in self.digests:
                found |= hmac.compare_digest(expected, digest)
        return found


def read(headers: Mapping[str, str], now: float) -> Signed:
    """Return what a request's headers claim.

    Args:
        headers: the request's.
        now: seconds since 1970.

    Raises:
        Unsigned: a header is missing or unreadable, there is no `v1` signature, or the time is more than five minutes
            off.
    """
    try:
        message_id, timestamp, signatures = headers[ID], headers[TIMESTAMP], headers[SIGNATURE]
    except KeyError:
        raise Unsigned(f"{ID}, {TIMESTAMP} and {SIGNATURE} are needed together") from None
    if not _MESSAGE_ID.fullmatch(message_id):
        raise Unsigned(f"the {ID} is not one word of printable ASCII, of 256 characters at most")
    if not _SECONDS.fullmatch(timestamp):
        raise Unsigned(f"the {TIMESTAMP} is not a number of seconds since 1970")
    if abs(now - int(timestamp)) > _TOLERANCE_SECONDS:
        raise Unsigned(f"the {TIMESTAMP} is more than five minutes from the agent's clock")
    digests = tuple(digest for each in signatures.split(" ") if (digest := _digest(each)))
    if not digests:
        raise Unsigned(f"the {SIGNATURE} has no signature of version v1")
    return Signed(message_id, timestamp, digests)


def _digest(signature: str) -> bytes | None:
    """Return the digest of a `v1` signature; of another version, or a malformed one, nothing."""
    version, _, encoded = signature.partition(",")
    if version != "v1":
        return None
    try:
        digest = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return None
    return digest if len(digest) == _DIGEST_BYTES else None
