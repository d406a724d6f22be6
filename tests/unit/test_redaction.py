"""What a container wrote is delivered without secrets, and otherwise byte for byte."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapters import redaction
from agent.adapters.redaction import redact_file
from agent.logs import REDACTED
from tests.unit.test_logs import SECRETS


@pytest.mark.parametrize(("text", "secret"), SECRETS.values(), ids=SECRETS)
def test_secrets_are_removed(text: str, secret: str, tmp_path: Path) -> None:
    log = tmp_path / "stdout.log"
    log.write_text(f"before\n{text}\nafter\n")
    log.chmod(0o640)
    assert redact_file(log)
    found = log.read_text()
    assert secret not in found
    assert REDACTED in found
    assert found.startswith("before\n")
    assert found.endswith("\nafter\n")
    assert stat.S_IMODE(log.stat().st_mode) == 0o640
    assert not redact_file(log)  # what is clean stays as it is
    assert list(tmp_path.iterdir()) == [log]


@given(st.binary(max_size=300))
def test_what_holds_no_secret_stays_byte_for_byte(content: bytes) -> None:
    content = content.replace(b"=", b"").replace(b":", b"")
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        log.write_bytes(content)
        before = log.stat().st_ino
        if not redact_file(log):
            assert log.read_bytes() == content
            assert log.stat().st_ino == before


@pytest.mark.parametrize("piece_bytes", [64, 100, 1000])
def test_a_secret_is_found_wherever_it_stands_in_a_long_log(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redaction, "_PIECE_BYTES", piece_bytes)
    lines = [f"line {number} \udcff" for number in range(200)]
    for at in (0, 7, 100, 199):
        log = tmp_path / f"log{at}"
        changed = [*lines[:at], "password=hunter2-secret", *lines[at:], "Bearer abc.def"]
        log.write_bytes("\n".join(changed).encode(errors="surrogateescape"))
        assert redact_file(log)
        wanted = [*lines[:at], f"password={REDACTED}", *lines[at:], f"Bearer {REDACTED}"]
        assert log.read_bytes() == "\n".join(wanted).encode(errors="surrogateescape")


@pytest.mark.parametrize("secret", ["Authorization: Bearer abcdefgh-secret", '{"client_secret": "abcdefgh-secret"}'])
def test_no_border_of_a_piece_hides_a_secret(secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_PIECE_BYTES", 64)
    log = tmp_path / "log"
    for before in range(130):
        for line in (f"{'x' * before}\n{secret} and more\n", f"{'x ' * before}{secret} and more\n"):
            log.write_text(line + "more words here\n" * 20)
            assert redact_file(log)
            assert "abcdefgh-secret" not in log.read_text(), before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("password=hunter2-secret")
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        redact_file(tmp_path / "log")
    assert "hunter2" in (tmp_path / "elsewhere").read_text()
