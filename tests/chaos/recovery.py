"""How long recovery took: noted by the harness, told by whichever process ran the test, printed as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest

PROMISED_SECONDS = 60.0
_PROPERTY = "recovery"


@dataclass(frozen=True, slots=True)
class Recovery:
    """How long it took from the last fault's clearing until every job had ended."""

    scenario: str
    faults: int
    jobs: int
    seconds: float


_NOTED: list[Recovery] = []


def note(recovery: Recovery) -> None:
    """Keep what was measured, until the test is over."""
    _NOTED.append(recovery)


def tell(item: pytest.Item) -> None:
    """Put what was noted into the test's report, which reaches the process that prints."""
    item.user_properties += [(_PROPERTY, asdict(recovery)) for recovery in _NOTED]
    _NOTED.clear()


def print_table(reporter: pytest.TerminalReporter, seed: str) -> None:
    """Print how long it took to recover, against what is promised; nothing when nothing was measured."""
    reports = [each for reports in reporter.stats.values() for each in reports if isinstance(each, pytest.TestReport)]
    properties = [each for report in reports if report.when == "teardown" for each in report.user_properties]
    found = [_read(value) for name, value in properties if name == _PROPERTY]
    if not found:
        return
    reporter.section(f"recovery after the last fault: {PROMISED_SECONDS:.0f} s are promised")
    reporter.write_line(f"{'scenario':<48} {'faults':>6} {'jobs':>6} {'times':>6} {'slowest':>8}")
    for scenario in dict.fromkeys(each.scenario for each in found):
        reporter.write_line(_line(scenario, [each for each in found if each.scenario == scenario]))
    reporter.write_line(f"CHAOS_SEED={seed}")


def _read(value: Any) -> Recovery:
    return Recovery(**value)


def _line(scenario: str, found: Sequence[Recovery]) -> str:
    faults, jobs = max(each.faults for each in found), max(each.jobs for each in found)
    slowest = max(each.seconds for each in found)
    late = "" if slowest <= PROMISED_SECONDS else "  too late"
    return f"{scenario:<48} {faults:>6} {jobs:>6} {len(found):>6} {slowest:>6.1f} s{late}"
