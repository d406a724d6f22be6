"""Where a remote Revision's address may lead: out to the internet, and not to what stands inside this network.

Anybody who can make a Revision chooses its address, and whoever runs the name's DNS chooses what it stands for. So
each address that a name resolves to is judged, and the ones judged are the ones that are connected to.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver
from yarl import URL

from agent.errors import StorageRefused

# What an HTTP client may take for an address and hand to the C library, which reads 127.1 and 0177.0.0.1 as loopback.
_LIKE_AN_ADDRESS = re.compile(r"[0-9.]+|.*:.*")
_RESOLVE_SECONDS = 20.0
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_NOT_GLOBAL = (
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # NAT64 of this site's own
    ipaddress.IPv6Network("2002::/16"),  # 6to4, deprecated (RFC 7526); Python's releases disagree about it
    ipaddress.IPv6Network("fec0::/10"),  # site-local, deprecated and still routed
    ipaddress.IPv6Network("3fff::/20"),  # documentation
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class RemoteGuard(AbstractResolver):
    """Resolves names, and refuses those inside this network unless the operator lists them in AGENT_REMOTE_HOSTS."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._inner = DefaultResolver()
        self._allowed = {host.lower().strip("[]").rstrip(".") for host in allowed}

    def check(self, address: URL) -> None:
        """Judge what can be judged without DNS.

        Raises:
            StorageRefused: not an address on the web, or its host is inside this network.
        """
        host = address.host
        if address.scheme not in {"http", "https"} or not host:
            raise StorageRefused("a remote file's address must begin with http:// or https://")
        if self._is_allowed(host) or not _LIKE_AN_ADDRESS.fullmatch(host):
            return
        self._judge(host, host)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve `host`.

        Raises:
            StorageRefused: one of its addresses is inside this network.
        """
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await self._inner.resolve(host, port, family)
        if not self._is_allowed(host):
            for result in found:
                self._judge(host, result["host"])
        return found

    async def close(self) -> None:
        """Close the resolver."""
        await self._inner.close()

    def _is_allowed(self, host: str) -> bool:
        return host.lower().rstrip(".") in self._allowed

    def _judge(self, host: str, address: str) -> None:
        if not _is_on_the_internet(address):
            raise StorageRefused(
                f"the remote file's host {host} is inside this network; an operator may allow it with"
                " AGENT_REMOTE_HOSTS"
            )


def _is_on_the_internet(address: str) -> bool:
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return all(
        each.is_global and not each.is_multicast and not any(each in network for network in _NOT_GLOBAL)
        for each in (number, *_within(number))
    )


def _within(number: Address) -> list[Address]:
    """Return the IPv4 addresses that an IPv6 address stands for at a translator or at a tunnel's end."""
    if isinstance(number, ipaddress.IPv4Address):
        return []
    found = [number.ipv4_mapped, *(number.teredo or ())]
    if number in _NAT64 or number in _IPV4_COMPATIBLE:
        found.append(ipaddress.IPv4Address(int(number) & 0xFFFFFFFF))
    return [each for each in found if each is not None]
