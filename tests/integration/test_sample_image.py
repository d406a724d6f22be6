"""The sample image: built from this machine and environment, run by Apptainer as a job would run it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.sandbox import sample
from agent.sandbox.sample import image as sample_image
from agent.sandbox.sample.rootfs import SampleError

SAMPLE = Path(sample.__file__).parent
REPOSITORY = SAMPLE.parents[2]
INPUTS = ("penguins.csv", "parameters.json")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def image(cache: Path) -> Path:
    result = build(cache)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    directory = tmp_path / "inputs"
    directory.mkdir(mode=0o755)
    for name in INPUTS:
        shutil.copy(SAMPLE / name, directory)
    return directory


def command(cache: Path) -> list[str]:
    return [sys.executable, "-m", "agent.sandbox.sample.image", "--cache", str(cache)]


def build(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(cache),
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        umask=0o077,  # whatever the person's is
        check=False,
    )


def run(image: Path, inputs: Path, outputs: Path) -> subprocess.CompletedProcess[str]:
    """Run the image as the agent does: nobody's rights, nothing of the host's, no network."""
    outputs.mkdir()
    outputs.chmod(0o777)
    as_nobody = ["--security", "uid:65534,gid:65534"] if os.geteuid() == 0 else []
    options = ["--containall", "--no-home", "--cleanenv", "--no-privs", "--net", "--network", "none", *as_nobody]
    mounts = [
        f'--mount=type=bind,"source={inputs}",destination=/inputs,ro',
        f'--mount=type=bind,"source={outputs}",destination=/outputs',
    ]
    return subprocess.run(
        ["apptainer", "-q", "run", *options, "--pwd", "/outputs", *mounts, str(image)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_analyses_the_penguins(image: Path, inputs: Path, tmp_path: Path) -> None:
    result = run(image, inputs, tmp_path / "outputs")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("read penguins.csv: 344 rows, 342 usable")
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["warning", "warning"]
    written = {path.name: path for path in (tmp_path / "outputs").iterdir()}
    assert set(written) == {"regression.csv", "regression.png", "summary.md"}
    with written["regression.csv"].open(encoding="utf-8", newline="") as file:
        slopes = {row["group"]: float(row["slope"]) for row in csv.DictReader(file)}
    assert slopes["Gentoo"] == pytest.approx(54.62, abs=0.005)
    assert written["regression.png"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_wrong_inputs_end_it_with_a_reason(image: Path, inputs: Path, tmp_path: Path) -> None:
    parameters = json.loads((inputs / "parameters.json").read_text(encoding="utf-8"))
    (inputs / "parameters.json").write_text(json.dumps(parameters | {"response": "wingspan"}), encoding="utf-8")
    result = run(image, inputs, tmp_path / "outputs")
    assert result.returncode == 2
    assert result.stderr.startswith("error: penguins.csv has no column wingspan; its columns are species, island")
    assert list((tmp_path / "outputs").iterdir()) == []


def test_it_has_a_default_command_and_help(image: Path) -> None:
    for option, expected in (("--runscript", "-m analysis"), ("--helpfile", "/inputs")):
        shown = subprocess.run(
            ["apptainer", "inspect", option, str(image)], capture_output=True, text=True, timeout=30, check=True
        )
        assert expected in shown.stdout


def test_it_is_built_once(image: Path, cache: Path) -> None:
    before = image.stat()
    result = build(cache)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, str(image), "")
    assert (image.stat().st_ino, image.stat().st_size) == (before.st_ino, before.st_size)
    assert [path.name for path in cache.iterdir()] == [image.name]


def test_its_files_are_for_everybody(image: Path) -> None:
    options = ["--containall", "--no-privs", "--env", "LD_LIBRARY_PATH=/opt/python/lib"]
    listing = subprocess.run(
        ["apptainer", "-q", "exec", *options, str(image), "/opt/python/bin/python3", "-I", "-c", WALK],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert listing.stdout.strip() == "[]"


WALK = """
import os, stat
closed = []
for top in ("/opt", "/usr", "/.singularity.d"):
    for where, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(where, name)
            mode = os.lstat(path).st_mode
            if not stat.S_ISLNK(mode) and not mode & stat.S_IROTH:
                closed.append(path)
print(closed)
"""


@pytest.fixture
def building(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(tmp_path), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_an_interrupted_build_leaves_no_image_and_is_cleaned_up_after(
    building: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert building.stderr is not None
    for line in building.stderr:
        if line.startswith("compiling"):
            break
    sample_image.clean(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "a builder that lives keeps its directory"
    os.killpg(building.pid, signal.SIGKILL)
    building.wait(timeout=10)
    deadline = time.monotonic() + 10
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        sample_image.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_apptainer_the_remedy_is_told(tmp_path: Path) -> None:
    result = build(tmp_path / "cache", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "neither apptainer nor singularity is on PATH: `make setup` installs Apptainer" in result.stderr
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SampleError, match="set XDG_CACHE_HOME to a writable directory"):
        sample_image.ensure(tmp_path / "file" / "cache", lambda _: None)


def test_old_images_of_other_environments_are_forgotten(image: Path, cache: Path) -> None:
    old, recent = cache / "sample-0000000000000000.sif", cache / "sample-1111111111111111.sif"
    old.touch()
    recent.touch()
    os.utime(old, (0, 0))
    sample_image._forget_old_images(image)
    assert (old.exists(), recent.exists(), image.exists()) == (False, True, True)
    recent.unlink()
