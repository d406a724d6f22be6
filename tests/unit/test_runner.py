"""What the runner does by itself, without a container: the rest is in tests/integration/test_local_executor.py."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from agent.adapters import runner


def test_a_tree_is_removed_and_nothing_that_it_points_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file.txt").write_text("gone")
    (tree / "a" / "to-a-directory").symlink_to(outside)
    (tree / "to-nothing").symlink_to("nowhere")
    (tree / "a" / "b").chmod(0)
    (tree / "a").chmod(0o500)
    runner.remove_tree(str(tree))
    assert not tree.exists()
    assert (outside / "kept.txt").read_text() == "kept"


def test_a_tree_that_is_not_there_is_removed(tmp_path: Path) -> None:
    runner.remove_tree(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_a_tree_that_its_owner_may_not_look_into_is_removed() -> None:
    own = os.geteuid()
    nobody = 65534 if own == 0 else own  # to root no mode forbids anything
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        tree = place / "tree"
        tree.mkdir()
        (tree / "file.txt").write_text("gone")
        place.chmod(0o777)
        os.chown(tree, nobody, -1)
        tree.chmod(0)
        os.seteuid(nobody)
        try:
            runner.remove_tree(str(tree))
        finally:
            os.seteuid(own)
        assert not tree.exists()


def test_its_start_loads_little() -> None:
    """It is part of every run's start; each of these takes as long as the rest of its work."""
    dear = ("typing", "shutil", "pathlib", "ctypes", "traceback", "subprocess", "asyncio")
    program = f"import sys; sys.path.append({str(Path(runner.__file__).parent)!r}); import runner; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "json" in loaded
    assert not set(dear) & set(loaded)
