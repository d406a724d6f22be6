"""PostgreSQL for the tests: the embedded one from the wheel, and Debian's server, each on a socket of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def debian_server() -> Iterator[str]:
    """Run Debian's PostgreSQL on a fresh cluster and yield its address; no TCP port is opened."""
    binaries = _newest_binaries()
    directory = Path(tempfile.mkdtemp(prefix="ovation-pg-", dir="/tmp"))
    prefix = _as_another(directory)
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


@contextmanager
def pooler(server_url: str, mode: str, connections: int) -> Iterator[str]:
    """Run PgBouncer before a server of `debian_server` and yield its address; no TCP port is opened."""
    directory = Path(tempfile.mkdtemp(prefix="ovation-pooler-", dir="/tmp"))
    prefix = _as_another(directory)
    (directory / "users").write_text('"postgres" ""\n')
    (directory / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={server_url.rpartition('host=')[2]} user=postgres\n"
        f"[pgbouncer]\nlisten_addr =\nunix_socket_dir = {directory}\nlisten_port = 6432\nauth_type = any\n"
        f"pool_mode = {mode}\ndefault_pool_size = {connections}\n"
    )
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise RuntimeError("PgBouncer is not installed: config/setup --dev installs it")
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([*prefix, program, str(directory / "pgbouncer.ini")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not (directory / ".s.PGSQL.6432").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer failed: {(directory / 'log').read_text()}")
            time.sleep(0.02)
        database = server_url.partition("?")[0].rpartition("/")[2]
        yield f"postgresql://postgres@/{database}?host={directory}&port=6432"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory, ignore_errors=True)


def _as_another(directory: Path) -> list[str]:
    """Return what a command begins with that refuses to run as root, and give its directory to whom it runs as then."""
    if os.geteuid() != 0:
        return []
    account = pwd.getpwnam("postgres")
    os.chown(directory, account.pw_uid, account.pw_gid)
    return ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]


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
