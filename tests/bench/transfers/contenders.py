"""Who takes part, each in a process of its own, and what that process used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
_TOOLS = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Used:
    """What one run took. `seconds` without what a Python program takes to start, where it can tell."""

    seconds: float
    whole_seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int
    """What came from the disk; a file that is read again soon comes from the system's cache."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be moved, between where and where."""

    what: str  # download, upload, or deliver: upload with Ovation's calls
    endpoint: str
    ovation: str
    names: Sequence[str]
    sizes: Mapping[str, int]
    source: Path
    certificate: Path
    into: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ovation-bench-")))


# A process's peak memory is no less than that of the one that it was forked from: so a small one forks them.
_LAUNCHER = """
import json, os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
with open(f"/proc/{pid}/io") as io:
    read = {name: int(value) for name, value in (line.split(": ") for line in io)}["read_bytes"]
_, status, usage = os.wait4(pid, 0)
used = {"cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024, "read": read}
os.write(int(sys.argv[1]), json.dumps(used).encode())
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run(who: str, work: Work) -> Used:
    """Have a contender do the work."""
    if who == "s5cmd":
        return _measured(_s5cmd(work), work, input_=_s5cmd_commands(work))
    if who == "curl":
        return _measured(_curl(work), work)
    given = {
        "endpoint": work.endpoint,
        "ovation": work.ovation,
        "names": work.names,
        "sizes": work.sizes,
        "source": str(work.source),
        "into": str(work.into / "out"),
    }
    command = [sys.executable, "-m", "tests.bench.transfers.children", who, work.what]
    return _measured(command, work, input_=json.dumps(given))


def _evict(work: Work) -> None:
    """Have the files read from the disk, so that it shows how often they are."""
    for name in work.names:
        with (work.source / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _s5cmd(work: Work) -> list[str]:
    command = [str(_TOOLS / "s5cmd"), "--endpoint-url", work.endpoint, "--no-verify-ssl", "--log", "error"]
    if len(work.names) > 1:
        return [*command, "run", "/dev/stdin"]
    [name] = work.names
    if work.what == "download":
        return [*command, "cp", f"s3://bench/{name}", f"{work.into}/"]
    return [*command, "cp", str(work.source / name), f"s3://bench/up-{name}"]


def _s5cmd_commands(work: Work) -> str:
    if work.what == "download":
        return "".join(f"cp s3://bench/{name} {work.into}/{name}\n" for name in work.names)
    return "".join(f"cp {work.source / name} s3://bench/up-{name}\n" for name in work.names)


def _curl(work: Work) -> list[str]:
    options = ["curl", "--silent", "--show-error", "--fail", "--cacert", str(work.certificate)]
    lines = [f'url = "{work.endpoint}/bench/{name}"\noutput = "{work.into}/{name}"\n' for name in work.names]
    config = work.into / "curl.txt"
    config.write_text("".join(lines))
    return [*options, "--parallel", "--parallel-max", "16", "--config", str(config)]


def _measured(command: Sequence[str], work: Work, input_: str = "") -> Used:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": work.endpoint,
        "AWS_CA_BUNDLE": str(work.certificate),
        "REQUESTS_CA_BUNDLE": str(work.certificate),
        "SSL_CERT_FILE": str(work.certificate),
        "HOME": str(work.into),
    }
    if work.what != "download":
        _evict(work)
    with ExitStack() as stack:
        given, out, err, report = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(4))
        given.write(input_)
        given.seek(0)
        began = time.perf_counter()
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(report.fileno()), *command]
        process = subprocess.run(
            launcher,
            stdin=given,
            stdout=out,
            stderr=err,
            env=environment,
            cwd=REPOSITORY,
            pass_fds=[report.fileno()],
            check=False,
        )
        whole = time.perf_counter() - began
        for file in (out, err, report):
            file.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{command[:6]} ended with {process.returncode}: {err.read()[-2000:]}")
        used = json.load(report)
        told = json.loads(out.read().splitlines()[-1]) if command[0] == sys.executable else [whole, used["cpu"]]
    return Used(told[0], whole, told[1], used["peak"], used["read"])


__all__ = ["REPOSITORY", "Used", "Work", "run"]
