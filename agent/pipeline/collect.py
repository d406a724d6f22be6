"""Collecting: put the logs, then what the container wrote, on the Activity, each once and verified."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from agent.adapters.executor import Running
from agent.adapters.files import Tree, list_tree
from agent.adapters.redaction import redact_file
from agent.db.jobs import Claim
from agent.db.outputs import Kind
from agent.domain.job import Done, Failed, Fault, FaultClass, NotYet, Outcome, SetAside
from agent.errors import OvationNotFound
from agent.logs import logger
from agent.pipeline.context import Context, Control
from agent.pipeline.delivery import Delivery, Item

_CONTAINER_ENDS_SECONDS = 1.0
_LOGS = ("stdout.log", "stderr.log")
_MOST_NAMED = 20


async def collect(context: Context, claim: Claim, control: Control) -> Outcome:
    """Deliver what there is, whatever the verdict.

    The logs are on the Activity before anything that the container left in `/outputs` is as much as looked at.
    """
    request = await asyncio.to_thread(context.last_run, claim.job)
    if isinstance(await context.executor.status(request), Running):
        await context.executor.cancel(request)
        return NotYet(_CONTAINER_ENDS_SECONDS, "waiting for the container to end")
    fault = await asyncio.to_thread(_explain, request.directory, claim)
    logs = await asyncio.to_thread(_logs, request.directory)
    delivery = None
    if logs:
        delivery = await Delivery.begin(context, claim, control)
        if failed := await _delivered(delivery, control, logs, ()):
            return failed
    tree = await asyncio.to_thread(list_tree, request.outputs)
    if fault is not None:
        return SetAside(fault)
    if delivery is None:
        if not tree.files and not tree.folders:
            return Done()  # it was cancelled before anything began
        delivery = await Delivery.begin(context, claim, control)
    shown = shown_paths((*tree.folders, *(file.path for file in tree.files)))
    outputs = [Item(Kind.OUTPUT, request.outputs, file.path, shown[file.path], file.size) for file in tree.files]
    await delivery.forget_all_but(outputs)
    if failed := await _delivered(delivery, control, outputs, [shown[path] for path in tree.folders]):
        return failed
    await delivery.end()
    return Done(note=_note(replace(tree, skipped=(*tree.skipped, *delivery.unreadable)), delivery.remade))


async def _delivered(
    delivery: Delivery, control: Control, items: Sequence[Item], folders: Sequence[str]
) -> Failed | None:
    """Deliver all of these; return why that is to be tried again soon, if it is."""
    control.progress.files_total += len(items)
    control.progress.bytes_total += sum(item.size for item in items)
    await delivery.make_folders(folders)
    await delivery.deliver(items)
    try:
        delivery.check()
    except OvationNotFound as error:
        # Somebody took away what was there when this try began: the next one makes it anew.
        return Failed(Fault(FaultClass.PLATFORM, str(error)), final=False)
    return None


def shown_paths(paths: Iterable[str]) -> dict[str, str]:
    """Return each path as Ovation can keep it, no two alike; folders come before what is in them.

    A name that is not text keeps its readable part. Where that is another's name too, it gets a mark of its bytes.
    """
    paths = list(paths)
    alike = Counter(map(_printable, paths))
    shown = {"": ""}
    for path in paths:
        parent, _, raw = path.rpartition("/")
        name = _printable(raw)
        if name != raw and alike[_printable(path)] > 1:
            pure = PurePosixPath(name)
            name = f"{pure.stem}.{hashlib.sha256(os.fsencode(raw)).hexdigest()[:8]}{pure.suffix}"
        shown[path] = f"{shown[parent]}/{name}" if parent else name
    return shown


def _logs(directory: Path) -> list[Item]:
    """Return the logs, with nothing in them any more that looks like a secret."""
    found = [name for name in _LOGS if (directory / name).is_file() and not (directory / name).is_symlink()]
    for name in found:
        if redact_file(directory / name):
            logger().info("log_redacted", log=name)
    return [Item(Kind.LOG, directory, name, name, (directory / name).stat().st_size) for name in found]


def _note(tree: Tree, remade: Sequence[str]) -> str | None:
    """Say in the job's story what a person would otherwise miss among the outputs."""
    notes = []
    if remade:
        which = "the run's Folder" if "" in remade else f"the Folder {', '.join(remade[:_MOST_NAMED])}"
        notes.append(f"{which} was gone from Ovation: what was not delivered by then is in another of that name")
    if tree.skipped:
        listed = ", ".join(f"{_printable(path)} ({kind})" for path, kind in tree.skipped[:_MOST_NAMED])
        more = f" and {len(tree.skipped) - _MOST_NAMED} more" if len(tree.skipped) > _MOST_NAMED else ""
        notes.append(f"not delivered, because only regular files that can be read are: {listed}{more}")
    elif not tree.files:
        notes.append("the container left nothing in /outputs")
    return "; ".join(notes) or None


def _explain(directory: Path, claim: Claim) -> Fault | None:
    """Let the person who looks for a log find the reason where there is none; return what is wrong with the files.

    A container that ran has left both logs. Where they are gone, its outputs are too.
    """
    log, job = directory / "stderr.log", claim.job
    fault, words = job.fault, f"the image was not run: {job.fault.message}" if job.fault else ""
    gone = None
    if job.started_at is not None and not (directory / _LOGS[0]).exists():
        gone = Fault(FaultClass.NODE, "What the run wrote is gone from the agent's disk, or is with another machine.")
        fault, words = gone, gone.message
    if fault is not None and not log.exists():
        directory.mkdir(parents=True, exist_ok=True)
        log.write_text(f"ovation-agent: {words}\n")
    return gone


def _printable(path: str) -> str:
    """Return a path as Ovation can keep it: a name that is not text keeps its readable part."""
    return os.fsencode(path).decode(errors="replace")
