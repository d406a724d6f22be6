"""`ovation-agent try`: an image run just as a job would run it."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from agent.trial import ExitCode, try_image
from tests.containers import QUICK, processes_with, until
from tests.images import images, write_script
from tests.integration.test_local_executor import nap

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Said:
    """What a trial printed and returned."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.err = io.BytesIO()
        self.code = -1

    @property
    def stdout(self) -> str:
        return self.out.getvalue().decode()

    @property
    def stderr(self) -> str:
        return self.err.getvalue().decode()


async def trial(
    place: Path, script: str, *, image: Path | None = None, time_limit_seconds: float = 60, force: bool = False
) -> Said:
    write_script(place / "inputs", script)
    said = Said()
    said.code = await try_image(
        image or images().scripted,
        place / "inputs",
        outputs=place / "outputs",
        time_limit_seconds=time_limit_seconds,
        force=force,
        settings=QUICK,
        stdout=said.out,
        stderr=said.err,
    )
    return said


def leftovers() -> list[str]:
    parent = Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 only read
    return [path.name for path in parent.glob("ovation-agent-try-*")]


@pytest.fixture(autouse=True)
def _own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


async def test_a_trial_shows_what_a_job_would_bring(tmp_path: Path) -> None:
    said = await trial(tmp_path, "echo out; echo err >&2; mkdir /outputs/d; echo 12345 > /outputs/d/table.csv")
    assert said.code == 0
    assert said.stdout == "out\n"
    assert "err\n" in said.stderr
    assert "[try] succeeded, exit code 0" in said.stderr
    assert "6  d/table.csv" in said.stderr
    assert str(tmp_path / "outputs") in said.stderr
    assert (tmp_path / "outputs/d/table.csv").read_text() == "12345\n"
    assert leftovers() == []


async def test_the_exit_code_is_the_containers(tmp_path: Path) -> None:
    said = await trial(tmp_path, "echo 'no column mass' >&2; exit 7")
    assert said.code == 7
    assert "[try] failed, exit code 7" in said.stderr
    assert "user_code: The program ended with exit code 7. It said last: no column mass" in said.stderr


async def test_empty_outputs_are_a_warning(tmp_path: Path) -> None:
    said = await trial(tmp_path, "true")
    assert said.code == 0
    assert "warning: /outputs is empty" in said.stderr


async def test_what_a_job_would_leave_out_is_named(tmp_path: Path) -> None:
    said = await trial(tmp_path, "cd /outputs; ln -s /etc/passwd link; mkfifo pipe; echo x > file")
    assert "warning: link is a symbolic link" in said.stderr
    assert "warning: pipe is a named pipe" in said.stderr
    assert "outputs: 1 files" in said.stderr


async def test_related_is_shown_read_only(tmp_path: Path) -> None:
    related = tmp_path / "related"
    related.mkdir()
    related.chmod(0o755)
    (related / "settings.json").write_text("{}")
    (related / "settings.json").chmod(0o644)
    write_script(tmp_path / "inputs", "cat /related/settings.json; touch /related/x")
    said = Said()
    code = await try_image(
        images().scripted, tmp_path / "inputs", related, tmp_path / "o", stdout=said.out, stderr=said.err
    )
    assert code == 1
    assert said.stdout == "{}"
    assert "Read-only file system" in said.stderr


async def test_the_users_directories_are_not_touched(tmp_path: Path) -> None:
    write_script(tmp_path / "inputs", "touch /inputs/new; true")
    before = [(path.name, path.stat().st_uid, path.stat().st_mode) for path in (tmp_path / "inputs").iterdir()]
    await trial(tmp_path, "touch /inputs/new; true")
    assert [(path.name, path.stat().st_uid, path.stat().st_mode) for path in (tmp_path / "inputs").iterdir()] == before


@as_root
async def test_outputs_belong_to_the_caller_afterwards(tmp_path: Path) -> None:
    await trial(tmp_path, "mkdir /outputs/d; echo x > /outputs/d/f; chmod 700 /outputs/d; ln -s /etc/passwd /outputs/l")
    for path in (tmp_path / "outputs", tmp_path / "outputs/d", tmp_path / "outputs/d/f", tmp_path / "outputs/l"):
        assert (path.lstat().st_uid, path.lstat().st_gid) == (0, 0), path
    assert Path("/etc/passwd").stat().st_uid == 0


@as_root
async def test_under_sudo_the_container_runs_as_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "12345")
    monkeypatch.setenv("SUDO_GID", "12346")
    said = await trial(tmp_path, "id -u; id -g; echo x > /outputs/f")
    assert said.stdout.split() == ["12345", "12346"], said.stderr


