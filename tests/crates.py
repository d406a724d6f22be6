"""Crates, checked by the validator of the profile's own community, without any network."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rocrate
from rocrate.rocrate import ROCrate

NAME = "ro-crate-metadata.json"
PROFILE = "process-run-crate-0.5"
_FOUND = "found: "
# The context of RO-Crate comes from the `rocrate` library, which has that of 1.3: every term of 1.1 is in it.
# It has an environment of its own (config/crate.in).
_VALIDATE = f"""
import json, sys
import requests
from rocrate_validator import models, services
from rocrate_validator.utils.http import HttpRequester

def get(self, url, **options):
    answer = requests.Response()
    answer.status_code, answer.url = 504, url
    if url == "https://w3id.org/ro/crate/1.1/context":
        answer.status_code, answer.headers["Content-Type"] = 200, "application/ld+json"
        answer._content, answer.encoding = open(sys.argv[2], "rb").read(), "utf-8"
    return answer

HttpRequester.get = get

settings = services.ValidationSettings(
    rocrate_uri=models.URI(sys.argv[1]),
    profile_identifier={PROFILE!r},
    requirement_severity=models.Severity.REQUIRED,
    abort_on_first=False,
    offline=True,
)
found = services.validate(settings).get_issues()
print({_FOUND!r} + json.dumps([f"{{each.check.identifier}}: {{each.message}}" for each in found]))
"""


def issues(crate: dict[str, Any], files: dict[str, bytes]) -> list[str]:
    """Return what is REQUIRED by RO-Crate 1.1 or Process Run Crate 0.5 and not so; files lie beside the crate."""
    with tempfile.TemporaryDirectory(prefix="ovation-crate-") as directory:
        _write(Path(directory), crate, files)
        python = Path(sys.prefix, "crate/bin/python")
        context = Path(rocrate.__file__).parent / "data/ro-crate.jsonld"
        done = subprocess.run(
            [python, "-I", "-c", _VALIDATE, directory, context],
            check=False,
            capture_output=True,
            text=True,
            cwd=directory,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        [line] = [line for line in done.stdout.splitlines() if line.startswith(_FOUND)]
        found: list[str] = json.loads(line.removeprefix(_FOUND))
        return found


def read_back(crate: dict[str, Any], files: dict[str, bytes]) -> ROCrate:
    """Read a crate as programs do."""
    with tempfile.TemporaryDirectory(prefix="ovation-crate-") as directory:
        _write(Path(directory), crate, files)
        return ROCrate(directory)


def _write(directory: Path, crate: dict[str, Any], files: dict[str, bytes]) -> None:
    for path, content in {**files, NAME: json.dumps(crate).encode()}.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
