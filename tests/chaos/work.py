"""What the Activities of the chaos suite do: small, but with all that a delivery has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Work:
    """A container's script and what comes of it.

    `commands` are the script's last lines, `outputs` what they leave in /outputs. Each script tells in the same words
    that it began, in its log and in a file to which it appends: a second start would show there.
    """

    commands: str = ""
    outputs: Mapping[str, bytes] = field(default_factory=dict)
    state: str = "succeeded"

    def script(self, name: str) -> str:
        """Return the script of the Activity of that name."""
        return f"""
            echo "{name} begins"; echo "{name} warns" >&2
            echo "{name}" >> /outputs/began
            mkdir -p /outputs/tables/by-day
            cat /inputs/script.sh | wc -l > /outputs/tables/lines
            echo "{name}" > /outputs/tables/by-day/name
            printf '' > /outputs/empty
            {self.commands}
        """

    def files(self, name: str) -> dict[str, bytes]:
        """Return the files that are to be on that Activity, by path."""
        line = f"{name}\n".encode()
        return {
            "stdout.log": f"{name} begins\n".encode(),
            "stderr.log": f"{name} warns\n".encode(),
            "began": line,
            "tables/lines": f"{self.script(name).count(chr(10))}\n".encode(),
            "tables/by-day/name": line,
            "empty": b"",
            **self.outputs,
        }


_LINE = b"0123456789abcdef\n"
_LARGE_BYTES = (16 << 20) + 12_345

SMALL = Work()
"""Takes well under a second."""

LARGE = Work(
    commands=f"yes {_LINE.decode().strip()} | head -c {_LARGE_BYTES} > /outputs/large",
    outputs={"large": (_LINE * (_LARGE_BYTES // len(_LINE) + 1))[:_LARGE_BYTES]},
)
"""Has an output that goes to the object store in two parts."""

LONG = Work(commands="sleep 7")
"""Its container runs for longer than a lease goes without being renewed."""

FAILING = Work(commands="exit 3", state="failed")
"""Ends with an error, and is delivered all the same."""
