"""Reporting: close the run. What stays on this machine for a while is its logs and the runner's record."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.adapters.files import remove_tree
from agent.db.jobs import Claim
from agent.domain.job import Done, Outcome
from agent.pipeline.context import Context, Control


async def report(context: Context, claim: Claim, control: Control) -> Outcome:
    """Remove what was delivered or can be fetched again."""
    del control
    root = Path(context.layout(claim.job).root)
    request = context.run_request(claim.job)
    for path in (root / "inputs", root / "related", request.outputs, request.directory / "scratch"):
        await asyncio.to_thread(remove_tree, path)
    return Done()
