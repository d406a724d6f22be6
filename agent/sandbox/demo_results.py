"""The end of the demo: the outputs as they are in the sandbox, fetched, checked and shown."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.sandbox.demo_errors import DemoFailed
from agent.sandbox.demo_ovation import Output, Person
from agent.sandbox.demo_screen import Screen, csv_table, printable, size, table_of

EXPECTED = ("regression.csv", "regression.png", "summary.md")
_SHOWN = ("group", "n", "slope", "slope_low", "slope_high", "bootstrap_low", "bootstrap_high", "r_squared")


async def fetch(person: Person, outputs: Sequence[Output], scratch: Path, target: Path) -> dict[str, Path]:
    """Download every output to `scratch`, check it, then put all into `target`; return their paths by name.

    Raises:
        DemoFailed: one is missing or incomplete, its bytes are not what Ovation says, or `target` cannot be written.
    """
    if missing := sorted(set(EXPECTED) - {output.name for output in outputs}):
        raise DemoFailed(f"the Activity has no output {', '.join(missing)}")
    for output in outputs:
        if Path(output.name).name != output.name:
            raise DemoFailed(f"the output {printable(output.name)!r} has a name that is no file name")
        await person.download(output, scratch / output.name)
    try:
        return {output.name: _place(scratch / output.name, target) for output in outputs}
    except OSError as error:
        raise DemoFailed(f"cannot write the outputs to {target}: {error.strerror}") from error


def _place(file: Path, target: Path) -> Path:
    """Copy a file into `target`, which may be on another file system: whole under its name, or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f".{file.name}.part"
    shutil.copyfile(file, partial)
    return partial.replace(target / file.name)


def show_outputs(screen: Screen, outputs: Sequence[Output]) -> None:
    """List the Activity's outputs as Ovation has them."""
    columns = (("Outputs on the Activity", False), ("size", True), ("upload-status", False), ("Revision", False))
    rows = [(output.name, size(output.bytes), output.status, output.revision_id) for output in outputs]
    screen.say("")
    screen.show(table_of("", columns, rows))


def show_results(screen: Screen, job: dict[str, Any], paths: dict[str, Path]) -> None:
    """Show the result as a table, and say where the plot and the text are and how the container ended."""
    screen.say("")
    screen.show(csv_table("Body mass (g) against flipper length (mm)", paths["regression.csv"], _SHOWN))
    screen.say("")
    screen.say(f"Exit code: {job['exit_code']}")
    screen.say(f"Plot:      {paths['regression.png']}")
    screen.say(f"Summary:   {paths['summary.md']}")


def explain_failure(screen: Screen, job: dict[str, Any], errors: str) -> None:
    """Say why a job did not succeed, with the end of the container's standard error."""
    fault = job.get("fault") or {}
    screen.say(f"The job {job['state']}: {fault.get('class', 'no fault')}: {fault.get('message', '')}", "red")
    for line in errors.splitlines()[-20:]:
        screen.say(f"  stderr │ {printable(line)}")
