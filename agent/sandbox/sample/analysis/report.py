"""What the analysis leaves behind: a table, a plot, and a page of text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .run import Findings, Fitted

CSV_COLUMNS = (
    "group", "n", "slope", "slope_error", "slope_low", "slope_high", "bootstrap_low", "bootstrap_high",
    "intercept", "r_squared", "residual_sd",
)  # fmt: skip
# Okabe and Ito's palette, which people with any colour vision tell apart; markers differ as well.
_COLOURS = ("#D55E00", "#7B3294", "#00796B", "#0072B2", "#B8860B", "#56B4E9", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_POOLED_COLOUR = "#333333"
_STYLE: Any = {  # matplotlib lists every key as a Literal, and the list changes with its releases
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}
_UNITS = ("mm", "cm", "m", "g", "kg", "mg", "s", "ms", "ml", "l", "mv", "hz")


def write_csv(findings: Findings, path: Path) -> None:
    """Write one row for each group and one for all together."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for fitted in (*findings.groups, findings.pooled):
            line = fitted.line
            numbers = (
                line.slope, line.slope_error, line.slope_low, line.slope_high, fitted.bootstrap_low,
                fitted.bootstrap_high, line.intercept, line.r_squared, line.residual_sd,
            )  # fmt: skip
            writer.writerow([line.name, line.n, *(f"{number:.6g}" for number in numbers)])


def write_plot(findings: Findings, path: Path) -> None:
    """Draw the observations with their lines, and beside them the slopes with their intervals."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        scatter, slopes = figure.subplots(1, 2, width_ratios=(1.75, 1))
        _draw_observations(scatter, findings)
        _draw_slopes(slopes, findings)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def write_summary(findings: Findings, path: Path) -> None:
    """Write the findings in words, as Markdown."""
    path.write_text("\n".join(_summary(findings)) + "\n", encoding="utf-8")


def _draw_observations(axes: Axes, findings: Findings) -> None:
    for number, fitted in enumerate(findings.groups):
        colour, marker = _look(number)
        x, y, line = fitted.observations.predictor, fitted.observations.response, fitted.line
        axes.scatter(x, y, s=24, color=colour, marker=marker, alpha=0.45, linewidths=0, label=line.name)
        along = np.linspace(x.min(), x.max(), 60)
        height, half = line.at(along), line.band(along)
        axes.fill_between(along, height - half, height + half, color=colour, alpha=0.16, linewidth=0)
        axes.plot(along, height, color=colour, linewidth=2.2)
    pooled = findings.pooled
    ends = np.array([pooled.observations.predictor.min(), pooled.observations.predictor.max()])
    axes.plot(
        ends, pooled.line.at(ends), color=_POOLED_COLOUR, linewidth=1.4, linestyle=(0, (5, 3)), label=pooled.line.name
    )
    axes.set_xlabel(label(findings.parameters.predictor))
    axes.set_ylabel(label(findings.parameters.response))
    axes.set_title(heading(findings))
    axes.legend(loc="upper left", handletextpad=0.4)


def _draw_slopes(axes: Axes, findings: Findings) -> None:
    rows = (*findings.groups, findings.pooled)
    for number, fitted in enumerate(rows):
        pooled = fitted is findings.pooled
        colour, marker = (_POOLED_COLOUR, "d") if pooled else _look(number)
        line, height = fitted.line, -number
        axes.plot([line.slope_low, line.slope_high], [height, height], color=colour, linewidth=2.6)
        axes.plot(
            [fitted.bootstrap_low, fitted.bootstrap_high], [height - 0.16] * 2, color=colour, linewidth=1.2, alpha=0.7
        )
        axes.plot(line.slope, height, color=colour, marker=marker, markersize=8)
        axes.annotate(f"{line.slope:.1f}", (line.slope, height), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set_yticks([-number for number in range(len(rows))], [f"{row.line.name}\nn = {row.line.n}" for row in rows])
    axes.set_ylim(-len(rows) + 0.45, 0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{_slope_label(findings)}   (thin lines: bootstrap)")
    axes.set_title(f"Slopes, {findings.parameters.confidence_level * 100:g} % intervals")


def _summary(findings: Findings) -> Iterator[str]:
    parameters, table = findings.parameters, findings.table
    level = f"{parameters.confidence_level * 100:g} %"
    yield f"# {heading(findings)}, by {plain(parameters.group).lower()}"
    yield ""
    yield f"{table.rows - table.dropped} of {table.rows} rows of `{table.name}`; {table.dropped} lack a value."
    yield ""
    yield f"| {parameters.group} | n | slope | {level} interval | bootstrap | R² |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for row in (*findings.groups, findings.pooled):
        yield _summary_row(row)
    yield ""
    yield f"Slopes in {_slope_label(findings)}. Bootstrap: {parameters.bootstrap_resamples} resamples of the rows,"
    yield f"seed {parameters.bootstrap_seed}, percentile intervals."
    yield ""
    yield "| model | parameters | residual sum of squares | AIC (difference to the best) |"
    yield "| --- | ---: | ---: | ---: |"
    best = min(model.aic for model in findings.models)
    for model in findings.models:
        yield f"| {model.name} | {model.parameters} | {model.residual_sum:.6g} | {model.aic - best:.1f} |"
    yield ""
    for found in findings.comparisons:
        better = found.p < 1 - parameters.confidence_level
        verdict = (
            "explains more than its additional parameters must" if better else "explains no more than chance would"
        )
        yield f"- **{found.larger}** {verdict}, compared with {found.smaller}:"
        yield f"  F({found.freedom[0]}, {found.freedom[1]}) = {found.f:.2f}, p = {found.p:.2g}."


def _summary_row(row: Fitted) -> str:
    line = row.line
    return (
        f"| {line.name} | {line.n} | {line.slope:.2f} | {line.slope_low:.2f} to {line.slope_high:.2f}"
        f" | {row.bootstrap_low:.2f} to {row.bootstrap_high:.2f} | {line.r_squared:.3f} |"
    )


def _look(number: int) -> tuple[str, str]:
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]


def heading(findings: Findings) -> str:
    """Return what is set against what, as "Body mass against flipper length"."""
    return f"{plain(findings.parameters.response)} against {plain(findings.parameters.predictor).lower()}"


def plain(column: str) -> str:
    """Return a column's name in words without its unit: `body_mass_g` is `Body mass`."""
    words, _ = _split_unit(column)
    return words[:1].upper() + words[1:]


def label(column: str) -> str:
    """Return a column's name in words with its unit: `body_mass_g` is `Body mass (g)`."""
    words, unit = _split_unit(column)
    return words[:1].upper() + words[1:] + (f" ({unit})" if unit else "")


def _slope_label(findings: Findings) -> str:
    units = (_split_unit(findings.parameters.response)[1], _split_unit(findings.parameters.predictor)[1])
    if all(units):
        return f"{units[0]} per {units[1]}"
    return f"{plain(findings.parameters.response).lower()} per {plain(findings.parameters.predictor).lower()}"


def _split_unit(column: str) -> tuple[str, str]:
    words = column.replace("_", " ").split()
    if len(words) > 1 and words[-1].lower() in _UNITS:
        return " ".join(words[:-1]), words[-1]
    return " ".join(words), ""
