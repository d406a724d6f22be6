"""The demo as a person runs it: it ends well, and however it ends nothing is left of it."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from agent.sandbox.sample import image, rootfs

REPOSITORY = Path(__file__).resolve().parents[2]
LINE_SECONDS = 60.0
END_SECONDS = 60.0
SECOND_RUN_SECONDS = 30.0  # twice of what is promised on two cores: other tests run beside it
CONTAINER_LINE = "  │ "
OUTPUTS = {"regression.csv", "regression.png", "summary.md", "stdout.log", "stderr.log", "ro-crate-metadata.json"}


class Demo:
    """A running demo, its output as it comes, and whatever may be left of it."""

    def __init__(self, home: Path, process: subprocess.Popen[bytes]) -> None:
        self.home = home
        self.process = process
        self.output = b""
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until `text` has been shown."""
        with self._changed:
            found = self._changed.wait_for(lambda: text in self.text or self._ended, LINE_SECONDS)
        assert found, f"no {text!r} within {LINE_SECONDS} s:\n{self.text}\n{self.logs()}"
        assert text in self.text, self.text

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        code = self.process.wait(END_SECONDS)
        self._reader.join(END_SECONDS)
        return code

    def left(self) -> list[str]:
        """Return what is left: processes that have to do with the demo's directory, and its files."""
        return [*mentioning(str(self.home)), *(path.name for path in (self.home / "tmp").iterdir())]

    def logs(self) -> str:
        """Return what the demo's programs have logged so far."""
        return "\n".join(path.read_text(encoding="utf-8") for path in self.home.glob("tmp/*/*.log"))

    def _read(self) -> None:
        assert self.process.stdout is not None
        while piece := os.read(self.process.stdout.fileno(), 65536):
            with self._changed:
                self.output += piece
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def mentioning(marker: str) -> list[str]:
    """Return the processes whose command line, environment, directories or open files mention `marker`."""
    return [
        f"process {process.name}: {_read(process / 'cmdline')}"
        for process in Path("/proc").iterdir()
        if process.name.isdecimal() and int(process.name) != os.getpid() and marker in _facts(process)
    ]


def _facts(process: Path) -> str:
    links = [process / "cwd", process / "root", process / "exe"]
    with suppress(OSError):
        links += (process / "fd").iterdir()
    return " ".join([_read(process / "cmdline"), _read(process / "environ"), *map(_target, links)])


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """A cache that the first demo fills with the image."""
    with _short_directory() as directory:
        yield directory


