"""What can go wrong, by the party that caused it.

    AgentError
    ├── ConfigurationError      a setting is missing, unreadable or contradicts another
    ├── DatabaseError           PostgreSQL: away, or its schema is not the one that the program needs
    ├── OvationError            Ovation's API
    │   ├── OvationUnavailable      away, overloaded, or answering with a fault of its own   (transient)
    │   ├── OvationRefused          the token is not accepted                                (permanent)
    │   └── OvationNotFound         no such entity, or not for this token                    (permanent)
    ├── StorageError            the object store, or the server behind a remote Revision
    │   ├── StorageUnavailable      away, slow, or broken off                                (transient)
    │   ├── StorageMismatch         the bytes cannot be had as promised                      (transient, counted)
    │   ├── StorageExpired          upload credentials that are good no longer               (permanent)
    │   └── StorageRefused          credentials or address refused                           (permanent)
    └── ExecutorError           Apptainer, or the machine that it runs on
        ├── ExecutorUnavailable     the machine cannot start containers now                  (transient)
        └── ImageError              the image is at fault                                    (permanent)

Adapters translate a library's errors into these at one place each. Anything else that is raised is a bug in the
agent and is treated as one.
"""

from __future__ import annotations


class AgentError(Exception):
    """The root. `transient` says whether the same call may succeed later with nothing changed."""

    transient: bool = False


class ConfigurationError(AgentError):
    """A setting is missing, unreadable or contradicts another; the message names the key and the remedy."""


class DatabaseError(AgentError):
    """PostgreSQL is away, or its schema is not the one that the program needs."""


class OvationError(AgentError):
    """Ovation's API answered with an error; `status` is the HTTP status, `None` without an answer."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class OvationUnavailable(OvationError):
    """Ovation is away, overloaded, or answers with a fault of its own.

    `retry_after_seconds` is how long it asks to be left alone; `not_done` says that the request was certainly not
    carried out, so that even what must not happen twice may be asked for again. `away`: no call gets through, and a
    circuit looks out for its return (`agent.adapters.circuit`); otherwise it may be this one request that fails.
    """

    transient = True
    away = False

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_seconds: float | None = None,
        not_done: bool = False,
    ) -> None:
        super().__init__(message, status=status)
        self.retry_after_seconds = retry_after_seconds
        self.not_done = not_done


class OvationRefused(OvationError):
    """Ovation does not accept the token, or the token may not do this."""


class OvationNotFound(OvationError):
    """Ovation has no such entity, or hides it from this token."""


class StorageError(AgentError):
    """The object store, or the server behind a remote Revision."""


class StorageUnavailable(StorageError):
    """The store is away, slow, or broke off; `retry_after_seconds` and `away` as in `OvationUnavailable`."""

    transient = True
    away = False

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class StorageMismatch(StorageError):
    """The bytes cannot be had as promised: another try may help, endless tries will not.

    They are not the ones promised, their address has expired, or a stranger's server is away: unlike Ovation's own
    object store it may never come back, so its absence is counted and not waited out.
    """

    transient = True


class StorageExpired(StorageError):
    """The store takes these upload credentials no longer, or never did: it takes a new Revision to get others."""


class StorageRefused(StorageError):
    """The store refused the credentials, or the address is not one that may be read."""


class ExecutorError(AgentError):
    """Apptainer, or the machine that it runs on."""


class ExecutorUnavailable(ExecutorError):
    """Containers cannot be started now; the message says why and what to do.

    `party` is what is away when it is not this machine's runtime; `away`: whoever found that out has told of it.
    """

    transient = True
    away = False

    def __init__(self, message: str, *, party: str | None = None, away: bool = False) -> None:
        super().__init__(message)
        self.party = party
        self.away = away


class ImageError(ExecutorError):
    """The image is at fault: not an image, truncated, or without a default command."""
