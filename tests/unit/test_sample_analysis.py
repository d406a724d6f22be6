"""The sample analysis, imported as a module and judged by numpy and by published figures."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sandbox import sample
from agent.sandbox.sample.analysis.distributions import f_survival, incomplete_beta, t_quantile, t_survival
from agent.sandbox.sample.analysis.inputs import InputError, Parameters, read_parameters, read_table
from agent.sandbox.sample.analysis.regression import bootstrap_slopes, compare, fit, models, percentile_interval
from agent.sandbox.sample.analysis.report import CSV_COLUMNS, heading, label, plain
from agent.sandbox.sample.analysis.run import POOLED, Findings, analyse

SAMPLE = Path(sample.__file__).parent
PARAMETERS: dict[str, Any] = {"data": "table.csv", "response": "y", "predictor": "x", "group": "g"}


def silent(_: str) -> None:
    """Hear nothing."""


@pytest.fixture(scope="module")
def penguins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Path, list[str], list[str]]:
    """The whole analysis of the sample's own inputs: findings, outputs, lines said, warnings."""
    outputs = tmp_path_factory.mktemp("outputs")
    said: list[str] = []
    warned: list[str] = []
    return analyse(SAMPLE, outputs, say=said.append, warn=warned.append), outputs, said, warned


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_inputs(tmp_path, PARAMETERS, "g,x,y\na,1,2\na,2,3\na,3,5\nb,1,1\nb,2,4\nb,3,6\n")
    return tmp_path


def write_inputs(directory: Path, parameters: dict[str, Any] | str, table: str) -> None:
    text = parameters if isinstance(parameters, str) else json.dumps(parameters)
    (directory / "parameters.json").write_text(text, encoding="utf-8")
    (directory / "table.csv").write_text(table, encoding="utf-8")


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 10, 2.2281389),
        (0.95, 5, 2.0150484),
        (0.995, 30, 2.7499957),
        (0.975, 340, 1.9669658),
    ],
)
def test_t_quantiles_are_those_of_the_tables(probability: float, freedom: float, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("f", "one", "two", "expected"), [(4.9646027, 1, 10, 0.05), (3.3258345, 5, 10, 0.05), (9.5491, 2, 5, 0.0196)]
)
def test_f_probabilities_are_those_of_the_tables(f: float, one: float, two: float, expected: float) -> None:
    assert f_survival(f, one, two) == pytest.approx(expected, rel=2e-3)


@given(a=st.floats(0.1, 200), b=st.floats(0.1, 200), steps=st.integers(0, 1024))
def test_incomplete_beta_is_symmetric_and_a_probability(a: float, b: float, steps: int) -> None:
    x = steps / 1024  # of which 1 - x is exact
    value = incomplete_beta(a, b, x)
    assert -1e-12 <= value <= 1 + 1e-12
    assert value + incomplete_beta(b, a, 1 - x) == pytest.approx(1, abs=1e-6)


@given(probability=st.floats(0.5, 0.9999), freedom=st.integers(1, 1000))
def test_the_t_quantile_inverts_the_distribution(probability: float, freedom: int) -> None:
    assert t_survival(t_quantile(probability, freedom), freedom) == pytest.approx(1 - probability, rel=1e-6)


