"""The demo's one error."""

from __future__ import annotations


class DemoFailed(Exception):
    """The demo cannot go on; the message says what did not happen, and what to do where something can be done."""
