"""Transfers, side by side, in rounds: each contender once a round, in another order each time.

python -m tests.bench.transfers [--quick] [--rounds N] [--rows NAME,NAME] [--json FILE]

Prints medians, and ratios to s5cmd as median (least to most) of the ratios within each round. `seconds` and `CPU s` are
those of the work itself: a Python program's start, some 0.4 s of imports, is left out for all Python contenders,
because the agent starts once and not for each transfer. Memory is the whole process's, and so is what it had read from
the disk: a digest that is computed while the bytes pass has nothing read in a download, and a file once in an upload.

Two contenders are ours with something left out, to show what it costs: `undigested` computes no SHA-256, `unsynced`
leaves it to the system when what it wrote is on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.adapters.traffic import JOB_CONNECTIONS
from tests.bench.transfers.contenders import REPOSITORY, Used, Work, run
from tests.bench.transfers.server import PACE

_EVERYBODY = ("ours", "undigested", "unsynced", "s5cmd", "released", "boto3", "curl")
_WITHOUT_CURL = ("ours", "undigested", "s5cmd", "released", "boto3")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `server` is which of the server's addresses; `goals` say what ours is held to."""

    name: str
    title: str
    what: str
    server: str
    files: str
    contenders: Sequence[str]
    goals: Sequence[tuple[str, Callable[[Figures], float], Callable[[float], bool]]] = ()


class Figures:
    """What the rounds of a row came to."""

    def __init__(self, rounds: Sequence[dict[str, Used]], size: int) -> None:
        self.rounds = rounds
        self.size = size

    def speed(self, over: str) -> float:
        """Return how many times as fast ours is as another: the median of the rounds."""
        return statistics.median(self.ratios("ours", over))

    def ratios(self, who: str, over: str) -> list[float]:
        """Return how many times as fast one is as another in each round."""
        return [each[over].seconds / each[who].seconds for each in self.rounds]

    def cpu(self, over: str) -> float:
        """Return ours CPU time over another's."""
        return statistics.median(each["ours"].cpu_seconds / each[over].cpu_seconds for each in self.rounds)

    def median(self, who: str, field: str) -> float:
        """Return the median of a figure."""
        return float(statistics.median(getattr(each[who], field) for each in self.rounds))

    def of_the_limit(self) -> float:
        """Return ours speed over what its connections may do together."""
        return self.size / self.median("ours", "seconds") / (PACE * JOB_CONNECTIONS)


def _at_least(limit: float) -> Callable[[float], bool]:
    return lambda found: found >= limit


def _at_most(limit: float) -> Callable[[float], bool]:
    return lambda found: found <= limit


ROWS = (
    Row(
        "down", "download 1 GiB, HTTP", "download", "http", "large", _EVERYBODY,
        (
            ("≥ 1.1 x s5cmd's speed", lambda f: f.speed("s5cmd"), _at_least(1.1)),
            ("≤ 1.0 x its CPU", lambda f: f.cpu("s5cmd"), _at_most(1.0)),
        ),
    ),
    Row("down-md5", "the same, with an MD5 to verify", "download", "http", "whole", ("ours", "s5cmd", "released")),
    Row(
        "down-https", "download 1 GiB, HTTPS", "download", "https", "large", _EVERYBODY,
        (("≥ 0.95 x s5cmd's speed", lambda f: f.speed("s5cmd"), _at_least(0.95)),),
    ),
    Row(
        "limited", f"download 1 GiB, {PACE // 1_000_000} MB/s a connection, 20 ms", "download", "limited", "large",
        _WITHOUT_CURL,
        (
            (f"≥ 0.9 x {JOB_CONNECTIONS} connections", lambda f: f.of_the_limit(), _at_least(0.9)),
            ("≥ 5 x the released client's speed", lambda f: f.speed("released"), _at_least(5)),
        ),
    ),
    Row(
        "down-small", "download 2,000 x 64 KiB", "download", "http", "small", _EVERYBODY,
        (
            ("≥ 1.1 x s5cmd's speed", lambda f: f.speed("s5cmd"), _at_least(1.1)),
            ("≥ 2 x the released client's", lambda f: f.speed("released"), _at_least(2)),
        ),
    ),
    Row("down-mix", "download 256 MiB + 20 x 8 MiB + 500 x 64 KiB", "download", "http", "mix", _EVERYBODY),
    Row(
        "up", "upload 1 GiB, HTTP", "upload", "http", "large", _WITHOUT_CURL,
        (
            ("≥ 1.5 x s5cmd's speed", lambda f: f.speed("s5cmd"), _at_least(1.5)),
            ("≥ 2 x the released client's", lambda f: f.speed("released"), _at_least(2)),
            ("≤ 150 MB of memory", lambda f: f.median("ours", "peak_bytes") / 1e6, _at_most(150)),
        ),
    ),
    Row("up-https", "upload 1 GiB, HTTPS", "upload", "https", "large", _WITHOUT_CURL),
    Row(
        "up-small", "upload 2,000 x 64 KiB, the store alone", "upload", "http", "small", ("ours", "s5cmd", "boto3"),
        (("≥ 0.8 x s5cmd's speed", lambda f: f.speed("s5cmd"), _at_least(0.8)),),
    ),
    Row(
        "up-few", "upload 200 x 64 KiB, the store alone", "upload", "http", "few", ("ours", "released"),
        (("≥ 5 x the released client's speed", lambda f: f.speed("released"), _at_least(5)),),
    ),
    Row(
        "deliver", "upload 200 x 64 KiB with Ovation's calls, 20 ms each", "deliver", "http", "few",
        ("ours", "released"),
        (("≥ 10 x the released client's speed", lambda f: f.speed("released"), _at_least(10)),),
    ),
)  # fmt: skip


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of everything, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default="")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    wanted = [row for row in ROWS if not given.rows or row.name in given.rows.split(",")]
    say(f"load average at the start: {os.getloadavg()[0]:.2f}, {os.cpu_count()} processors")
    everything = {}
    with tempfile.TemporaryDirectory(prefix="ovation-bench-") as place, _server(Path(place)) as addresses:
        for row in wanted:
            figures = _measure(row, Path(place), addresses, 1 if given.quick else given.rounds, quick=given.quick)
            everything[row.name] = [{who: asdict(used) for who, used in each.items()} for each in figures.rounds]
            _print(row, figures)
    say(f"load average at the end: {os.getloadavg()[0]:.2f}")
    if given.json:
        given.json.write_text(json.dumps(everything, indent=1))


