"""A simulated machine: containers in memory, which outlive agents and end with the machine; real files on a real disk.

A simulated image is a small JSON document that says what its program does, so that what runs is what was fetched.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from agent.adapters.executor import Ended, Ending, ImageFacts, NotStarted, Running, RunRequest, Status
from agent.domain.resources import Resources
from agent.domain.workdir import MANIFEST
from agent.errors import ExecutorUnavailable, ImageError
from tests.simulation.loop import EPOCH
from tests.simulation.process import Process
from tests.simulation.wire import Broken, Wire
from tests.simulation.world import Party, World

_T = TypeVar("_T")
_CLAIM = "claim"
_EXIT = "exit.json"


@dataclass(frozen=True, slots=True)
class Program:
    """What an image does: for how many seconds, with which exit code, and which files it leaves."""

    seconds: float
    exit_code: int
    outputs: tuple[str, ...]

    def image(self) -> bytes:
        """Return the image."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of(cls, image: bytes) -> Program:
        """Read an image; raises ValueError where it is none."""
        document = json.loads(image)
        return cls(document["seconds"], document["exit_code"], tuple(document["outputs"]))

    def results(self, inputs: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return what it leaves in /outputs, which tells of what was in /inputs."""
        seen = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(inputs.items())]
        return {path: f"{path} from\n{''.join(seen)}".encode() for path in self.outputs}

    def logs(self) -> dict[str, bytes]:
        """Return what it says."""
        return {"stdout.log": b"it has begun\n", "stderr.log": b"" if self.exit_code == 0 else b"it went wrong\n"}


@dataclass(slots=True)
class Container:
    """One start of one container."""

    name: str
    directory: Path
    program: Program
    inputs: dict[str, bytes]
    started_at: float
    time_limit_seconds: float
    native_id: str
    ending: Ending | None = None
    ended_at: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    timer: asyncio.TimerHandle | None = None


class Machine:
    """One host."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self.containers: dict[Path, Container] = {}
        self.starts: Counter[str] = Counter()
        self.losses = 0

    def status(self, request: RunRequest) -> Status:
        """Return what the files in the run's directory say, and what runs."""
        container = self.containers.get(request.directory)
        if container is None or not (request.directory / _CLAIM).exists():
            if container is not None and container.ending is None and request.native_id == container.native_id:
                return _running(container)
            return NotStarted()
        if container.ending is None:
            return _running(container)
        return Ended(
            ending=container.ending,
            exit_code=container.program.exit_code if container.ending is Ending.EXITED else None,
            started_at=_moment(container.started_at),
            finished_at=_moment(container.ended_at or 0.0),
            usage=None,
        )

    def start(self, request: RunRequest) -> Running | Ended:
        """Start the container unless it was started before."""
        status = self.status(request)
        if not isinstance(status, NotStarted):
            return status
        program = Program.of(request.image.read_bytes())
        inputs = {path.name: path.read_bytes() for path in sorted(request.inputs.iterdir()) if path.name != MANIFEST}
        for directory in (request.directory, request.outputs, request.directory / "scratch"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (request.directory / _CLAIM).touch()
        for log in (request.stdout, request.stderr):
            log.touch()
        self.starts[request.name] += 1
        container = Container(
            name=request.name,
            directory=request.directory,
            program=program,
            inputs=inputs,
            started_at=self._world.now,
            time_limit_seconds=request.time_limit_seconds,
            native_id=f"{self.name}/{sum(self.starts.values())}",
        )
        self.containers[request.directory] = container
        self._world.note(self.name, f"{request.name} starts, for {program.seconds:.1f} s")
        seconds, ending = program.seconds, Ending.EXITED
        if program.seconds > request.time_limit_seconds:
            seconds, ending = request.time_limit_seconds, Ending.TIME_LIMIT
        container.timer = self._world.later(seconds, self._end, container, ending)
        return _running(container)

    def cancel(self, request: RunRequest) -> None:
        """Ask for a container's end, which takes a moment."""
        container = self.containers.get(request.directory)
        if container is not None and container.ending is None:
            seconds = self._world.chance.between(0.05, 12, f"cancel {container.name}")
            self._world.later(seconds, self._end, container, Ending.CANCELLED)

    def lose(self, container: Container) -> None:
        """End a container without a trace of how: its runner was killed."""
        self.losses += 1
        self._end(container, Ending.LOST)

    def reboot(self) -> None:
        """End everything."""
        for container in self.running():
            self.lose(container)

    def running(self) -> list[Container]:
        """Return the containers that run."""
        return [each for each in self.containers.values() if each.ending is None]

    def _end(self, container: Container, ending: Ending) -> None:
        if container.ending is not None:
            return
        if container.timer is not None:
            container.timer.cancel()
        container.ending, container.ended_at = ending, self._world.now
        self._world.note(self.name, f"{container.name} {ending}")
        if not container.directory.is_dir():
            self._world.problem(f"{container.name}: its directory was removed while it ran")
        else:
            self._write(container)
        container.changed.set()

    def _write(self, container: Container) -> None:
        for name, content in container.program.logs().items():
            (container.directory / name).write_bytes(content)
        if container.ending is Ending.EXITED:
            for path, content in container.program.results(container.inputs).items():
                target = container.directory / "outputs" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        (container.directory / _EXIT).touch()


class SimulatedExecutor:
    """One agent's way to its machine: the protocol of `agent.adapters.executor.Executor`."""

    def __init__(self, world: World, machine: Machine, process: Process) -> None:
        self._world = world
        self._machine = machine
        self._wire = Wire(world, process, Party.RUNTIME, silence_seconds=30.0)

    async def check(self) -> str:
        """Return the runtime's name."""
        return "simulated"

    async def inspect(self, image: Path) -> ImageFacts:
        """Read an image."""
        try:
            await self._ask("inspect", lambda: Program.of(image.read_bytes()))
        except ValueError:
            raise ImageError("it is not an image") from None
        return ImageFacts({}, "", "simulated")

    async def cannot_keep(self, resources: Resources) -> list[str]:
        """Keep to everything."""
        del resources
        return []

    async def start(self, request: RunRequest) -> Running | Ended:
        """Find the run or start it."""
        return await self._ask(f"start {request.name}", lambda: self._machine.start(request))

    async def status(self, request: RunRequest) -> Status:
        """Return what has become of the run."""
        return await asyncio.to_thread(self._machine.status, request)

    async def wait(self, request: RunRequest, timeout_seconds: float, told: Running | None = None) -> Status:
        """Return the status as soon as the run ends, or after `timeout_seconds`."""
        del told
        status = await self.status(request)
        container = self._machine.containers.get(request.directory)
        if isinstance(status, Running) and container is not None:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await container.changed.wait()
            except TimeoutError:
                pass
            status = await self.status(request)
        return status

    async def cancel(self, request: RunRequest) -> None:
        """Ask the run to end."""
        await asyncio.to_thread(self._machine.cancel, request)

    async def _ask(self, what: str, serve: Callable[[], _T]) -> _T:
        try:
            return await self._wire.ask(what, serve)
        except Broken as broken:
            raise ExecutorUnavailable(f"the runtime does not work: {broken}") from None


def _running(container: Container) -> Running:
    return Running(native_id=container.native_id, started_at=_moment(container.started_at))


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(round(EPOCH + seconds, 6), UTC)
