"""The analysis from its inputs to its outputs, in the order in which it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .inputs import Observations, Parameters, Table, read_parameters, read_table
from .regression import (
    Comparison,
    Line,
    Model,
    bootstrap_slopes,
    compare,
    fit,
    models,
    percentile_interval,
)

Say = Callable[[str], None]
_PROGRESS_STEPS = 4  # lines of progress in each group's bootstrap
POOLED = "all together"


@dataclass(frozen=True, slots=True)
class Fitted:
    """One group with its line and the bootstrap's interval for the slope."""

    observations: Observations
    line: Line
    bootstrap_low: float
    bootstrap_high: float


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the analysis found, ready to be written."""

    parameters: Parameters
    table: Table
    groups: tuple[Fitted, ...]
    pooled: Fitted
    models: tuple[Model, ...]
    comparisons: tuple[Comparison, ...]


def analyse(inputs: Path, outputs: Path, *, say: Say, warn: Say) -> Findings:
    """Read `inputs`, write `regression.csv`, `regression.png` and `summary.md` into `outputs`.

    Raises:
        InputError: an input is missing or is not what the analysis needs; nothing is written then.
    """
    started = time.monotonic()
    parameters = read_parameters(inputs)
    table = read_table(inputs, parameters, warn)
    sizes = ", ".join(f"{group.group} {len(group.predictor)}" for group in table.groups)
    say(f"read {table.name}: {table.rows} rows, {table.rows - table.dropped} usable ({sizes})")
    findings = find(parameters, table, say)

    # matplotlib takes longer to import than the numbers take to compute: they are shown first.
    from . import report

    for name, write in (
        ("regression.csv", report.write_csv),
        ("regression.png", report.write_plot),
        ("summary.md", report.write_summary),
    ):
        write(findings, outputs / name)
        say(f"wrote {name}")
    say(f"done in {time.monotonic() - started:.1f} s")
    return findings


def find(parameters: Parameters, table: Table, say: Say) -> Findings:
    """Fit each group and all together, and compare the two descriptions."""
    generator = np.random.default_rng(parameters.bootstrap_seed)
    groups = tuple(_fitted(group, parameters, generator, say) for group in table.groups)
    everything = Observations(
        POOLED,
        np.concatenate([group.predictor for group in table.groups]),
        np.concatenate([group.response for group in table.groups]),
    )
    pooled = _fitted(everything, parameters, generator, say)
    described = models(pooled.line, [group.line for group in groups])
    n = pooled.line.n
    pairs = ((described[0], described[1]), (described[1], described[2]))
    comparisons = tuple(found for pair in pairs if (found := compare(*pair, n)) is not None)
    for found in comparisons:
        say(f"{found.larger} against {found.smaller}: F = {found.f:.2f}, p = {found.p:.2g}")
    return Findings(parameters, table, groups, pooled, described, comparisons)


def _fitted(group: Observations, parameters: Parameters, generator: np.random.Generator, say: Say) -> Fitted:
    line = fit(group.group, group.predictor, group.response, parameters.confidence_level)
    resamples = parameters.bootstrap_resamples
    told = 0

    def progress(done: int) -> None:
        nonlocal told
        step = done * _PROGRESS_STEPS // resamples
        if step > told:
            told = step
            say(f"{group.group}: bootstrap {done} of {resamples}")

    slopes = bootstrap_slopes(group.predictor, group.response, resamples, generator, progress)
    low, high = percentile_interval(slopes, parameters.confidence_level)
    say(
        f"{group.group}: slope {line.slope:.2f} ({line.slope_low:.2f} to {line.slope_high:.2f};"
        f" bootstrap {low:.2f} to {high:.2f}), R² {line.r_squared:.3f}"
    )
    return Fitted(group, line, low, high)
