"""Read `/inputs`, write `/outputs`; say on stdout what is being done and on stderr what was left out."""

from __future__ import annotations

import sys
from pathlib import Path

from .inputs import InputError
from .run import analyse


def main() -> int:
    """Return 0 when all outputs were written, 2 when the inputs are at fault."""
    try:
        analyse(Path("/inputs"), Path("/outputs"), say=_say, warn=_warn)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _warn(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
