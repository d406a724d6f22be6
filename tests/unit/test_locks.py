"""Both locks are in step with pyproject.toml, with each other, and with nothing of the machine that made them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock", "config/crate.lock")
PINNED = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)", re.MULTILINE)

Lock = dict[str, set[Version]]


def read_lock(name: str) -> Lock:
    """Read the versions that a lock pins; there are several where they depend on the Python in use."""
    versions: Lock = {}
    for pinned in PINNED.finditer((ROOT / name).read_text()):
        versions.setdefault(canonicalize_name(pinned["name"]), set()).add(Version(pinned["version"]))
    return versions


def read_requirements(name: str) -> list[str]:
    """Read a list of requirements, one a line."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


def unmet(lock: Lock, requirements: list[str]) -> list[str]:
    """Say which requirements a lock does not meet."""
    problems = []
    for requirement in map(Requirement, requirements):
        versions = lock.get(canonicalize_name(requirement.name), set())
        if not versions:
            problems.append(f"{requirement} is not there")
        problems += [
            f"{requirement} is wanted, {version} is there"
            for version in versions
            if version not in requirement.specifier
        ]
    return problems


@pytest.fixture(name="project")
def project_table() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def test_runtime_lock_meets_the_project(project: dict[str, Any]) -> None:
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["demo"],
        *read_requirements("config/setup.in"),
    ]
    assert unmet(read_lock("requirements.lock"), wanted) == [], "run `make lock`"


def test_development_lock_meets_the_project(project: dict[str, Any]) -> None:
    own = project["name"]
    wanted = [text for text in project["optional-dependencies"]["dev"] if Requirement(text).name != own]
    assert unmet(read_lock("requirements-dev.lock"), wanted + read_requirements("config/check.in")) == [], (
        "run `make lock`"
    )


def test_development_lock_contains_the_runtime_lock() -> None:
    runtime, development = read_lock("requirements.lock"), read_lock("requirements-dev.lock")
    different = {name for name, versions in runtime.items() if development.get(name) != versions}
    assert different == set(), "run `make lock`"


def test_the_validator_of_crates_is_locked() -> None:
    assert unmet(read_lock("config/crate.lock"), read_requirements("config/crate.in")) == [], "run `make lock`"


@pytest.mark.parametrize("name", LOCKS)
def test_lock_has_hashes_and_names_no_place(name: str) -> None:
    text = (ROOT / name).read_text()
    entries = [line for line in text.splitlines() if PINNED.match(line)]
    assert entries
    assert [line for line in entries if not line.endswith(" \\")] == []
    assert not re.search(r"://|^-|[ =](?:/|~|\.\./)", text, re.MULTILINE)


def test_a_requirement_that_is_not_met_is_found() -> None:
    lock = {"aiohttp": {Version("3.14.5")}}
    assert unmet(lock, ["aiohttp>=3.14"]) == []
    assert unmet(lock, ["aiohttp>=4", "rich"]) == ["aiohttp>=4 is wanted, 3.14.5 is there", "rich is not there"]
