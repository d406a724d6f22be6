"""A real Slurm cluster of a test's own: munged, slurmctld and two nodes on this machine, in one directory.

With `accounting` also slurmdbd, on a MariaDB of its own.

Nothing of it needs systemd, or a port or a file that anybody else has; whatever it started ends with it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.adapters import runner
from agent.adapters.slurm import SlurmSettings

NODES = ("n1", "n2")
_READY_SECONDS = 30.0
_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={place}/munge.sock
CredType=cred/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/{tracked}
TaskPlugin=task/{task}
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
DefMemPerCPU=10
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,default_queue_depth=1000
ReturnToService=2
MinJobAge={min_job_age}
KillWait=5
SlurmdTimeout={node_timeout}
MaxJobCount=10000
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
AccountingStorageType=accounting_storage/{accounting}
JobCompType=jobcomp/none
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 {shared}
PartitionName=short Nodes=ALL MaxTime=1 State=UP PriorityTier=1 {shared}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 {shared}
"""
_ACCOUNTED = """\
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={place}/munge.sock
"""
_CGROUP = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
"""
_MEMORY = Path("/sys/fs/cgroup/memory")
_SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={place}/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
PidFile={place}/slurmdbd.pid
LogFile={place}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounting
"""
_DATABASE = """
CREATE DATABASE accounting;
CREATE USER slurm@localhost IDENTIFIED BY 'slurm';
CREATE USER slurm@127.0.0.1 IDENTIFIED BY 'slurm';
GRANT ALL ON accounting.* TO slurm@localhost;
GRANT ALL ON accounting.* TO slurm@127.0.0.1;
"""


def is_installed() -> bool:
    """Say whether this machine has Slurm's programs."""
    return all(shutil.which(name, path=_path()) for name in ("sbatch", "slurmctld", "slurmd", "munged"))


def can_keep_memory() -> bool:
    """Say whether Slurm can keep jobs to their memory here, without systemd: by control groups of the first version."""
    return os.access(_MEMORY / "memory.limit_in_bytes", os.W_OK)


