"""The script that makes the agent a service, as far as it can be run without systemd."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

from tests.unit.test_docs import ROOT


def install(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "config/install-service", *arguments],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DESTDIR": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_writes_what_is_missing_and_leaves_what_is_there(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert done.returncode == 0, done.stderr
    settings = tmp_path / "etc/ovation-agent/environment"
    unit = tmp_path / "etc/systemd/system/ovation-agent.service"
    assert stat.S_IMODE(settings.stat().st_mode) == 0o640
    words = re.findall(r"^AGENT_WEBHOOK_(?:USERNAME|PASSWORD)=([0-9a-f]{40})$", settings.read_text(), re.MULTILINE)
    assert len(set(words)) == 2
    assert not any(word in done.stdout + done.stderr for word in words)
    assert f"ExecStart={ROOT}/.venv/bin/ovation-agent serve" in unit.read_text()
    settings.write_text("OVATION_TOKEN=mine\n")
    again = install(tmp_path)
    assert (again.returncode, again.stdout) == (0, "")
    assert settings.read_text() == "OVATION_TOKEN=mine\n"
    unit.write_text("an older one")
    assert "installed" in install(tmp_path).stdout
    assert f"ExecStart={ROOT}" in unit.read_text()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["environment", unit.name]


def test_two_machines_have_different_credentials(tmp_path: Path) -> None:
    found = set()
    for name in ("one", "two"):
        install(tmp_path / name)
        found.add((tmp_path / name / "etc/ovation-agent/environment").read_text())
    assert len(found) == 2


def test_an_unknown_argument_changes_nothing(tmp_path: Path) -> None:
    done = install(tmp_path, "--help-me")
    assert done.returncode == 1
    assert "there is only --no-start" in done.stderr
    assert not list(tmp_path.iterdir())