def test_a_fit_is_numpys(penguins: tuple[Findings, Path, list[str], list[str]]) -> None:
    for fitted in (*penguins[0].groups, penguins[0].pooled):
        x, y = fitted.observations.predictor, fitted.observations.response
        (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
        assert fitted.line.slope == pytest.approx(slope)
        assert fitted.line.intercept == pytest.approx(intercept)
        assert fitted.line.slope_error == pytest.approx(np.sqrt(covariance[0, 0]))
        assert fitted.line.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_the_penguins_are_those_of_the_literature(penguins: tuple[Findings, Path, list[str], list[str]]) -> None:
    findings, _, said, warned = penguins
    assert [(g.line.name, g.line.n) for g in findings.groups] == [("Adelie", 151), ("Chinstrap", 68), ("Gentoo", 123)]
    # R: lm(body_mass_g ~ flipper_length_mm, palmerpenguins::penguins) as in the package's own articles
    assert findings.pooled.line.slope == pytest.approx(49.69, abs=0.005)
    assert findings.pooled.line.intercept == pytest.approx(-5780.83, abs=0.005)
    assert findings.pooled.line.slope_error == pytest.approx(1.518, abs=0.0005)
    assert findings.pooled.line.r_squared == pytest.approx(0.759, abs=0.0005)
    assert (findings.table.rows, findings.table.dropped) == (344, 2)
    assert [line.split(":")[0] for line in warned] == ["penguins.csv line 5", "penguins.csv line 273"]
    assert said[0].startswith("read penguins.csv")
    assert any("bootstrap" in line for line in said)


def test_bootstrap_and_least_squares_agree_about_the_penguins(
    penguins: tuple[Findings, Path, list[str], list[str]],
) -> None:
    for fitted in penguins[0].groups:
        widths = (fitted.bootstrap_high - fitted.bootstrap_low) / (fitted.line.slope_high - fitted.line.slope_low)
        assert 0.7 < widths < 1.3
        assert fitted.bootstrap_low < fitted.line.slope < fitted.bootstrap_high


def test_the_outputs_hold_what_was_found(penguins: tuple[Findings, Path, list[str], list[str]]) -> None:
    findings, outputs, _, _ = penguins
    with (outputs / "regression.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [row["group"] for row in rows] == ["Adelie", "Chinstrap", "Gentoo", POOLED]
    assert float(rows[-1]["slope"]) == pytest.approx(findings.pooled.line.slope, rel=1e-5)
    image = (outputs / "regression.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(image) > 20_000
    summary = (outputs / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("# Body mass against flipper length, by species\n")
    assert "| Gentoo | 123 | 54.62 |" in summary


def test_the_same_seed_gives_the_same_bytes(
    penguins: tuple[Findings, Path, list[str], list[str]], tmp_path: Path
) -> None:
    analyse(SAMPLE, tmp_path, say=silent, warn=silent)
    for name in ("regression.csv", "regression.png", "summary.md"):
        assert (tmp_path / name).read_bytes() == (penguins[1] / name).read_bytes()


@given(
    slope=st.floats(-100, 100),
    intercept=st.floats(-1000, 1000),
    x=st.lists(st.integers(-1000, 1000), min_size=3, max_size=40, unique=True),
)
def test_points_on_a_line_give_that_line(slope: float, intercept: float, x: list[int]) -> None:
    points = np.array(x, dtype=np.float64)
    line = fit("line", points, intercept + slope * points, 0.95)
    assert line.slope == pytest.approx(slope, abs=1e-6)
    assert line.intercept == pytest.approx(intercept, abs=1e-5)
    assert line.slope_low <= line.slope <= line.slope_high


def test_the_band_is_narrowest_at_the_mean() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0, 9.0])
    line = fit("line", x, np.array([1.0, 3.0, 2.0, 5.0, 8.0]), 0.95)
    around = line.band(np.array([x.mean() - 1, x.mean(), x.mean() + 1]))
    assert around[1] < around[0] == pytest.approx(around[2])


def test_the_bootstrap_reports_its_progress_and_survives_samples_without_spread() -> None:
    heard: list[int] = []
    slopes = bootstrap_slopes(
        np.array([0.0, 1.0, 1.0]), np.array([0.0, 2.0, 2.0]), 1234, np.random.default_rng(1), heard.append
    )
    assert heard == [500, 1000, 1234]
    assert np.isnan(slopes).any()
    assert percentile_interval(slopes, 0.9) == pytest.approx((2.0, 2.0))


def test_models_are_nested_and_a_real_difference_is_found() -> None:
    x = np.arange(20.0)
    noise = np.tile([0.1, -0.1], 10)
    lines = [fit("up", x, x + noise, 0.95), fit("down", x, -x - noise, 0.95)]
    pooled = fit("all", np.concatenate([x, x]), np.concatenate([x + noise, -x - noise]), 0.95)
    one, parallel, separate = models(pooled, lines)
    assert one.residual_sum >= parallel.residual_sum >= separate.residual_sum
    found = compare(parallel, separate, pooled.n)
    assert found is not None
    assert found.freedom == (1, 36)
    assert found.p < 1e-20


def test_one_group_leaves_nothing_to_compare() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    line = fit("only", x, np.array([1.0, 2.5, 2.5, 4.0]), 0.95)
    one, parallel, _ = models(line, [line])
    assert compare(one, parallel, line.n) is None


def test_groups_are_all_groups_unless_they_are_named(inputs: Path, tmp_path: Path) -> None:
    assert [g.group for g in read_table(inputs, read_parameters(inputs), silent).groups] == ["a", "b"]
    (tmp_path / "parameters.json").write_text(json.dumps(PARAMETERS | {"groups": ["b"]}), encoding="utf-8")
    table = read_table(inputs, read_parameters(inputs), silent)
    assert [g.group for g in table.groups] == ["b"]
    assert (table.rows, table.dropped) == (3, 0)


def test_the_only_table_is_found_without_its_name(inputs: Path) -> None:
    parameters = read_parameters(inputs)
    nameless = Parameters(parameters.response, parameters.predictor, parameters.group)
    assert read_table(inputs, nameless, silent).name == "table.csv"
    shutil.copy(inputs / "table.csv", inputs / "again.csv")
    with pytest.raises(InputError, match=r"2 CSV files \(again.csv, table.csv\)"):
        read_table(inputs, nameless, silent)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ({"response": "y", "predictor": "x"}, "lacks group"),
        (PARAMETERS | {"sed": 1}, "unknown sed"),
        (PARAMETERS | {"response": 3}, "response must be the name of a column"),
        (PARAMETERS | {"data": "../table.csv"}, "data must be the name of a file"),
        (PARAMETERS | {"data": "other.csv"}, "no other.csv among the inputs"),
        (PARAMETERS | {"groups": "a"}, "groups must be a list"),
        (PARAMETERS | {"groups": ["a", "c"]}, "group 'c' has 0 usable rows"),
        (PARAMETERS | {"confidence_level": 95}, "between 0 and 1"),
        (PARAMETERS | {"bootstrap_resamples": 10**9}, "from 100 to 1000000"),
        (PARAMETERS | {"bootstrap_seed": True}, "whole number"),
        (PARAMETERS | {"predictor": "z"}, "has no column z; its columns are g, x, y"),
    ],
)
def test_wrong_parameters_are_named(inputs: Path, parameters: dict[str, Any] | str, message: str) -> None:
    write_inputs(inputs, parameters, (inputs / "table.csv").read_text(encoding="utf-8"))
    with pytest.raises(InputError, match=message):
        read_table(inputs, read_parameters(inputs), silent)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "has no column x, y, g"),
        ("g,x,y\n", "no usable row"),
        ("g,x,y\na,1,2\na,2,3\n", "2 usable rows; at least 3"),
        ("g,x,y\na,1,2\na,1,3\na,1,4\n", "one value of the predictor"),
        ("g,x,y\na,1,2\na,heavy,3\na,3,4\n", "line 3: x is 'heavy', which is not a number"),
        ("g,x,y\na,1,2\na,2,inf\na,3,4\n", "line 3: y is 'inf'"),
        ("g,x,y\na,1\na,2\na,3\n", "no usable row|0 usable rows"),
    ],
)
def test_a_table_that_cannot_be_used_is_explained(inputs: Path, table: str, message: str) -> None:
    write_inputs(inputs, PARAMETERS, table)
    with pytest.raises(InputError, match=message):
        read_table(inputs, read_parameters(inputs), silent)