def _measure(row: Row, place: Path, addresses: dict[str, str], rounds: int, *, quick: bool) -> Figures:
    files = _files(place / "objects", row.files, 8 if quick else 1)
    source = place / "objects"
    found = []
    chance = random.Random(1)  # noqa: S311 repeatable, not secret
    for number in range(rounds + 1):  # the first warms up
        order = list(row.contenders)
        chance.shuffle(order)
        used = {}
        for who in order:
            endpoint, certificate = addresses[row.server], place / "certificate.pem"
            work = Work(row.what, endpoint, addresses["http"], list(files), files, source, certificate)
            try:
                used[who] = run(who, work)
                _check(row, who, work)
            finally:
                shutil.rmtree(work.into)
            os.sync()
        if number or quick:
            found.append(used)
    return Figures(found, sum(files.values()))


def _check(row: Row, who: str, work: Work) -> None:
    """See that a contender did what it was to do."""
    if row.what != "download":
        return
    there = {path.name: path.stat().st_size for path in work.into.rglob("*") if path.name in work.sizes}
    if there != work.sizes:
        raise RuntimeError(f"{who} brought {len(there)} of {len(work.sizes)} files whole")


def _files(directory: Path, kind: str, divisor: int) -> dict[str, int]:
    """Make the objects of a kind, and return their sizes."""
    mib = 1 << 20
    sizes = {
        "large": {"large.bin": 1024 * mib // divisor},
        "whole": {"whole.bin": 1024 * mib // divisor},
        "small": {f"small-{number:04}.csv": 65_536 for number in range(2000 // divisor)},
        "few": {f"small-{number:04}.csv": 65_536 for number in range(200 // divisor)},
        "mix": {
            "mix.bin": 256 * mib // divisor,
            **{f"mid-{number}.bin": 8 * mib for number in range(20 // divisor)},
            **{f"small-{number:04}.csv": 65_536 for number in range(500 // divisor)},
        },
    }[kind]
    for name, size in sizes.items():
        path = directory / name
        if not path.exists():
            piece = os.urandom(min(size, mib))
            with path.open("wb") as file:  # bit by bit: what this process has would count as its children's memory
                for _ in range(max(1, size // mib)):
                    file.write(piece)
    return sizes


@contextmanager
def _server(place: Path) -> Iterator[dict[str, str]]:
    (place / "objects").mkdir()
    certificate, key = place / "certificate.pem", place / "key.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-addext", names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    command = [sys.executable, "-m", "tests.bench.transfers.server", *map(str, (place / "objects", certificate, key))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=REPOSITORY) as server:
        assert server.stdout is not None
        yield json.loads(server.stdout.readline())
        server.kill()


def _print(row: Row, figures: Figures) -> None:
    say(f"\n### {row.title}\n")
    say("| | seconds | MB/s | speed, x s5cmd | CPU s | peak MB | from disk, x the bytes |")
    say("| --- | --- | --- | --- | --- | --- | --- |")
    for who in row.contenders:
        seconds = figures.median(who, "seconds")
        ratio = "-"
        if "s5cmd" in row.contenders:
            ratios = figures.ratios(who, "s5cmd")
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells = (
            who,
            f"{seconds:.2f}",
            f"{figures.size / seconds / 1e6:.0f}",
            ratio,
            f"{figures.median(who, 'cpu_seconds'):.2f}",
            f"{figures.median(who, 'peak_bytes') / 1e6:.0f}",
            f"{figures.median(who, 'read_bytes') / figures.size:.2f}",
        )
        say(f"| {' | '.join(cells)} |")
    for words, measure, is_met in row.goals:
        found = measure(figures)
        say(f"\ngoal {words}: {found:.2f}, {'met' if is_met(found) else 'NOT met'}")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
