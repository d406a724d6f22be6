"""Every clause of the container contract, on real Apptainer."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.adapters import apptainer, local, runner
from agent.adapters.executor import Ended, Ending, NotStarted, Running, RunRequest
from agent.adapters.local import LocalExecutor
from agent.domain.container import judge
from agent.domain.job import FaultClass, Verdict
from agent.errors import ExecutorUnavailable, ImageError
from tests.containers import (
    QUICK,
    container_pid,
    finish,
    make_request,
    processes_with,
    run_script,
    runner_pid,
    until,
)
from tests.images import images, make_rootfs, squash, write_script

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the user `nobody`; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory(prefix="ovation-agent-plain-") as directory:
        os.chown(directory, 65534, 65534)
        yield Path(directory)


def close_one(server: socket.socket) -> None:
    server.accept()[0].close()


def names_in(directory: str) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def nap() -> str:
    """Return a number of seconds that no other process sleeps, by which a sleeper is found."""
    return f"{random.randint(100_000, 999_999)}.25"  # noqa: S311 a mark, not a secret


async def test_the_default_command_runs_and_its_outputs_are_kept(tmp_path: Path) -> None:
    outcome = await run_script(tmp_path, "pwd; echo out; echo error >&2; echo 42 > /outputs/answer.txt")
    assert outcome.ended.ending is Ending.EXITED
    assert outcome.ended.exit_code == 0
    assert outcome.stdout == "/outputs\nout\n"
    assert outcome.stderr == "error\n"
    assert (tmp_path / "run-1/outputs/answer.txt").read_text() == "42\n"


async def test_times_and_usage_are_recorded(tmp_path: Path) -> None:
    outcome = await run_script(tmp_path, "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 0.2")
    ended = outcome.ended
    assert ended.usage is not None
    assert ended.started_at is not None
    assert ended.finished_at is not None
    assert 0.2 < ended.usage.wall_seconds < 30
    assert 0 < ended.usage.user_seconds < 30
    assert 1_000_000 < ended.usage.peak_memory_bytes < 4_000_000_000
    assert ended.started_at < ended.finished_at


async def test_inputs_and_related_can_be_read_but_not_written(tmp_path: Path) -> None:
    request = make_request(
        tmp_path,
        "cat /inputs/a /related/b; for d in /inputs /related /data/inputs /data/related; do"
        " touch $d/new && echo WRITTEN; rm -f $d/a $d/b && echo REMOVED; done; true",
    )
    (request.inputs / "a").write_text("from inputs\n")
    (request.related / "b").write_text("from related\n")
    for path in (request.inputs / "a", request.related / "b"):
        path.chmod(0o644)
    outcome = await finish(request)
    assert outcome.stdout.startswith("from inputs\nfrom related\n")
    assert "WRITTEN" not in outcome.stdout
    assert outcome.stderr.count("Read-only file system") >= 4
    assert (request.inputs / "a").exists()
    assert not (request.inputs / "new").exists()


async def test_the_older_images_find_the_same_directories(tmp_path: Path) -> None:
    request = make_request(tmp_path, "cat /data/inputs/script.sh >/dev/null && echo x > /data/outputs/old; ls /data")
    outcome = await finish(request)
    assert outcome.stdout.split() == ["inputs", "outputs", "related"]
    assert (request.outputs / "old").read_text() == "x\n"


async def test_mount_points_leave_nothing_in_host_directories(tmp_path: Path) -> None:
    request = make_request(tmp_path, "true")
    await finish(request)
    assert sorted(path.name for path in request.inputs.iterdir()) == ["script.sh"]
    assert list(request.related.iterdir()) == []
    assert list(request.outputs.iterdir()) == []


async def test_the_image_itself_cannot_be_written(tmp_path: Path) -> None:
    outcome = await run_script(tmp_path, "touch /bin/new /new; true")
    assert outcome.stderr.count("Read-only file system") == 2


@as_root
async def test_the_container_is_not_root_on_the_host(tmp_path: Path) -> None:
    # Opening for appending and writing nothing: the test must do no harm where it fails.
    script = (
        "id -u; id -g; id -G; cat /proc/self/uid_map; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status\n"
        "for f in /proc/sys/kernel/core_pattern /etc/hosts /etc/passwd /proc/sysrq-trigger; do"
        " ( : >> $f ) 2>/dev/null && echo CAN WRITE $f; done; true"
    )
    outcome = await run_script(tmp_path, script)
    assert outcome.stdout.split("\n")[:3] == ["65534", "65534", "65534"]
    assert "CAN WRITE" not in outcome.stdout
    assert "CapBnd:\t0000000000000000" in outcome.stdout
    assert "NoNewPrivs:\t1" in outcome.stdout


@as_root
async def test_a_setuid_program_in_the_image_gains_nothing(tmp_path: Path) -> None:
    rootfs = make_rootfs(tmp_path / "rootfs", "#!/bin/sh\n/bin/raise -u\n")
    raising = rootfs / "bin/raise"
    raising.symlink_to("busybox")
    (rootfs / "bin/busybox").chmod(0o4755)
    (rootfs / ".singularity.d/runscript").write_text("#!/bin/sh\n/bin/busybox id -u\n")
    image = squash(rootfs, tmp_path / "setuid.simg")
    outcome = await finish(make_request(tmp_path / "job", "", image=image))
    assert outcome.stdout.strip() == "65534"


@as_root
async def test_outputs_belong_to_the_containers_user_alone(tmp_path: Path) -> None:
    request = make_request(tmp_path, "touch /outputs/file")
    await finish(request)
    for path in (request.outputs, request.outputs / "file"):
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)
    assert request.outputs.stat().st_mode & 0o777 == 0o700
    assert request.directory.stat().st_mode & 0o777 == 0o700
    assert (request.directory / runner.SPEC).stat().st_mode & 0o777 == 0o600


async def test_nothing_of_the_hosts_environment_comes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OVATION_TOKEN", "APPTAINERENV_LEAK", "SINGULARITYENV_LEAK", "LEAK"):
        monkeypatch.setenv(name, "secret-value")
    monkeypatch.setenv("APPTAINER_BIND", "/usr:/leaked")
    monkeypatch.setenv("SINGULARITY_BIND", "/usr:/leaked")
    outcome = await run_script(tmp_path, "env; ls -d /leaked")
    assert "secret-value" not in outcome.stdout
    assert "/leaked" not in outcome.stdout
    record = (tmp_path / "run-1" / runner.SPEC).read_text()
    assert "secret-value" not in record


async def test_the_runner_has_none_of_the_agents_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVATION_TOKEN", "secret-value")
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, "sleep 100")
    await executor.start(request)
    assert environment_of(runner_pid(request)) == b""
    await executor.cancel(request)
    await executor.wait(request, 30)


async def test_there_is_no_home_and_no_host_directory(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host file")
    outcome = await run_script(tmp_path, f"ls {tmp_path} /home/* $HOME; true")
    assert "secret" not in outcome.stdout
    for entry in Path.home().iterdir():
        assert entry.name not in outcome.stdout.split()


async def test_there_is_no_network_by_default(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"ls /sys/class/net; cat /proc/net/dev; nc -w 1 127.0.0.1 {port} </dev/null && echo REACHED; true"
        outcome = await run_script(tmp_path, script)
    devices = [line.split(":")[0].strip() for line in outcome.stdout.splitlines() if ":" in line]
    assert devices == ["lo"]
    assert "REACHED" not in outcome.stdout


async def test_the_hosts_network_is_there_when_allowed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=close_one, args=[server])
        thread.start()
        outcome = await run_script(tmp_path, f"nc -w 5 127.0.0.1 {port} </dev/null && echo REACHED", network="host")
        thread.join(10)
    assert "REACHED" in outcome.stdout


async def test_temporary_files_are_on_disk_and_gone_afterwards(tmp_path: Path) -> None:
    request = make_request(
        tmp_path,
        "for d in /tmp /var/tmp; do dd if=/dev/zero of=$d/big bs=1M count=100 2>/dev/null || exit 1; done; ls -l /tmp",
    )
    outcome = await finish(request)
    assert outcome.ended.exit_code == 0, outcome.stderr
    assert "104857600" in outcome.stdout
    assert not (request.directory / "scratch").exists()
    assert not (request.directory / "private").exists()


@pytest.mark.parametrize("code", [1, 7, 255])
async def test_exit_codes_pass_through(tmp_path: Path, code: int) -> None:
    outcome = await run_script(tmp_path, f"echo partial > /outputs/partial; echo why >&2; exit {code}")
    assert outcome.ended.ending is Ending.EXITED
    assert outcome.ended.exit_code == code
    assert (tmp_path / "run-1/outputs/partial").exists()
    judgement = judge(outcome.ended.ending, outcome.ended.exit_code, outcome.stderr)
    assert judgement.fault is not None
    assert judgement.fault.cls is FaultClass.USER_CODE
    assert "why" in judgement.fault.message


async def test_a_signal_is_128_and_its_number(tmp_path: Path) -> None:
    outcome = await run_script(tmp_path, "kill -SEGV $$")
    assert outcome.ended.exit_code == 139


async def test_a_container_that_kills_its_own_group_harms_nobody(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK)
    bystander = make_request(tmp_path / "other", "sleep 100")
    await executor.start(bystander)
    outcome = await run_script(tmp_path / "killer", "(sleep 100 &); kill -9 0")
    assert outcome.ended.ending is Ending.EXITED
    assert outcome.ended.exit_code == 137
    assert isinstance(await executor.status(bystander), Running)
    await executor.cancel(bystander)
    assert isinstance(await executor.wait(bystander, 30), Ended)


async def test_the_time_limit_ends_everything_inside(tmp_path: Path) -> None:
    mark = nap()
    script = f"setsid sleep {mark} & (trap '' TERM HUP; sleep {mark}) & sleep {mark}"
    request = make_request(tmp_path, script, time_limit_seconds=1.0)
    began = time.monotonic()
    outcome = await finish(request)
    assert outcome.ended.ending is Ending.TIME_LIMIT
    assert 1.0 <= time.monotonic() - began < 20
    assert processes_with(mark) == []
    assert judge(outcome.ended.ending, outcome.ended.exit_code, "").verdict is Verdict.FAILED


@pytest.mark.parametrize("stream", ["", ">&2"])
async def test_a_log_without_end_ends_the_run(tmp_path: Path, stream: str) -> None:
    mark = nap()
    request = make_request(tmp_path, f"sleep {mark} & yes {stream}", max_log_bytes=1_000_000)
    outcome = await finish(request)
    assert outcome.ended.ending is Ending.LOG_LIMIT
    judgement = judge(outcome.ended.ending, outcome.ended.exit_code, "", max_log_bytes=1_000_000)
    assert judgement.fault is not None
    assert judgement.fault.cls is FaultClass.USER_CODE
    assert "1000000 bytes" in judgement.fault.message
    assert processes_with(mark) == []
    log = request.stderr if stream else request.stdout
    assert log.stat().st_size > 1_000_000


async def test_a_container_that_ignores_sigterm_is_ended_all_the_same(tmp_path: Path) -> None:
    mark = nap()
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, f"trap '' TERM; echo ready; while true; do sleep {mark} & wait; done")
    await executor.start(request)
    await until(lambda: request.stdout.read_text() == "ready\n")
    session = container_pid(request)
    await executor.cancel(request)
    ended = await executor.wait(request, 30)
    assert isinstance(ended, Ended)
    assert ended.ending is Ending.CANCELLED
    assert processes_with(mark) == []
    assert runner.session_members(session) == []


async def test_cancelling_is_quick_and_leaves_the_logs(tmp_path: Path) -> None:
    executor = LocalExecutor()
    mark = nap()
    request = make_request(tmp_path, f"echo begun; sleep {mark}")
    await executor.start(request)
    await until(lambda: request.stdout.read_text() == "begun\n")
    began = time.monotonic()
    await executor.cancel(request)
    ended = await executor.wait(request, 30)
    assert isinstance(ended, Ended)
    assert ended.ending is Ending.CANCELLED
    assert time.monotonic() - began < 5
    assert request.stdout.read_text() == "begun\n"
    assert processes_with(mark) == []
    await executor.cancel(request)
    assert await executor.status(request) == ended


async def test_cancelling_what_never_was_is_harmless(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, "true")
    await executor.cancel(request)
    assert isinstance(await executor.status(request), NotStarted)
    assert not request.directory.exists()


async def test_concurrent_starts_make_one_container(tmp_path: Path) -> None:
    request = make_request(tmp_path, "echo one >> /outputs/starts; sleep 0.3")
    executors = [LocalExecutor(QUICK) for _ in range(6)]
    answers = await asyncio.gather(*(executor.start(request) for executor in executors))
    assert len({answer.native_id for answer in answers if isinstance(answer, Running)}) == 1
    await executors[0].wait(request, 30)
    again = await executors[1].start(request)
    assert isinstance(again, Ended)
    assert (request.outputs / "starts").read_text() == "one\n"


async def test_a_runner_that_comes_late_does_nothing(tmp_path: Path) -> None:
    request = make_request(tmp_path, "echo one >> /outputs/starts")
    await finish(request)
    assert await local._start_runner(request.directory) == runner.CLAIMED_CODE
    assert (request.outputs / "starts").read_text() == "one\n"


async def test_a_run_is_found_again_after_kill_9_of_the_agent(tmp_path: Path) -> None:
    request = make_request(tmp_path, "echo begun; sleep 1; echo one >> /outputs/starts; exit 5")
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _AGENT, *_words(request), stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    assert await agent.stdout.readline() == b"started\n"
    agent.kill()
    await agent.communicate()
    executor = LocalExecutor(QUICK)
    assert isinstance(await executor.status(request), Running)
    assert isinstance(await executor.start(request), Running)
    ended = await executor.wait(request, 30)
    assert isinstance(ended, Ended)
    assert ended.exit_code == 5
    assert (request.outputs / "starts").read_text() == "one\n"


async def test_the_end_is_noticed_at_once(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, "sleep 0.5")
    await executor.start(request)
    ended = await executor.wait(request, 60)
    noticed = time.time()
    assert isinstance(ended, Ended)
    assert ended.finished_at is not None
    assert noticed - ended.finished_at.timestamp() < 0.5


async def test_waiting_ends_at_its_timeout(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, "sleep 100")
    await executor.start(request)
    began = time.monotonic()
    assert isinstance(await executor.wait(request, 0.2), Running)
    assert 0.2 <= time.monotonic() - began < 5
    await executor.cancel(request)
    await executor.wait(request, 30)


async def test_a_killed_runner_means_lost_and_takes_its_container_along(tmp_path: Path) -> None:
    mark = nap()
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, f"echo begun; (trap '' TERM; sleep {mark}) & sleep {mark}")
    await executor.start(request)
    await until(lambda: request.stdout.read_text() == "begun\n")
    os.kill(runner_pid(request), signal.SIGKILL)
    ended = await executor.wait(request, 30)
    assert isinstance(ended, Ended)
    assert ended.ending is Ending.LOST
    assert processes_with(mark) == []
    assert await executor.status(request) == ended
    assert not (request.directory / "scratch").exists()
    judgement = judge(ended.ending, ended.exit_code, "")
    assert judgement.fault is not None
    assert judgement.fault.cls is FaultClass.NODE


async def test_a_runner_told_to_end_by_the_machine_is_not_a_cancelled_run(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, "echo begun; sleep 100")
    await executor.start(request)
    await until(lambda: request.stdout.read_text() == "begun\n")
    os.kill(runner_pid(request), signal.SIGTERM)
    ended = await executor.wait(request, 30)
    assert isinstance(ended, Ended)
    assert ended.ending is Ending.LOST


async def test_one_sign_alone_is_not_enough_for_lost(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, "sleep 100")
    await executor.start(request)
    claim = request.directory / runner.CLAIM
    true_claim = claim.read_text()
    claim.write_text(json.dumps(json.loads(true_claim) | {"boot": "another", "start": 1}))
    assert isinstance(await executor.status(request), Running), "the runner's lock is held"
    claim.write_text(true_claim)
    await executor.cancel(request)
    assert isinstance(await executor.wait(request, 30), Ended)


async def test_a_living_runner_is_believed_without_its_lock(tmp_path: Path) -> None:
    """Some network file systems lose locks."""
    request = make_request(tmp_path, "true")
    request.directory.mkdir()
    claim = runner.identity(os.getpid()) | {"at": time.time()}
    (request.directory / runner.CLAIM).write_text(json.dumps(claim))
    assert isinstance(await LocalExecutor(QUICK).status(request), Running)


async def test_a_container_that_cannot_be_recorded_does_not_run(tmp_path: Path) -> None:
    request = make_request(tmp_path, "echo one >> /outputs/starts")
    (request.directory / runner.STARTED).mkdir(parents=True)
    executor = LocalExecutor(QUICK)
    assert await executor._launch(request, apptainer.find_program()) == runner.FAILED_CODE
    await until(lambda: not runner.alive(runner.read_json(str(request.directory), runner.CLAIM) or {}))
    assert "IsADirectoryError" in (request.directory / runner.LOG).read_text()
    assert list(request.outputs.iterdir()) == []


async def test_a_reboot_means_lost(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK)
    request = make_request(tmp_path, "true")
    request.directory.mkdir()
    record = {"pid": os.getpid(), "start": 1, "boot": "an earlier boot", "at": time.time() - 60}
    for name in (runner.CLAIM, runner.STARTED):
        (request.directory / name).write_text(json.dumps(record))
    ended = await executor.status(request)
    assert isinstance(ended, Ended)
    assert ended.ending is Ending.LOST
    assert isinstance(await executor.start(request), Ended)


async def test_a_full_directory_of_weird_names_works(tmp_path: Path) -> None:
    place = tmp_path / 'a, b: "c" d\'é日本 =x,ro'
    request = make_request(place, "echo x > /outputs/y; cat /inputs/script.sh >/dev/null")
    image = request.related / 'my, "image": v1 ü.sif'
    image.write_bytes(images().scripted.read_bytes())
    image.chmod(0o644)
    odd = RunRequest(
        name="odd",
        directory=place / "run, -1:ro",
        image=image,
        inputs=request.inputs,
        related=request.related,
        time_limit_seconds=60,
    )
    outcome = await finish(odd)
    assert outcome.ended.exit_code == 0, outcome.stderr
    assert (odd.outputs / "y").read_text() == "x\n"


async def test_a_legacy_image_runs_the_same(tmp_path: Path) -> None:
    request = make_request(tmp_path, "id -u; echo x > /outputs/y; touch /inputs/z", image=images().scripted_simg)
    outcome = await finish(request)
    assert "Read-only" in outcome.stderr
    assert outcome.stdout.strip() != "0"
    assert (request.outputs / "y").exists()


async def test_links_in_the_image_do_not_lead_mounts_astray(tmp_path: Path) -> None:
    rootfs = make_rootfs(tmp_path / "rootfs", "#!/bin/sh\necho x > /outputs/y\n")
    (rootfs / "inputs").symlink_to("/etc")
    (rootfs / "data").symlink_to("/outputs")
    image = squash(rootfs, tmp_path / "links.simg")
    before = names_in("/etc")
    request = make_request(tmp_path / "job", "", image=image)
    await finish(request)
    assert names_in("/etc") == before
    assert sorted(path.name for path in request.inputs.iterdir()) == ["script.sh"]


async def test_inspecting_tells_labels_command_and_runtime() -> None:
    facts = await LocalExecutor().inspect(images().scripted)
    assert facts.runscript.startswith("#!/bin/sh")
    assert facts.labels["org.label-schema.schema-version"] == "1.0"
    assert "version" in facts.runtime
    legacy = await LocalExecutor().inspect(images().scripted_simg)
    assert legacy.runscript == facts.runscript


async def test_an_image_without_a_default_command_is_refused() -> None:
    for image in (images().without_command, images().simg(None)):
        with pytest.raises(ImageError, match="no default command"):
            await LocalExecutor().inspect(image)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty"), (b"not an image\n" * 100, "not an image"), (b"hsqs", "not complete")]
)
async def test_what_is_not_an_image_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    image = tmp_path / "thing.sif"
    image.write_bytes(content)
    with pytest.raises(ImageError, match=words):
        await LocalExecutor().inspect(image)


async def test_a_missing_image_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        await LocalExecutor().inspect(tmp_path / "nothing.sif")
    with pytest.raises(ImageError, match="apptainer build"):
        await LocalExecutor().inspect(tmp_path)


async def test_a_truncated_image_is_refused_before_it_runs(tmp_path: Path) -> None:
    legacy = tmp_path / "short.simg"
    legacy.write_bytes(images().scripted_simg.read_bytes()[:-100_000])
    for image in (images().truncated, legacy):
        with pytest.raises(ImageError, match="not complete"):
            await LocalExecutor().inspect(image)


async def test_a_truncated_image_that_runs_all_the_same_fails_as_image(tmp_path: Path) -> None:
    outcome = await finish(make_request(tmp_path, "true", image=images().truncated))
    judgement = judge(outcome.ended.ending, outcome.ended.exit_code, outcome.stderr)
    assert judgement.fault is not None
    assert judgement.fault.cls is FaultClass.IMAGE
    assert "\x1b" not in outcome.stderr  # Apptainer's colours are for its own terminal, not for a run's log


@as_root
async def test_inspecting_a_hostile_legacy_image_runs_nothing_as_root(tmp_path: Path) -> None:
    rootfs = make_rootfs(tmp_path / "rootfs", "#!/bin/sh\ntrue\n")
    (rootfs / "bin/sh").unlink()
    (rootfs / "bin/sh").write_text("#!/bin/busybox sh\n/bin/busybox id -u >&2\nexit 9\n")
    (rootfs / "bin/sh").chmod(0o755)
    image = squash(rootfs, tmp_path / "hostile.simg")
    with pytest.raises(ImageError) as caught:
        await LocalExecutor().inspect(image)
    assert "65534" in str(caught.value)


async def test_the_check_runs_a_container() -> None:
    assert "version" in await LocalExecutor(QUICK).check()


async def test_what_a_killed_check_left_goes_with_the_next_one(tmp_path: Path) -> None:
    checks = tmp_path / "checks"
    (checks / "ovation-agent-check-x" / "run").mkdir(parents=True)
    (checks / "ovation-agent-check-x" / "run" / "stderr.log").write_text("killed")
    executor = LocalExecutor(replace(QUICK, temporary=checks))
    assert "version" in await executor.check()
    assert list(checks.iterdir()) == []


async def test_without_apptainer_the_message_says_what_to_do(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK, search_path=str(tmp_path))
    request = make_request(tmp_path / "job", "true")
    for call in (executor.check(), executor.inspect(images().scripted), executor.start(request)):
        with pytest.raises(ExecutorUnavailable, match=r"PATH.*Install Apptainer|Neither apptainer"):
            await call
    assert isinstance(await executor.status(request), NotStarted)


async def test_a_broken_runtime_is_named(tmp_path: Path) -> None:
    program = tmp_path / "singularity"
    program.write_text("#!/bin/sh\necho 'libsubid.so: cannot open' >&2\nexit 127\n")
    program.chmod(0o755)
    with pytest.raises(ExecutorUnavailable, match="libsubid"):
        await LocalExecutor(QUICK, search_path=str(tmp_path)).check()


@as_root
def test_a_user_without_a_passwd_entry_is_told_so() -> None:
    done = subprocess.run(
        [_python_for_anybody(), "-c", "from agent.adapters.apptainer import check_user; check_user()"],
        check=False,
        capture_output=True,
        text=True,
        user=54_321,
        group=54_321,
        extra_groups=[],
        cwd="/",
        env={"PYTHONPATH": str(Path(apptainer.__file__).parents[2])},
    )
    assert "user id 54321, which has no entry in /etc/passwd" in done.stderr
    assert "useradd --uid 54321" in done.stderr


def test_a_machine_without_user_namespaces_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 65534)
    monkeypatch.setattr(apptainer, "_namespaces_are_off", lambda: True)
    with pytest.raises(ExecutorUnavailable, match=r"sysctl -w user\.max_user_namespaces"):
        apptainer.check_user()


async def test_a_runner_costs_little(tmp_path: Path) -> None:
    """Its whole cost, without a container: start, claim, two synced records, exit."""
    program = tmp_path / "apptainer"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    executor = LocalExecutor(QUICK, search_path=str(tmp_path))
    took = []
    for number in range(5):
        request = make_request(tmp_path / str(number), "true")
        began = time.monotonic()
        await finish(request, executor)
        took.append(time.monotonic() - began)
    assert min(took) < 0.3, took


async def test_many_containers_at_once(tmp_path: Path) -> None:
    executor = LocalExecutor(QUICK)
    requests = [make_request(tmp_path / str(number), f"echo {number}; exit {number}") for number in range(12)]
    outcomes = await asyncio.gather(*(finish(request, executor) for request in requests))
    assert [outcome.ended.exit_code for outcome in outcomes] == list(range(12))
    assert [outcome.stdout.strip() for outcome in outcomes] == [str(number) for number in range(12)]


def test_a_full_disk_delays_the_exit_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "full"), None])
    write = runner.write_json

    def full_at_first(directory: str, name: str, record: dict[str, object]) -> None:
        error = next(answers)
        if error is not None:
            raise error
        write(directory, name, record)

    monkeypatch.setattr(runner, "write_json", full_at_first)
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.01)
    runner.Run(str(tmp_path))._write_exit(3, resource.getrusage(resource.RUSAGE_SELF), 1.0)
    record = runner.read_json(str(tmp_path), runner.EXIT)
    assert record is not None
    assert record["exit_code"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [runner.EXIT]


@as_root
async def test_a_plain_user_gets_the_same_contract(place: Path) -> None:
    """The whole of it once more as `nobody`: there FUSE may be closed, and images are then unpacked."""
    python = _python_for_anybody()
    write_script(place / "inputs", _PLAIN_SCRIPT)
    (place / "related").mkdir(mode=0o755)
    done = await asyncio.to_thread(
        subprocess.run,
        [python, "-c", _PLAIN_AGENT, str(place), str(images().scripted)],
        check=False,
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(apptainer.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ending"] == "exited"
    assert answer["exit_code"] == 7
    assert answer["stdout"].split("\n")[0] == "65534"
    assert "devices lo:\n" in answer["stdout"]
    assert "Read-only" in answer["stderr"]
    assert answer["left"] == []
    assert (place / "run-1/outputs/y").read_text() == "x\n"
    assert "version" in answer["check"]


_PLAIN_SCRIPT = """\
id -u
echo devices $(grep -o "^ *[a-z0-9]*:" /proc/net/dev)
touch /inputs/new
dd if=/dev/zero of=/tmp/big bs=1M count=100 2>/dev/null || echo TMP IS SMALL
echo x > /data/outputs/y
exit 7
"""

_PLAIN_AGENT = """
import asyncio, json, sys
from pathlib import Path
from agent.adapters import runner
from agent.adapters.executor import RunRequest
from agent.adapters.local import LocalExecutor

