"""The local disk, when what lies on it is a stranger's: real trees, as hostile as they can be made."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapters.files import list_tree, open_below, remove_tree, tail

NOBODY = 65534
_PR_SET_DUMPABLE = 4


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that an unprivileged user can reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    remove_tree(path)


@contextmanager
def as_nobody(*owned: Path) -> Iterator[None]:
    """Go on as an unprivileged user, to whom these belong; whoever is one already stays who they are."""
    if os.geteuid() != 0:
        yield
        return
    for path in owned:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # as for a process that was started as that user
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def read(root: Path, path: str) -> bytes:
    descriptor = open_below(root, path)
    try:
        return os.read(descriptor, 1000)
    finally:
        os.close(descriptor)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def hostile(root: Path, outside: Path) -> None:
    """Fill `root` with what is not a regular file."""
    outside.mkdir()
    (outside / "secret").write_text("secret")
    root.mkdir()
    (root / "good").write_text("good")
    (root / "to-file").symlink_to(outside / "secret")
    (root / "to-dir").symlink_to(outside)
    (root / "relative").symlink_to("../outside/secret")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    (root / "inside").symlink_to("good")
    os.mkfifo(root / "pipe")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    if os.geteuid() == 0:
        os.mknod(root / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(root / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 200))


def test_only_regular_files_are_listed_and_the_rest_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    hostile(root, tmp_path / "outside")
    tree = list_tree(root)
    assert [(file.path, file.size) for file in tree.files] == [("good", 4)]
    assert tree.folders == ()
    kinds = {path: kind for path, kind in tree.skipped if path not in {"device", "disk"}}
    links = dict.fromkeys(("to-file", "to-dir", "relative", "dangling", "loop", "inside"), "a symbolic link")
    assert kinds == links | {"pipe": "a named pipe", "socket": "a socket"}
    if os.geteuid() == 0:
        assert {("device", "a character device"), ("disk", "a block device")} <= set(tree.skipped)


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    root = tmp_path / "root"
    hostile(root, tmp_path / "outside")
    (root / "folder").mkdir()
    before = open_descriptors()
    for name in (*(path for path, _ in list_tree(root).skipped), "folder", "to-dir/secret", "missing", "good/below"):
        with pytest.raises(OSError, match=r"regular file|directory|[Nn]o such"):
            open_below(root, name)
    assert open_descriptors() == before


@pytest.mark.parametrize("path", ["../outside/secret", "/etc/passwd", "..", ".", "", "a/../../outside/secret"])
def test_no_path_leads_out(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    hostile(root, tmp_path / "outside")
    (root / "a").mkdir()
    with pytest.raises(OSError, match=r"regular file|[Nn]o such|not a name"):
        open_below(root, path)


def test_removing_never_follows_a_link(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    hostile(root, outside)
    (root / "deep").mkdir()
    (root / "deep" / "link").symlink_to(outside)
    outside.chmod(0o755)
    remove_tree(root)
    assert not root.exists()
    assert (outside / "secret").read_text() == "secret"
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


def test_a_link_or_a_file_in_the_place_of_the_tree_is_removed_itself(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    link = tmp_path / "link"
    link.symlink_to(outside)
    with pytest.raises(OSError, match="not a directory"):
        list_tree(link)
    with pytest.raises(OSError, match="not a directory"):
        open_below(link, "secret")
    remove_tree(link)
    assert not link.is_symlink()
    assert (outside / "secret").exists()
    remove_tree(outside / "secret")
    remove_tree(outside / "secret")  # a missing one is removed already
    assert not list(outside.iterdir())


def test_a_missing_tree_is_an_empty_one(tmp_path: Path) -> None:
    tree = list_tree(tmp_path / "missing" / "root")
    assert (tree.files, tree.folders, tree.skipped) == ((), (), ())


def test_a_file_swapped_for_a_link_after_it_was_listed_is_not_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "file").write_text("mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    assert [file.path for file in list_tree(root).files] == ["folder/file"]
    (root / "folder" / "file").unlink()
    (root / "folder" / "file").symlink_to(tmp_path / "outside" / "file")
    with pytest.raises(OSError, match="not a regular file"):
        open_below(root, "folder/file")
    shutil.rmtree(root / "folder")
    (root / "folder").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="not a directory"):
        open_below(root, "folder/file")


@given(
    st.sets(
        st.binary(min_size=1, max_size=255).filter(lambda name: not set(name) & {0, 47} and name not in {b".", b".."}),
        min_size=1,
        max_size=8,
    )
)
def test_every_name_that_a_disk_can_hold_is_listed_read_and_removed(names: set[bytes]) -> None:
    root = Path(tempfile.mkdtemp())
    for name in names:
        (root / os.fsdecode(name)).write_bytes(name)
    found = {os.fsencode(file.path): read(root, file.path) for file in list_tree(root).files}
    assert found == {name: name for name in names}
    remove_tree(root)
    assert not root.exists()


def test_names_that_are_no_text_and_the_longest_ones(tmp_path: Path) -> None:
    names = [b"new\nline", b"\xff\xfe", b"x" * 255, b" ", b"-rf", b"...", "ü".encode() * 127]
    for name in names:
        folder = Path(os.fsdecode(os.fsencode(tmp_path / "root") + b"/" + name))
        folder.mkdir(parents=True)
        (folder / folder.name).write_bytes(name)
    tree = list_tree(tmp_path / "root")
    assert {os.fsencode(folder) for folder in tree.folders} == set(names)
    assert {os.fsencode(file.path) for file in tree.files} == {name + b"/" + name for name in names}
    assert all(read(tmp_path / "root", file.path) for file in tree.files)
    remove_tree(tmp_path / "root")


def test_closed_files_and_folders_as_an_unprivileged_user(place: Path) -> None:
    root = place / "root"
    (root / "closed" / "inner").mkdir(parents=True)
    (root / "no-search").mkdir()
    files = [root / "file", root / "closed" / "file", root / "closed" / "inner" / "file", root / "no-search" / "file"]
    for file in files:
        file.write_text("content")
        file.chmod(0)
    folders = [root / "closed" / "inner", root / "closed", root / "no-search", root]
    with as_nobody(*files, *folders, place):
        for folder in folders:
            folder.chmod(0o400 if folder.name == "no-search" else 0)
        tree = list_tree(root)
        listed = [file.path for file in tree.files]
        assert sorted(listed) == ["closed/file", "closed/inner/file", "file", "no-search/file"]
        assert tree.folders == ("closed", "closed/inner", "no-search")
        assert [read(root, path) for path in listed] == [b"content"] * 4
        for folder in folders:
            folder.chmod(0)
        remove_tree(root)
        assert not root.exists()


def test_a_folder_without_write_permission_is_emptied_as_an_unprivileged_user(place: Path) -> None:
    root = place / "root"
    (root / "fixed").mkdir(parents=True)
    (root / "fixed" / "file").touch()
    with as_nobody(root / "fixed" / "file", root / "fixed", root, place):
        (root / "fixed").chmod(0o555)
        root.chmod(0o555)
        remove_tree(root)
        assert not root.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to somebody else")
def test_what_belongs_to_somebody_else_is_told_and_the_rest_goes_on(place: Path) -> None:
    root = place / "root"
    for name in ("a", "theirs", "z"):
        (root / name).mkdir(parents=True)
        (root / name / "file").touch()
    (root / "theirs").chmod(0o700)
    (root / "locked").mkdir(mode=0o755)
    (root / "locked" / "stays").touch()
    (root / "empty").mkdir(mode=0o700)
    (root / "secret").touch(mode=0o600)
    with as_nobody(root, root / "a", root / "z", place):
        tree = list_tree(root)
        assert [file.path for file in tree.files] == ["secret", "a/file", "locked/stays", "z/file"]
        assert ("theirs", "a folder that cannot be read (Permission denied)") in tree.skipped
        with pytest.raises(PermissionError):
            open_below(root, "secret")
        with pytest.raises(PermissionError, match=r"'(theirs|locked/stays)' cannot be removed: Permission denied"):
            remove_tree(root)
        assert sorted(path.name for path in root.iterdir()) == ["locked", "theirs"]


def test_root_reads_and_removes_closed_trees(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "closed").mkdir(parents=True)
    (root / "closed" / "file").write_text("content")
    (root / "closed" / "file").chmod(0)
    (root / "closed").chmod(0)
    root.chmod(0)
    assert [file.path for file in list_tree(root).files] == ["closed/file"]
    assert read(root, "closed/file") == b"content"
    remove_tree(root)
    assert not root.exists()


def test_a_tree_deeper_than_any_path_the_stack_and_the_descriptors(tmp_path: Path) -> None:
    root, levels, name = tmp_path / "root", 2000, "dir"
    root.mkdir()
    directory = os.open(root, os.O_RDONLY)
    for level in range(levels):
        os.mkdir(name, dir_fd=directory)
        if level % 400 == 0:  # so that the way back leads through folders that are closed by then
            os.mkdir("side", dir_fd=directory)
            os.close(os.open("side/file", os.O_WRONLY | os.O_CREAT, dir_fd=directory))
        inner = os.open(name, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(os.open("last", os.O_WRONLY | os.O_CREAT, dir_fd=directory))
    os.close(directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 50, hard))
    try:
        before = open_descriptors()
        tree = list_tree(root)
        assert len(tree.folders) == levels + 5
        assert len(tree.files) == 6
        assert max(len(file.path) for file in tree.files) > 4096
        assert all(read(root, file.path) == b"" for file in tree.files)
        remove_tree(root)
        assert not root.exists()
        assert open_descriptors() == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_hard_links_and_sparse_files_are_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "one").write_text("content")
    (root / "two").hardlink_to(root / "one")
    with (root / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    sizes = {file.path: file.size for file in list_tree(root).files}
    assert sizes == {"one": 7, "two": 7, "sparse": 1 << 40}
    assert read(root, "sparse") == bytes(1000)


def test_folders_stand_after_the_one_that_they_are_in(tmp_path: Path) -> None:
    for path in ("b/a", "a/b/c", "a/a", "a-b", "c"):
        (tmp_path / "root" / path).mkdir(parents=True)
    folders = list_tree(tmp_path / "root").folders
    assert folders == ("a", "a/a", "a/b", "a/b/c", "a-b", "b", "b/a", "c")


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log, 10) == ""
    log.write_bytes(b"0123456789\xff" + "ü".encode())
    assert tail(log, 100) == "0123456789\N{REPLACEMENT CHARACTER}ü"
    assert tail(log, 1) == "\N{REPLACEMENT CHARACTER}"
