"""Several scenarios at the same time: they mostly wait, each in a harness of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping


async def at_once(scenarios: Mapping[str, Coroutine[None, None, None]]) -> None:
    """Play scenarios, by name, to the end of each.

    Raises:
        AssertionError: it says which failed, and why.
    """
    ends = await asyncio.gather(*scenarios.values(), return_exceptions=True)
    failed = {name: end for name, end in zip(scenarios, ends, strict=True) if end is not None}
    if failed:
        told = "\n".join(f"{name}: {end!r}" for name, end in failed.items())
        raise AssertionError(told) from next(iter(failed.values()))
