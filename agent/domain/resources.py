"""What a run may use: what its image and its Activity wish, within what the operator allows.

The labels of the image and the properties of the Activity have the same names: `compute.cpus` (a whole number),
`compute.memory` (bytes, or a number with K, M, G or T, which are powers of 1024), `compute.gpus` (a whole number) and
`compute.time` (minutes, H:MM:SS, D-HH:MM:SS, or a number with s, m, h or d). A property goes before a label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

CPUS = "compute.cpus"
MEMORY = "compute.memory"
GPUS = "compute.gpus"
TIME = "compute.time"
NAMES = (CPUS, MEMORY, GPUS, TIME)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "": 60}
_MOST_BYTES = 1 << 50
_MOST_SECONDS = 366 * 86_400
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Resources:
    """So many CPUs, bytes of memory, GPUs and seconds; `None` is not said."""

    cpus: int | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    time_seconds: float | None = None

    def document(self) -> dict[str, float]:
        """Return what is said, as JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


NOTHING_SAID = Resources()


@dataclass(frozen=True, slots=True)
class Granted:
    """What a run was asked to have, what it gets, and a sentence for each wish that it does not get as it was made."""

    asked: Resources
    given: Resources
    notes: tuple[str, ...] = field(default=())

    def document(self) -> dict[str, object]:
        """Return it as the run's record has it."""
        return {"asked": self.asked.document(), "granted": self.given.document(), "notes": list(self.notes)}


def wishes(properties: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return an Activity's wishes; where people disagree, the one that comes first in the alphabet, with a mark."""
    found = {}
    for name in NAMES:
        values = sorted({value.strip() for value in properties.get(name, ()) if value.strip()})
        if values:
            found[name] = values[0] if len(values) == 1 else " or ".join(values)
    return found


def grant(labels: Mapping[str, str], asked: Mapping[str, str], default: Resources, most: Resources) -> Granted:
    """Return what a run gets.

    Args:
        labels: the image's.
        asked: the Activity's properties of the same names; they go before the labels.
        default: for what nobody wishes.
        most: what the operator allows; a wish beyond it is cut.
    """
    notes: list[str] = []
    wanted = Resources(
        cpus=_wish(CPUS, labels, asked, notes, _count),
        memory_bytes=_wish(MEMORY, labels, asked, notes, _memory),
        gpus=_wish(GPUS, labels, asked, notes, _count_or_none),
        time_seconds=_wish(TIME, labels, asked, notes, _time),
    )
    given = {}
    for name, label in zip(("cpus", "memory_bytes", "gpus", "time_seconds"), NAMES, strict=True):
        wish, limit = getattr(wanted, name), getattr(most, name)
        value = getattr(default, name) if wish is None else wish
        if value is not None and limit is not None and value > limit:
            if wish is not None:
                notes.append(f"{label}: {_human(name, wish)} were asked for, {_human(name, limit)} are allowed here")
            value = limit
        given[name] = value
    return Granted(wanted, Resources(**given), tuple(notes))


def _wish(
    name: str,
    labels: Mapping[str, str],
    asked: Mapping[str, str],
    notes: list[str],
    read: Callable[[str], int | None],
) -> int | None:
    for source, where in ((asked, "property"), (labels, "label")):
        text = source.get(name, "").strip()
        if not text:
            continue
        value = read(text)
        if value is not None:
            return value
        notes.append(f"the {where} {name} is {text[:_SHOWN]!r}, which cannot be read; it is left out")
    return None


def _count(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[1-9]\d{0,4}", text, re.ASCII) else None


def _count_or_none(text: str) -> int | None:
    return 0 if text == "0" else _count(text)


def _memory(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)\s*([KMGT]?)(?:i?B)?", text, re.ASCII | re.IGNORECASE)
    value = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    return value if 0 < value < _MOST_BYTES else None


def _time(text: str) -> int | None:
    value = 0.0
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s*([smhd]?)", text, re.ASCII | re.IGNORECASE):
        value = float(match[1]) * _SECONDS[match[2].lower()]
    elif match := re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,4}):(\d\d)(?::(\d\d))?", text, re.ASCII):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        value = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return int(value) if 1 <= value < _MOST_SECONDS else None


def _human(name: str, value: float) -> str:
    if name == "memory_bytes":
        unit = next((unit for unit in "TGMK" if value >= _UNITS[unit] and value % _UNITS[unit] == 0), "")
        return f"{int(value) // _UNITS[unit]} {unit}{'i' if unit else ''}B" if unit else f"{int(value)} bytes"
    if name == "time_seconds":
        return f"{value:g} s"
    return f"{value:g} {'CPUs' if name == 'cpus' else 'GPUs'}"
