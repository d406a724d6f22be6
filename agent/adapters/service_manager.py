"""What systemd is told of the agent, through the socket that it names (sd_notify(3)); without one, nothing is.

The protocol is one datagram; the libraries for it bring a compiler or have had no release for years.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


def notify(*assignments: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell the service manager, for instance "READY=1"; return whether there is one that was told."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        channel.sendall("\n".join(assignments).encode())
        return True
    return False


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return how often the service manager wants a sign of life, at least; nothing when it wants none of this process.

    That is half of its limit, as sd_watchdog_enabled(3) advises.
    """
    with suppress(ValueError):
        if int(environment.get("WATCHDOG_PID", os.getpid())) == os.getpid():
            microseconds = int(environment.get("WATCHDOG_USEC", "0"))
            return microseconds / 2_000_000 if microseconds > 0 else None
    return None
