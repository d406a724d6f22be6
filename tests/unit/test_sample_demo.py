"""What the demo decides without any process: what it shows, which libraries go into the image, how it cleans up."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agent.sandbox.demo_agent import stage_seconds
from agent.sandbox.demo_errors import DemoFailed
from agent.sandbox.demo_home import Home
from agent.sandbox.demo_screen import Screen, csv_table, printable, size
from agent.sandbox.sample import rootfs
from agent.sandbox.sample.image import cache_directory, image_path

AT = "2026-01-02T03:04:{:06.3f}+00:00"


def event(second: float, state: str) -> dict[str, Any]:
    return {"at": AT.format(second), "state": state, "attempt": 0, "note": None}


def test_stage_times_are_the_differences_of_the_moves() -> None:
    job = {"created_at": AT.format(1)}
    events = [
        event(1, "queued"),
        event(1.5, "staging"),
        event(4, "staging"),
        event(5, "launching"),
        event(6, "running"),
    ]
    assert stage_seconds(job, events) == pytest.approx({"queued": 0.5, "staging": 3.5, "launching": 1})


def test_a_stage_that_is_not_over_has_no_time() -> None:
    assert stage_seconds({"created_at": AT.format(1)}, []) == {}


@given(st.text())
def test_what_a_container_writes_cannot_move_the_cursor(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\tb\r\n", "a   b"), ("\x1b[2Jgone", "\ufffd[2Jgone"), ("Adélie R²", "Adélie R²"), ("a\u202eb", "a\ufffdb")],
)
def test_what_can_be_shown_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "?"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (15_241, "15 kB"),
        (77_004_800, "77 MB"),
        (2.5e9, "2.5 GB"),
    ],
)
def test_sizes_are_for_people(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def shown_on(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_stage_is_a_line(console: Console) -> None:
    with Screen(["upload", "webhook"], console) as screen:
        screen.begin("upload")
        screen.begin("upload")
        screen.done("upload", "2 files", 1.25)
        screen.done("upload", "again", 9)
        screen.begin("webhook")
        screen.fail_open("interrupted")
        screen.container("[red]not markup[/red]")
    assert shown_on(console).splitlines() == [
        "upload: …",
        "upload: done in 1.2 s  2 files",
        "webhook: …",
        "webhook: stopped  interrupted",
        "  │ [red]not markup[/red]",
    ]


def test_details_are_told_now_and_then_and_the_last_is_not_forgotten(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("agent.sandbox.demo_screen.time.monotonic", lambda: now)
    screen = Screen(["upload"], console)
    screen.begin("upload")
    for detail in ("one", "two", "three"):
        screen.detail("upload", detail)
    now += 1.5
    screen.detail("upload", "three")
    screen.detail("upload", "three")
    assert shown_on(console).splitlines() == ["upload: …", "upload: …  three"]


def test_on_a_terminal_the_table_is_live() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Screen(["upload", "webhook"], console) as screen:
        screen.begin("upload", "penguins.csv")
        screen.done("upload", "2 files", 1.25)
        screen.close()
    shown = shown_on(console)
    assert shown.rindex("✓") < shown.rindex("2 files") < shown.rindex("webhook")
    assert "penguins.csv" not in shown[shown.rindex("✓") :]


def test_nothing_is_shown_once_nobody_looks_on(console: Console) -> None:
    screen = Screen(["upload"], console)
    screen.mute()
    screen.say("into the void")
    assert shown_on(console) == ""


def test_a_table_of_numbers_is_rounded(console: Console, tmp_path: Path) -> None:
    path = tmp_path / "regression.csv"
    path.write_text("group,n,slope\nAdelie,151,32.8317\n", encoding="utf-8")
    console.print(csv_table("Slopes", path, ("group", "n", "slope")))
    assert shown_on(console).split() == ["Slopes", "group", "n", "slope", "Adelie", "151", "32.83"]


def test_the_directory_goes_with_all_that_a_container_locked(tmp_path: Path) -> None:
    home = Home(tmp_path, keep=False)
    locked = home.path / "outputs" / "locked"
    locked.mkdir(parents=True)
    (locked / "file").touch()
    locked.chmod(0)
    home.close()
    assert list(tmp_path.iterdir()) == []
    assert home.farewell() == ""


def test_a_directory_that_is_kept_is_named(tmp_path: Path) -> None:
    home = Home(tmp_path / "new", keep=True)
    home.close()
    assert home.path.parent == tmp_path / "new"
    assert str(home.path) in home.farewell()


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DemoFailed, match="--directory"):
        Home(tmp_path / "file", keep=False)


def test_the_loaders_answer_is_read() -> None:
    lines = {
        "\tlinux-vdso.so.1 (0x00007ffc1b5f2000)": ("linux-vdso.so.1", None),
        "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f64a01e000)": (
            "libc.so.6",
            "/lib/x86_64-linux-gnu/libc.so.6",
        ),
        "\tliba.so => /a b/liba.so (0x00007f64a01e000)": ("liba.so", "/a b/liba.so"),
        "\tlibgone.so.1 => not found": ("libgone.so.1", "not found"),
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007fa64a91c000)": ("/lib64/ld-linux-x86-64.so.2", None),
    }
    for line, expected in lines.items():
        match = rootfs._LDD_LINE.match(line)
        assert match is not None, line
        assert (match["name"], match["path"]) == expected
    assert rootfs._LDD_LINE.match("\tstatically linked") is None


@pytest.mark.parametrize(
    "name", ["__pycache__", "tests", "sample_data", "_avif.cpython-311.so", "core.pyi", "npymath.a"]
)
def test_what_packages_do_not_need_is_left_out(name: str) -> None:
    assert rootfs._PACKAGES_LEFT_OUT.fullmatch(name)


@pytest.mark.parametrize("name", ["testing", "contest.py", "_imaging.cpython-311.so", "afm.py", "matplotlibrc"])
def test_what_they_need_is_not(name: str) -> None:
    assert not rootfs._PACKAGES_LEFT_OUT.fullmatch(name)


def test_files_are_placed_for_everybody_to_read(tmp_path: Path) -> None:
    private, program = tmp_path / "private", tmp_path / "program"
    private.touch(mode=0o600)
    program.touch(mode=0o700)
    for source, mode in ((private, 0o644), (program, 0o755)):
        target = tmp_path / "root" / source.name
        rootfs._place(source, target)
        assert target.stat().st_mode & 0o777 == mode
        assert source.stat().st_nlink == 1


def test_files_that_everybody_may_read_are_linked(tmp_path: Path) -> None:
    source, alias = tmp_path / "source", tmp_path / "alias"
    source.touch()
    source.chmod(0o644)
    alias.symlink_to(source)
    rootfs._place(alias, tmp_path / "root" / "file")
    assert source.samefile(tmp_path / "root" / "file")
    assert not (tmp_path / "root" / "file").is_symlink()


def test_the_requirements_of_the_analysis_are_all_found() -> None:
    names = {distribution.metadata["Name"].lower() for distribution in rootfs.distributions()}
    assert {"numpy", "matplotlib", "pillow", "python-dateutil", "six"} <= names
    assert "pytest" not in names


def test_the_image_is_kept_under_a_name_that_follows_from_its_ingredients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = image_path(tmp_path)
    assert first == image_path(tmp_path)
    monkeypatch.setattr("sys.version", "another interpreter")
    assert first != image_path(tmp_path)


@pytest.mark.parametrize(("value", "relative"), [("", False), ("not/absolute", False), ("/somewhere", True)])
def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, value: str, relative: bool) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/home/somebody")
    expected = Path("/somewhere") if relative else Path("/home/somebody/.cache")
    assert cache_directory() == expected / "ovation-agent"