class Cluster:
    """A cluster that runs; its parts can be frozen, killed and started again."""

    def __init__(
        self,
        place: Path,
        *,
        min_job_age: int = 300,
        node_timeout: int = 20,
        cpus: int = 16,
        extra: str = "",
        accounting: bool = False,
        keeps_memory: bool = False,
    ) -> None:
        self.place = place
        self._host = socket.gethostname().split(".")[0]
        self._pids: dict[str, int] = {}
        self._accounting, self._keeps_memory = accounting, keeps_memory
        *ports, self._dbd_port, self._database_port = _free_ports(3 + len(NODES))
        (place / "state").mkdir(parents=True)
        (place / "state").chmod(0o700)
        key = place / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        nodes = "".join(
            f"NodeName={name} NodeHostname={self._host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=8000"
            " State=UNKNOWN\n"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        user = self._user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
        conf = _CONF.format(
            host=self._host,
            controller_port=ports[0],
            user=user,
            place=place,
            min_job_age=min_job_age,
            node_timeout=node_timeout,
            shared="OverSubscribe=NO",
            accounting="slurmdbd" if accounting else "none",
            tracked="cgroup" if keeps_memory else "linuxproc",
            task="cgroup" if keeps_memory else "none",
        )
        if keeps_memory:
            (place / "cgroup.conf").write_text(_CGROUP)
        if accounting:
            extra += "\n" + _ACCOUNTED.format(port=self._dbd_port, place=place)
        head, partitions = conf.split("PartitionName=", 1)
        self.conf = place / "slurm.conf"
        self.conf.write_text(f"{head}{extra}\n{nodes}PartitionName={partitions}")

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need in their environment."""
        return {"SLURM_CONF": str(self.conf), "PATH": _path()}

    def start(self) -> None:
        """Start every part and wait until both nodes take jobs."""
        sockets = self.place / "munge.sock"
        self._spawn(
            "munged",
            "munged", "--force", "--foreground", f"--key-file={self.place}/munge.key", f"--socket={sockets}",
            f"--pid-file={self.place}/munged.pid", f"--log-file={self.place}/munged.log",
            f"--seed-file={self.place}/munge.seed", "--num-threads=4",
        )  # fmt: skip
        until(sockets.exists, "munged")
        if self._accounting:
            self._start_database()
            self.start_accounting()
            self.run("sacctmgr", "-i", "add", "cluster", "tests")
        self.start_controller(clean=True)
        for name in NODES:
            self.start_node(name)
        until(self._all_idle, "the nodes")

    def _start_database(self) -> None:
        data, user = self.place / "mariadb", self._user
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--user={user}", f"--datadir={data}", "--skip-test-db",
             "--auth-root-authentication-method=normal"],
            check=True, capture_output=True, env={"PATH": _path()},
        )  # fmt: skip
        at = f"--socket={self.place}/mariadb.sock"
        self._spawn(
            "mariadbd", "mariadbd", "--no-defaults", f"--user={user}", f"--datadir={data}", at,
            "--bind-address=127.0.0.1", f"--port={self._database_port}", "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        ask = ["mariadb", "--no-defaults", "--user=root", at]

        def answers() -> bool:
            return subprocess.run([*ask, "--execute=SELECT 1"], check=False, capture_output=True).returncode == 0

        until(answers, "mariadbd")
        subprocess.run([*ask, f"--execute={_DATABASE}"], check=True, capture_output=True)
        conf = self.place / "slurmdbd.conf"
        conf.write_text(
            _SLURMDBD.format(
                place=self.place, host=self._host, port=self._dbd_port, user=user, database_port=self._database_port
            )
        )
        conf.chmod(0o600)

    def start_accounting(self) -> None:
        """Start slurmdbd."""
        self._spawn("slurmdbd", "slurmdbd", "-D")
        try:
            until(lambda: "rror" not in self.run("sacctmgr", "-n", "show", "cluster"), "slurmdbd", 2 * _READY_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{(self.place / 'slurmdbd.out').read_text()[-2000:]}") from None

    def _all_idle(self) -> bool:
        return sorted(self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N=%T").split()) == [
            f"{n}=idle" for n in NODES
        ]

    def start_controller(self, *, clean: bool = False) -> None:
        """Start slurmctld, with what it saved or without."""
        self._spawn("slurmctld", "slurmctld", "-D", *(["-i", "-c"] if clean else []), "-f", str(self.conf))
        until(lambda: "is UP" in self.run("scontrol", "ping"), "slurmctld")

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._spawn(name, "slurmd", "-D", "-N", name, "-f", str(self.conf))

    def kill(self, part: str) -> None:
        """Kill a part: "slurmctld", "slurmdbd", or a node's slurmd; the jobs that run there go on."""
        pid = self._pids.pop(part)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def freeze(self, part: str) -> None:
        """Stop a part with SIGSTOP."""
        os.kill(self._pids[part], signal.SIGSTOP)

    def thaw(self, part: str) -> None:
        """Let a frozen part go on."""
        os.kill(self._pids[part], signal.SIGCONT)

    def run(self, *command: str, timeout: float = 60) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(
            command, check=False, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        return done.stdout + done.stderr

    def jobs(self) -> dict[str, str]:
        """Return the state of each job that Slurm knows, by its name."""
        lines = self.run("squeue", "-h", "-a", "-t", "all", "-o", "%j %T").splitlines()
        return dict(line.split() for line in lines if line.count(" ") == 1)

    def ids(self, name: str) -> list[str]:
        """Return the ids of the jobs of that name that Slurm knows."""
        return self.run("squeue", "-h", "-a", "-t", "all", "-n", name, "-o", "%i").split()

    def stop(self) -> None:
        """End everything, jobs included."""
        for part in list(self._pids):
            with suppress(ProcessLookupError):
                os.kill(self._pids[part], signal.SIGCONT)
            self.kill(part)
        for pid in self._leftovers():
            runner.send(pid, signal.SIGKILL)
        if self._keeps_memory:
            for path in sorted(_MEMORY.parent.glob("*/slurm_n?/**/"), reverse=True):
                with suppress(OSError):
                    path.rmdir()

    def _leftovers(self) -> Iterator[int]:
        """Return slurmstepd and what else names this directory."""
        mark = os.fsencode(self.place)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes() or mark in (entry / "cmdline").read_bytes():
                    yield int(entry.name)

    def _spawn(self, part: str, *command: str) -> None:
        with (self.place / f"{part}.out").open("ab") as output:
            process = subprocess.Popen(
                command,
                env=self.environment | {"HOME": "/"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._pids[part] = process.pid
        process.returncode = 0  # it is waited for by its pid


@contextmanager
def cluster(**settings: object) -> Iterator[Cluster]:
    """Run a cluster for a while."""
    with tempfile.TemporaryDirectory(prefix="ovation-slurm-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        made = Cluster(Path(directory), **settings)  # type: ignore[arg-type]
        try:
            made.start()
            yield made
        finally:
            made.stop()


def until(condition: Callable[[], bool], what: str, seconds: float = _READY_SECONDS) -> None:
    """Wait until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in time"
        time.sleep(0.05)


def _path(environment: Mapping[str, str] = os.environ) -> str:
    return f"{environment.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def quick(**changes: Any) -> SlurmSettings:
    """Return settings of an executor for tests, which do not wait as long as a site with NFS would."""
    settings = SlurmSettings(
        python=sys.executable, grace_seconds=0.5, kill_seconds=0.5, silence_seconds=3, tick_seconds=0.3
    )
    return replace(settings, **changes)
