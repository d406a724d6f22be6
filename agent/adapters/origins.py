"""Which addresses are Ovation's own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from yarl import URL

from agent.errors import ConfigurationError

UNREADABLE = (ValueError, IndexError)
"""What yarl raises for an address that cannot be read: 1.24 has an IndexError for `https://[]@`."""
_LABEL = re.compile(r"[a-z0-9_-]+")


class Origins:
    """Ovation's own origins (scheme, host and port): the only ones that its token is sent to.

    A host name in `hosts` means https on its usual port; `*.` before it stands for one or more labels.

    Raises:
        ConfigurationError: one of `hosts` is neither a host name nor scheme://host:port.
    """

    def __init__(self, api_url: str, hosts: Sequence[str]) -> None:
        self._own = {_origin(URL(api_url))}
        self._names: set[str] = set()
        self._endings: set[str] = set()
        for host in hosts:
            self._add(host)

    def _add(self, host: str) -> None:
        wildcard = host.startswith("*.")
        name = host.removeprefix("*.")
        try:
            address = URL(name if "://" in name else f"https://{name}")
            origin = _origin(address)
        except UNREADABLE:
            raise _unusable(host) from None
        if "*" in (address.raw_host or "*") or address.path not in {"", "/"} or address.user or address.query_string:
            raise _unusable(host)
        if "://" in name:
            if wildcard:
                raise _unusable(host)
            self._own.add(origin)
        elif address.explicit_port is not None:
            raise _unusable(host)  # a port without a scheme: which of the two is meant is not ours to guess
        else:
            (self._endings if wildcard else self._names).add(str(address.raw_host))

    def __contains__(self, url: URL | str) -> bool:
        try:
            address = URL(url)
            origin = _origin(address)
        except UNREADABLE:
            return False
        if address.raw_user is not None or address.raw_password is not None:
            return False
        if origin in self._own:
            return True
        if address.scheme != "https" or address.port != 443:  # noqa: PLR2004 a bare host name means https
            return False
        # The name as it goes on the wire: what a person sees in an international name may look like another.
        host = str(address.raw_host)
        if host in self._names:
            return True
        labels = host.split(".")
        return all(map(_LABEL.fullmatch, labels)) and any(
            ".".join(labels[start:]) in self._endings for start in range(1, len(labels))
        )


def _origin(address: URL) -> tuple[str, str, int]:
    if address.scheme not in {"http", "https"} or not address.raw_host or address.port is None:
        raise ValueError("not a web address")
    return address.scheme, address.raw_host, address.port


def _unusable(host: str) -> ConfigurationError:
    return ConfigurationError(
        f"OVATION_HOSTS: {host!r} is neither a host name such as files.ovation.io or *.ovation.io"
        " nor an origin such as https://files.example.org:8443"
    )