@pytest.fixture
def start(cache: Path) -> Iterator[Callable[..., Demo]]:
    """Start demos, each with a directory for its temporary files; end them should the test not."""
    started: list[Demo] = []

    def begin(*options: str, through: Sequence[str] = (), **environment: str) -> Demo:
        home = Path(stack.enter_context(_short_directory()))
        (home / "tmp").mkdir()
        # Settings of a real agent must not matter.
        real = {"OVATION_API_URL": "https://ovation.invalid", "AGENT_DATABASE_URL": "postgresql://nowhere.invalid/x"}
        real["AWS_PROFILE"] = "of-a-real-account"
        own = {"TMPDIR": str(home / "tmp"), "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(
            [*through, sys.executable, "-m", "agent", "demo", *options],
            cwd=home,
            env=os.environ | real | own | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(Demo(home, process))
        return started[-1]

    with ExitStack() as stack:
        yield begin
        for demo in started:
            if demo.process.poll() is None:
                demo.interrupt()
                demo.end()
            assert demo.process.stdin is not None
            demo.process.stdin.close()
            assert demo.process.stdout is not None
            demo.process.stdout.close()


@contextmanager
def _short_directory() -> Iterator[Path]:
    """Make a directory with a path short enough for a database's socket below it, and remove it."""
    directory = Path(tempfile.mkdtemp(prefix="d-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_the_main_job_is_done_and_nothing_is_left(start: Callable[..., Demo]) -> None:
    demo = start()
    assert demo.end() == 0, demo.text
    results = demo.home / "demo-outputs"
    assert {path.name for path in results.iterdir()} == OUTPUTS
    with (results / "regression.csv").open(encoding="utf-8", newline="") as file:
        assert [row["group"] for row in csv.DictReader(file)] == ["Adelie", "Chinstrap", "Gentoo", "all together"]
    assert (results / "regression.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "wrote regression.png" in (results / "stdout.log").read_text(encoding="utf-8")
    assert "row dropped" in (results / "stderr.log").read_text(encoding="utf-8")
    for stage in ("sandbox", "agent", "upload", "webhook", "staging", "running", "collecting", "outputs"):
        assert f"{stage}: done in" in demo.text
    assert f"{CONTAINER_LINE}read penguins.csv" in demo.text
    assert "Exit code: 0" in demo.text
    assert str(results / "regression.png") in demo.text
    assert demo.left() == []


def test_a_second_run_is_quick(start: Callable[..., Demo]) -> None:
    seconds: list[float] = []
    # The best of three, so that the machine's other work does not count.
    while not seconds or (min(seconds) > SECOND_RUN_SECONDS and len(seconds) < 3):
        started = time.monotonic()
        demo = start()
        assert demo.end() == 0, demo.text
        assert "built before" in demo.text
        seconds.append(time.monotonic() - started)
    assert min(seconds) < SECOND_RUN_SECONDS


@pytest.mark.parametrize(
    "moment", ["sandbox: …", "agent: …", "upload: …", "webhook: …", "staging: …", CONTAINER_LINE, "collecting: …"]
)
def test_an_interrupt_leaves_nothing(start: Callable[..., Demo], moment: str) -> None:
    demo = start()
    demo.wait_for(moment)
    demo.interrupt()
    assert demo.end() == 128 + signal.SIGINT, demo.text
    assert "Traceback" not in demo.text
    assert demo.left() == []


@pytest.mark.parametrize("moment", ["sample image: …  compiling", "sample image: …  packing"])
def test_an_interrupt_while_the_image_is_built_leaves_nothing(
    start: Callable[..., Demo], tmp_path: Path, moment: str
) -> None:
    demo = start(XDG_CACHE_HOME=str(tmp_path))
    demo.wait_for(moment)
    demo.interrupt()
    assert demo.end() == 128 + signal.SIGINT, demo.text
    assert demo.left() == []
    assert mentioning(str(tmp_path)) == []
    assert list((tmp_path / "ovation-agent").iterdir()) == []


def test_termination_is_an_interrupt_too(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for(CONTAINER_LINE)
    demo.interrupt(signal.SIGTERM)
    assert demo.end() == 128 + signal.SIGTERM, demo.text
    assert demo.left() == []


@pytest.mark.parametrize("moment", ["agent: …", CONTAINER_LINE])
def test_two_interrupts_leave_nothing_either(start: Callable[..., Demo], moment: str) -> None:
    demo = start()
    demo.wait_for(moment)
    demo.interrupt()
    demo.wait_for("Stopping")
    demo.interrupt()
    demo.interrupt()
    assert demo.end() == 128 + signal.SIGINT, demo.text
    assert demo.left() == []


def test_control_c_in_a_terminal_leaves_nothing(start: Callable[..., Demo]) -> None:
    in_a_terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    demo = start(through=[sys.executable, "-c", in_a_terminal], TERM="xterm-256color")
    demo.wait_for("│")
    assert demo.process.stdin is not None
    demo.process.stdin.write(b"\x03")
    demo.process.stdin.flush()
    assert demo.end() == 128 + signal.SIGINT, demo.text
    assert demo.left() == []


def test_an_agent_that_dies_is_reported_and_its_container_ended(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for(CONTAINER_LINE)
    (agent,) = [
        int(line.split()[1].rstrip(":"))
        for line in mentioning(str(demo.home))
        if line.rstrip().endswith("-m agent serve")
    ]
    os.kill(agent, signal.SIGKILL)
    assert demo.end() == 1
    assert "error: the agent ended with -9; the end of its log:" in demo.text
    assert demo.left() == []


def test_without_apptainer_the_remedy_is_told(start: Callable[..., Demo], tmp_path: Path) -> None:
    demo = start(PATH=str(tmp_path))
    assert demo.end() == 1
    assert "`make setup` installs Apptainer" in demo.text
    assert demo.left() == []


def test_an_image_that_is_none_is_reported(start: Callable[..., Demo], tmp_path: Path) -> None:
    put_image(tmp_path, lambda path: path.write_bytes(b"not an image"))
    demo = start(XDG_CACHE_HOME=str(tmp_path))
    assert demo.end() == 1, demo.text
    assert "The job failed: image:" in demo.text
    assert not (demo.home / "demo-outputs").exists()
    assert demo.left() == []


def test_a_command_that_fails_is_reported_with_its_logs(start: Callable[..., Demo], tmp_path: Path) -> None:
    put_image(tmp_path, lambda path: build_shell_image(path, "echo half; echo no more ink >&2; exit 3"))
    demo = start(XDG_CACHE_HOME=str(tmp_path))
    assert demo.end() == 1, demo.text
    assert "The job failed: user_code:" in demo.text
    assert "stderr │ no more ink" in demo.text
    assert "exit code 3" in demo.text
    assert "stdout.log" in demo.text
    assert demo.left() == []


def put_image(cache_home: Path, write: Callable[[Path], object]) -> None:
    """Put another image where the demo looks for the one that it has built."""
    cache = cache_home / "ovation-agent"
    cache.mkdir()
    write(image.image_path(cache))


def build_shell_image(target: Path, script: str) -> None:
    """Build an image that has a shell, and `script` as its default command."""
    root = target.with_name("root")
    root.mkdir()
    shell = Path("/bin/sh").resolve()
    rootfs._skeleton(root)
    rootfs._place(shell, root / "bin/sh")
    rootfs._copy_libraries(root, [shell, shell], {})
    runscript = root / ".singularity.d/runscript"
    runscript.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    runscript.chmod(0o755)
    image._pack(image.container_program(), root, target, target.parent)


def test_with_keep_everything_stays_up_until_it_is_stopped(start: Callable[..., Demo]) -> None:
    demo = start("--keep")
    demo.wait_for("In another terminal:")
    (home,) = (demo.home / "tmp").iterdir()
    environment = home / "environment"
    demo.wait_for(f". {environment}")
    assert stat.S_IMODE(environment.stat().st_mode) == 0o600
    settings = dict(
        line.removeprefix("export ").split("=", 1) for line in environment.read_text(encoding="utf-8").splitlines()
    )
    for secret in ("AGENT_ADMIN_TOKEN", "AGENT_WEBHOOK_PASSWORD", "OVATION_TOKEN"):
        assert settings[secret] not in demo.text
        assert not [line for line in mentioning(str(home)) if settings[secret] in line]
    with urllib.request.urlopen(f"http://127.0.0.1:{settings['AGENT_PORT']}/healthz", timeout=10) as answer:
        assert answer.status == 200
    demo.interrupt()
    assert demo.end() == 0, demo.text
    assert mentioning(str(demo.home)) == []
    assert (home / "agent.log").exists()
