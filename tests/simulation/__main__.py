"""Replay a seed: `python -m tests.simulation 123` prints all that happens."""

from __future__ import annotations

import argparse
import sys

from tests.simulation.database import Server
from tests.simulation.place import in_memory
from tests.simulation.schedule import simulate


def main() -> int:
    """Run the schedules of the seeds that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--digest", action="store_true", help="print only what tells one course from another")
    options = parser.parse_args()
    broken = 0
    with in_memory() as directory:
        server = Server(directory)
        try:
            for seed in options.seeds:
                result = simulate(seed, server, directory)
                broken += bool(result.broken)
                sys.stdout.write(f"{result.digest if options.digest else result.report(most_lines=sys.maxsize)}\n")
        finally:
            server.close()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
