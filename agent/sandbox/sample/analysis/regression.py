"""Least squares, its uncertainty, and the comparison of nested models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .distributions import f_survival, t_quantile

Floats = NDArray[np.float64]
_BLOCK = 500  # resamples at a time: bounds the memory, and gives the progress its steps


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line through one group, by ordinary least squares."""

    name: str
    n: int
    slope: float
    intercept: float
    slope_error: float  # standard error
    slope_low: float
    slope_high: float
    r_squared: float
    residual_sum: float  # of squares
    x_mean: float
    x_squares: float  # sum of squared deviations from the mean
    t_critical: float

    @property
    def residual_sd(self) -> float:
        """The residuals' standard deviation, in units of the response."""
        return math.sqrt(self.residual_sum / (self.n - 2))

    def at(self, x: Floats) -> Floats:
        """Return the line's height."""
        return self.intercept + self.slope * x

    def band(self, x: Floats) -> Floats:
        """Return the half width of the confidence band of the mean response."""
        return self.t_critical * self.residual_sd * np.sqrt(1 / self.n + (x - self.x_mean) ** 2 / self.x_squares)


@dataclass(frozen=True, slots=True)
class Model:
    """One way to describe all groups together."""

    name: str
    parameters: int
    residual_sum: float
    aic: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Does the larger of two nested models explain more than its additional parameters must?"""

    smaller: str
    larger: str
    f: float
    freedom: tuple[int, int]
    p: float


def fit(name: str, x: Floats, y: Floats, level: float) -> Line:
    """Fit a line to at least three points that do not share one `x`; `level` is the confidence level, as 0.95."""
    n = len(x)
    x_mean, y_mean = float(x.mean()), float(y.mean())
    x_squares = float(((x - x_mean) ** 2).sum())
    slope = float(((x - x_mean) * (y - y_mean)).sum()) / x_squares
    intercept = y_mean - slope * x_mean
    residual_sum = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y_mean) ** 2).sum())
    error = math.sqrt(residual_sum / (n - 2) / x_squares)
    critical = t_quantile(0.5 + level / 2, n - 2)
    return Line(
        name=name,
        n=n,
        slope=slope,
        intercept=intercept,
        slope_error=error,
        slope_low=slope - critical * error,
        slope_high=slope + critical * error,
        r_squared=1 - residual_sum / total if total > 0 else 1.0,
        residual_sum=residual_sum,
        x_mean=x_mean,
        x_squares=x_squares,
        t_critical=critical,
    )


def bootstrap_slopes(
    x: Floats, y: Floats, resamples: int, generator: np.random.Generator, progress: Callable[[int], None]
) -> Floats:
    """Return the slope of each of `resamples` samples of the rows with replacement; `progress` hears of each block.

    A sample that drew one `x` only has no slope and is NaN.
    """
    blocks = []
    for done in range(0, resamples, _BLOCK):
        rows = generator.integers(len(x), size=(min(_BLOCK, resamples - done), len(x)))
        xs, ys = x[rows], y[rows]
        xs = xs - xs.mean(axis=1, keepdims=True)
        spread = (xs**2).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            blocks.append(np.where(spread > 0, (xs * ys).sum(axis=1) / spread, np.nan))
        progress(min(resamples, done + _BLOCK))
    return np.concatenate(blocks)


def percentile_interval(values: Floats, level: float) -> tuple[float, float]:
    """Return the central interval that holds `level` of the values."""
    low, high = np.nanquantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def models(pooled: Line, lines: Sequence[Line]) -> tuple[Model, Model, Model]:
    """Describe one line for all, parallel lines, and a line for each group, from the smallest to the largest."""
    n, k = pooled.n, len(lines)
    separate = sum(line.residual_sum for line in lines)
    x_squares = sum(line.x_squares for line in lines)
    common = sum(line.slope * line.x_squares for line in lines) / x_squares
    parallel = separate + sum((line.slope - common) ** 2 * line.x_squares for line in lines)
    return (
        _model("one line for all", 2, pooled.residual_sum, n),
        _model("parallel lines", k + 1, parallel, n),
        _model("a line for each", 2 * k, separate, n),
    )


def compare(smaller: Model, larger: Model, n: int) -> Comparison | None:
    """Test two nested models of `n` observations with F; `None` when they have the same parameters or none is left."""
    added, left = larger.parameters - smaller.parameters, n - larger.parameters
    if added <= 0 or left <= 0 or larger.residual_sum <= 0:
        return None
    f = max(0.0, (smaller.residual_sum - larger.residual_sum) / added / (larger.residual_sum / left))
    return Comparison(smaller.name, larger.name, f, (added, left), f_survival(f, added, left))


def _model(name: str, parameters: int, residual_sum: float, n: int) -> Model:
    likelihood = n * math.log(residual_sum / n) if residual_sum > 0 else -math.inf
    return Model(name, parameters, residual_sum, likelihood + 2 * (parameters + 1))
