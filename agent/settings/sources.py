"""Where settings come from: a TOML file and the environment. A name that is in neither list is refused, not ignored."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource

from agent.errors import ConfigurationError

DEFAULT_FILE = "agent.toml"
_FILE_VARIABLE = "AGENT_CONFIG"
_OURS = ("AGENT_", "OVATION_")
_ALMOST = 0.85


class File(NamedTuple):
    """A file of settings; `named` is False for the one that is only looked for."""

    path: Path
    named: bool


class Environment(EnvSettingsSource):
    """The environment, narrowed to the tree's own variables: AGENT, JWT or AWS alone may be another program's."""

    def __init__(self, settings_cls: type[BaseSettings], known: Iterable[str]) -> None:
        super().__init__(settings_cls)
        self.env_vars = {name.lower(): value for name in known if (value := os.environ.get(name))}


def find(file: Path | None) -> File | None:
    """Return the file to read: the one given, the one that AGENT_CONFIG names, or agent.toml right here."""
    if file is not None:
        return File(file, named=True)
    if named := os.environ.get(_FILE_VARIABLE):
        return File(Path(named), named=True)
    return File(Path(DEFAULT_FILE), named=False)


def read(file: File, known: Iterable[str]) -> dict[str, Any]:
    """Return the content of a file of settings.

    Raises:
        ConfigurationError: it cannot be read, is not TOML, or has names that are not in `known`.
    """
    try:
        content = tomllib.loads(file.path.read_bytes().decode())
    except FileNotFoundError as error:
        if not file.named:
            return {}
        problem = f"{file.path}: cannot be read: {error.strerror}; --config or AGENT_CONFIG names it"
        raise ConfigurationError(problem) from None
    except OSError as error:
        raise ConfigurationError(f"{file.path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file.path}: is not text in UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{file.path}: is not TOML: {error}") from None
    if problems := [f"{file.path}: {problem}" for problem in _unknown_names(content, known)]:
        raise ConfigurationError("\n".join(problems))
    return content


def refuse_unknown_variables(known: Iterable[str]) -> None:
    """Refuse a misspelt variable, which would otherwise be a setting that silently does nothing.

    Raises:
        ConfigurationError: an AGENT_* variable that is no setting, or an OVATION_* variable that is almost one.
    """
    names = {*known, _FILE_VARIABLE}
    problems = []
    for name in sorted(set(os.environ) - names):
        if not name.upper().startswith(_OURS):
            continue
        nearest = difflib.get_close_matches(name.upper(), names, n=1, cutoff=_ALMOST)
        # Ovation's other programs have variables of their own.
        if nearest or name.startswith("AGENT_"):
            problems.append(f"environment: {name}: no such setting{_nearest(name.upper(), names)}")
    if problems:
        raise ConfigurationError("\n".join(problems))


def explain(error: ValidationError, path: Path | None) -> str:
    """Return a line for each problem: where it stands, which key, what is wrong with it. Never a value."""
    lines = []
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        place = [str(part) for part in detail["loc"][:2]]
        message = detail["msg"].removeprefix("Value error, ")
        variable = "_".join(place).upper()
        if len(place) == 1:  # about several settings, and the message names them
            lines.append(f"settings: {message}")
        elif os.environ.get(variable) or path is None:
            lines.append(f"environment: {variable}: {message}")
        else:
            lines.append(f"{path}: [{place[0]}] {place[1]}: {message}")
    return "\n".join(lines)


def _unknown_names(content: dict[str, Any], known: Iterable[str]) -> list[str]:
    tree: dict[str, list[str]] = {}
    for variable in known:
        group, _, key = variable.lower().partition("_")
        tree.setdefault(group, []).append(key)
    problems = []
    for name, table in content.items():
        if name not in tree:
            problems.append(_misplaced(name, table, tree))
        elif not isinstance(table, dict):
            problems.append(f"{name}: must be a table: write [{name}] and the settings below it")
        else:
            unknown = (key for key in table if key not in tree[name])
            problems += [f"[{name}] {key}: no such setting{_elsewhere(key, name, tree)}" for key in unknown]
    return problems


def _misplaced(name: str, table: object, tree: dict[str, list[str]]) -> str:
    tables = ", ".join(f"[{group}]" for group in tree)
    if isinstance(table, dict):
        return f"[{name}]: no such table{_nearest(name, tree)}; there are {tables}"
    owners = [group for group, keys in tree.items() if name in keys]
    where = f"below [{owners[0]}]" if owners else f"below one of {tables}"
    return f"{name}: stands outside of the tables: settings stand {where}"


def _elsewhere(key: str, group: str, tree: dict[str, list[str]]) -> str:
    owners = [other for other, keys in tree.items() if key in keys]
    prefix = f"{group}_"
    if key.lower().removeprefix(prefix) in tree[group]:
        return f"; in the file it is {key.lower().removeprefix(prefix)}"
    return f"; it belongs below [{owners[0]}]" if owners else _nearest(key, tree[group])


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