def test_a_table_that_is_not_text_is_explained(inputs: Path) -> None:
    (inputs / "table.csv").write_bytes(b"g,x,y\n\xff\xfe")
    with pytest.raises(InputError, match="is not a CSV file in UTF-8"):
        read_table(inputs, read_parameters(inputs), silent)


def test_without_parameters_the_names_that_are_there_are_told(tmp_path: Path) -> None:
    (tmp_path / "penguins.csv").touch()
    with pytest.raises(InputError, match=r"no parameters.json among the inputs \(penguins.csv\)"):
        read_parameters(tmp_path)


def test_nothing_is_written_when_the_inputs_are_wrong(inputs: Path) -> None:
    outputs = inputs / "outputs"
    outputs.mkdir()
    write_inputs(inputs, PARAMETERS, "g,x,y\n")
    with pytest.raises(InputError):
        analyse(inputs, outputs, say=silent, warn=silent)
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("column", "words", "with_unit"),
    [("body_mass_g", "Body mass", "Body mass (g)"), ("g", "G", "G"), ("age", "Age", "Age"), ("a__mV", "A", "A (mV)")],
)
def test_columns_are_shown_in_words(column: str, words: str, with_unit: str) -> None:
    assert (plain(column), label(column)) == (words, with_unit)


def test_the_heading_says_what_is_set_against_what(penguins: tuple[Findings, Path, list[str], list[str]]) -> None:
    assert heading(penguins[0]) == "Body mass against flipper length"
