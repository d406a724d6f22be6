"""The parameters file and the table, checked before anything is computed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PARAMETERS_NAME = "parameters.json"
MIN_ROWS = 3  # a line has two parameters; its error needs one observation more
MAX_RESAMPLES = 1_000_000
_MISSING_VALUES = frozenset({"", "NA", "N/A", "NaN", "nan", "null"})


class InputError(Exception):
    """An input is missing or is not what the analysis needs; the message says which one and what to do."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What to analyse and how."""

    response: str
    predictor: str
    group: str
    data: str | None = None  # the table's file name; needed only beside several CSV files
    groups: tuple[str, ...] = ()  # empty: all of them
    confidence_level: float = 0.95
    bootstrap_resamples: int = 10_000
    bootstrap_seed: int = 0


@dataclass(frozen=True, slots=True)
class Observations:
    """The two measurements of one group, row by row."""

    group: str
    predictor: NDArray[np.float64]
    response: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Table:
    """The usable rows of the data file, by group, and how many were not usable."""

    name: str
    groups: tuple[Observations, ...]
    rows: int
    dropped: int


def read_parameters(directory: Path) -> Parameters:
    """Read the parameters file in `directory`.

    Raises:
        InputError: it is not there, is not JSON, or names a parameter or a value that the analysis does not know.
    """
    path = directory / PARAMETERS_NAME
    if not path.is_file():
        raise InputError(
            f"there is no {PARAMETERS_NAME} among the inputs ({_listed(_names(directory))}): add one to the Activity"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{PARAMETERS_NAME} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{PARAMETERS_NAME} must be an object of names and values")
    known = {field.name: field for field in fields(Parameters)}
    if unknown := sorted(set(document) - set(known)):
        raise InputError(f"{PARAMETERS_NAME}: unknown {_listed(unknown)}; known are {_listed(known)}")
    required = {name for name, field in known.items() if field.default is MISSING}
    if missing := sorted(required - set(document)):
        raise InputError(f"{PARAMETERS_NAME} lacks {_listed(missing)}")
    return _checked(document)


def read_table(directory: Path, parameters: Parameters, warn: Callable[[str], None]) -> Table:
    """Read the rows that have all three columns, and warn of each row that has not.

    Raises:
        InputError: the file or a column is not there, a group is, but with too few rows, or a cell is not a number.
    """
    path = _data_path(directory, parameters)
    wanted = (parameters.predictor, parameters.response, parameters.group)
    kept: dict[str, list[tuple[float, float]]] = {group: [] for group in parameters.groups}
    rows = dropped = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if absent := [column for column in wanted if column not in columns]:
                raise InputError(f"{path.name} has no column {_listed(absent)}; its columns are {_listed(columns)}")
            for row in reader:
                group = (row[parameters.group] or "").strip()
                if parameters.groups and group not in parameters.groups:
                    continue
                rows += 1
                if missing := [column for column in wanted if _is_missing(row[column])]:
                    dropped += 1
                    warn(f"{path.name} line {reader.line_num}: no {_listed(missing)}, row dropped")
                    continue
                where = f"{path.name} line {reader.line_num}"
                x, y = (_number(row[column], f"{where}: {column}") for column in wanted[:2])
                kept.setdefault(group, []).append((x, y))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name} is not a CSV file in UTF-8: {error}") from error
    return Table(path.name, _observations(kept, path.name), rows, dropped)


def _checked(document: dict[str, object]) -> Parameters:
    text = {name: document[name] for name in ("response", "predictor", "group")}
    for name, value in text.items():
        if not isinstance(value, str) or not value:
            raise InputError(f"{PARAMETERS_NAME}: {name} must be the name of a column")
    data = document.get("data")
    if data is not None and (not isinstance(data, str) or "/" in data):
        raise InputError(f"{PARAMETERS_NAME}: data must be the name of a file among the inputs")
    groups = document.get("groups", [])
    if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
        raise InputError(f"{PARAMETERS_NAME}: groups must be a list of names")
    level = document.get("confidence_level", 0.95)
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise InputError(f"{PARAMETERS_NAME}: confidence_level must be a number between 0 and 1, as 0.95")
    return Parameters(
        response=str(text["response"]),
        predictor=str(text["predictor"]),
        group=str(text["group"]),
        data=data,
        groups=tuple(dict.fromkeys(groups)),
        confidence_level=float(level),
        bootstrap_resamples=_whole(document, "bootstrap_resamples", 10_000, 100, MAX_RESAMPLES),
        bootstrap_seed=_whole(document, "bootstrap_seed", 0, 0, 2**63 - 1),
    )


def _whole(document: dict[str, object], name: str, default: int, least: int, most: int) -> int:
    value = document.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{PARAMETERS_NAME}: {name} must be a whole number from {least} to {most}")
    return value


def _data_path(directory: Path, parameters: Parameters) -> Path:
    if parameters.data is not None:
        path = directory / parameters.data
        if not path.is_file():
            raise InputError(
                f"there is no {parameters.data} among the inputs ({_listed(_names(directory))}):"
                f" add it, or correct `data` in {PARAMETERS_NAME}"
            )
        return path
    tables = [name for name in _names(directory) if name.lower().endswith(".csv")]
    if len(tables) != 1:
        raise InputError(
            f"the inputs have {len(tables)} CSV files ({_listed(tables)}): name one as `data` in {PARAMETERS_NAME}"
        )
    return directory / tables[0]


def _observations(kept: dict[str, list[tuple[float, float]]], name: str) -> tuple[Observations, ...]:
    if not kept:
        raise InputError(f"{name} has no usable row")
    groups = []
    for group, pairs in sorted(kept.items()):
        if len(pairs) < MIN_ROWS:
            raise InputError(f"{name}: group {group!r} has {len(pairs)} usable rows; at least {MIN_ROWS} are needed")
        x, y = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
        if np.ptp(x) == 0:
            raise InputError(f"{name}: group {group!r} has one value of the predictor only: no line fits it")
        groups.append(Observations(group, x, y))
    return tuple(groups)


def _is_missing(cell: str | None) -> bool:
    return cell is None or cell.strip() in _MISSING_VALUES


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where} is {cell!r}, which is not a number")
    return value


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
