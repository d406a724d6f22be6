"""PostgreSQL for the tests: the embedded one from the wheel, and Debian's server, each on a socket of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def debian_server() -> Iterator[str]:
    """Run Debian's PostgreSQL on a fresh cluster and yield its address; no TCP port is opened."""
    binaries = _newest_binaries()
    directory = Path(tempfile.mkdtemp(prefix="ovation-pg-", dir="/tmp"))
    prefix: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        account = pwd.getpwnam("postgres")
        os.chown(directory, account.pw_uid, account.pw_gid)
        prefix = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    data = directory / "data"

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*prefix, str(binaries / program), "-D", str(data), *arguments],
            cwd=directory,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the server inherits it: a pipe would never end
            stderr=subprocess.STDOUT,
            check=False,
            timeout=60,
        )
        if done.returncode != 0:
            log = directory / "log"
            raise RuntimeError(f"{program} failed: {log.read_text() if log.exists() else 'no log'}")

    try:
        run("initdb", "--auth=trust", "--username=postgres", "--no-sync")
        run("pg_ctl", "start", "-w", "-l", str(directory / "log"), "-o", f"-c listen_addresses='' -k {directory}")
        try:
            yield f"postgresql://postgres@/postgres?host={directory}"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _newest_binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise RuntimeError("Debian's PostgreSQL server is not installed: config/setup --dev installs it")
    return found[-1].parent


def processor_seconds() -> float:
    """Return the processor time of all of PostgreSQL's processes on this machine."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = entry.read_text().rpartition(")")
            if name.endswith("(postgres"):
                ticks += sum(map(int, rest.split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")