@as_root
async def test_what_the_container_cannot_read_is_said_beforehand(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs/private.csv").write_text("x")
    (tmp_path / "inputs/private.csv").chmod(0o600)
    said = await trial(tmp_path, "cat /inputs/private.csv")
    assert "cannot read 1 of the files" in said.stderr
    assert "chmod -R a+rX" in said.stderr


async def test_a_used_outputs_directory_needs_force(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/old").write_text("x")
    said = await trial(tmp_path, "echo y > /outputs/new")
    assert said.code == ExitCode.USAGE
    assert "not empty" in said.stderr
    forced = await trial(tmp_path, "echo y > /outputs/new", force=True)
    assert forced.code == 0
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["new", "old"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [("missing", "o", "not a directory"), ("in", "in", "must not write"), ("in", ".", "must not write")],
)
async def test_arguments_that_cannot_be_used(tmp_path: Path, inputs: str, outputs: str, words: str) -> None:
    (tmp_path / "in").mkdir()
    said = Said()
    code = await try_image(
        images().scripted, tmp_path / inputs, outputs=tmp_path / outputs, stdout=said.out, stderr=said.err
    )
    assert code == ExitCode.USAGE
    assert words in said.stderr


async def test_an_outputs_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    said = await trial(tmp_path, "true")
    assert said.code == ExitCode.USAGE


@pytest.mark.parametrize("kind", ["no command", "truncated", "missing"])
async def test_an_image_that_cannot_run(tmp_path: Path, kind: str) -> None:
    image = {
        "no command": images().without_command,
        "truncated": images().truncated,
        "missing": tmp_path / "missing.sif",
    }[kind]
    said = await trial(tmp_path, "true", image=image)
    assert said.code == ExitCode.NOT_RUN
    assert "[try] error:" in said.stderr
    assert leftovers() == []


async def test_the_time_limit(tmp_path: Path) -> None:
    mark = nap()
    said = await trial(tmp_path, f"echo x > /outputs/early; sleep {mark}", time_limit_seconds=1)
    assert said.code == ExitCode.TIME_LIMIT
    assert "time limit of 1 s" in said.stderr
    assert "early" in said.stderr
    assert processes_with(mark) == []


async def test_output_is_live_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    mark = nap()
    write_script(tmp_path / "inputs", f"echo begun; (setsid sleep {mark} &); sleep {mark}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _TRY, str(images().scripted), str(tmp_path / "inputs"), str(tmp_path / "outputs"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.readline() == b"begun\n"
    assert process.returncode is None
    process.send_signal(signal.SIGINT)
    _, stderr = await process.communicate()
    assert process.returncode == ExitCode.CANCELLED
    assert b"[try] cancelled" in stderr
    assert processes_with(mark) == []
    assert leftovers() == []


async def test_a_reader_that_goes_away_ends_the_run(tmp_path: Path) -> None:
    mark = nap()
    write_script(tmp_path / "inputs", f"while true; do echo line; sleep 0.02; done; sleep {mark}")
    read, write = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _TRY, str(images().scripted), str(tmp_path / "inputs"), str(tmp_path / "outputs"),
        stdout=write,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(write)
    assert await asyncio.to_thread(os.read, read, 5) == b"line\n"
    os.close(read)
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == ExitCode.CANCELLED
    assert b"Traceback" not in stderr
    assert leftovers() == []


async def test_much_output_arrives_whole(tmp_path: Path) -> None:
    said = await trial(tmp_path, "seq 1 200000; seq 1 1000 >&2")
    assert said.stdout == "".join(f"{number}\n" for number in range(1, 200_001))
    assert "\n999\n1000\n" in said.stderr


async def test_terminal_control_in_file_names_is_not_passed_on(tmp_path: Path) -> None:
    said = await trial(tmp_path, "printf x > \"/outputs/$(printf 'a\\033[2Jb')\"")
    assert said.code == 0
    assert "\033" not in said.stderr


async def test_nothing_else_is_left_in_the_temporary_directory(tmp_path: Path) -> None:
    await trial(tmp_path, "echo x > /tmp/scratch; echo y > /outputs/y")
    assert list(Path(tempfile.gettempdir()).glob("rootfs-*")) == []
    await until(lambda: leftovers() == [])


_TRY = """
import asyncio, sys
from pathlib import Path
from agent.trial import try_image
image, inputs, outputs = map(Path, sys.argv[1:])
sys.exit(asyncio.run(try_image(image, inputs, outputs=outputs)))
"""
