"""What the answers of object stores and of strangers' servers mean, and what they vouch for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn, Protocol

from agent.adapters.circuit import retry_after_seconds
from agent.errors import StorageMismatch, StorageRefused, StorageUnavailable

ERROR_BYTES = 4096
"""So much of an error's body is read."""

_CODE = re.compile(rb"<Code>(\w{1,64})</Code>")
_PLAIN_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_STRONG_ETAG = re.compile(r'"[!#-~]{1,200}"')


class Headers(Protocol):
    """An answer's headers, as aiohttp and the standard library both have them."""

    def get(self, name: str, /) -> str | None:
        """Return a header's value, or nothing."""
        ...


class AddressExpired(StorageUnavailable):
    """The presigned address is good no longer; another one may be asked for."""


class WrongBytes(StorageMismatch):
    """What arrived is not what the object store vouches for."""


@dataclass(frozen=True, slots=True)
class Vouched:
    """What the object store says of an object. `etag` names exactly these bytes, `md5` is theirs, if it says so."""

    etag: str | None
    md5: str | None

    @classmethod
    def by(cls, headers: Headers) -> Vouched:
        """Read it from an answer. An ETag is an MD5 unless the object came in parts or has a key of its own."""
        etag = headers.get("ETag") or ""
        plain = _PLAIN_MD5.fullmatch(etag)
        encrypted_with_a_key = (headers.get("x-amz-server-side-encryption") or "AES256") != "AES256"
        return cls(
            etag=etag if _STRONG_ETAG.fullmatch(etag) else None,
            md5=plain[1] if plain and not encrypted_with_a_key else None,
        )

    def compare(self, md5: str) -> None:
        """Compare with the MD5 of what arrived.

        Raises:
            WrongBytes: it is another.
        """
        if self.md5 is not None and self.md5 != md5:
            raise WrongBytes(f"the bytes that arrived have MD5 {md5}, the object store says {self.md5}")


def code_in(said: bytes) -> str | None:
    """Return S3's own word for an error, from the answer's body."""
    found = _CODE.search(said)
    return None if found is None else found[1].decode()


def refuse(status: int, headers: Headers, said: bytes, *, remote: bool) -> NoReturn:
    """Raise what an answer means that has not the bytes.

    Args:
        status: HTTP's.
        headers: the answer's.
        said: how its body begins.
        remote: the server is a stranger's: its words are not repeated, and its absence is not waited out.
    """
    whose = "its server" if remote else "the object store"
    if status >= 500 or status in {408, 425, 429}:  # noqa: PLR2004 HTTP's own numbers
        if remote:
            raise StorageMismatch(f"{whose} answers {status}")
        seconds = retry_after_seconds(headers.get("Retry-After"), datetime.now(UTC))
        raise StorageUnavailable(f"{whose} answers {status}", retry_after_seconds=seconds)
    if not remote and status in {400, 403} and b"expired" in said.lower():
        raise AddressExpired(f"its address had expired ({whose} answers {status})")
    code = None if remote else code_in(said)
    answer = f"{status} {code}" if code else str(status)
    raise StorageRefused(f"its bytes are not there ({whose} answers {answer})")