async def main(place, image):
    executor = LocalExecutor()
    check = await executor.check()
    await executor.inspect(image)
    request = RunRequest("plain", place / "run-1", image, place / "inputs", place / "related", 60)
    await executor.start(request)
    session = runner.read_json(str(request.directory), runner.STARTED)["pid"]
    ended = await executor.wait(request, 60)
    left = runner.session_members(session) + [str(p) for p in request.directory.glob("private*")]
    print(json.dumps({"check": check, "ending": ended.ending, "exit_code": ended.exit_code, "left": left,
                      "stdout": request.stdout.read_text(), "stderr": request.stderr.read_text()}))

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""

_AGENT = """
import asyncio, sys, time
from pathlib import Path
from agent.adapters.executor import RunRequest
from agent.adapters.local import LocalExecutor

async def main(directory, image, inputs, related):
    await LocalExecutor().start(RunRequest("job-1", directory, image, inputs, related, 60))
    print("started", flush=True)
    time.sleep(60)

asyncio.run(main(*map(Path, sys.argv[1:])))
"""


def _words(request: RunRequest) -> list[str]:
    return [str(path) for path in (request.directory, request.image, request.inputs, request.related)]


def _python_for_anybody() -> str:
    """Return a Python that a plain user can run: a virtual environment's may be below root's home."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run(
                [candidate, "-c", "import asyncio, sys; assert sys.version_info >= (3, 11)"],
                check=False,
                user=65534,
                group=65534,
                extra_groups=[],
                cwd="/",
            )
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    pytest.fail("no Python >= 3.11 that the user nobody can run")
