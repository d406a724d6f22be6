"""The rules for alerts and the board: they are valid, ask for numbers that there are, and lead to the runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.metrics import Metrics, Numbers
from tests.unit.test_docs import ROOT, anchors

RULES = ROOT / "config/prometheus-rules.yaml"
CASES = ROOT / "config/prometheus-rules.test.yaml"
BOARD = ROOT / "config/grafana-board.json"


def promtool(*arguments: str | Path) -> str:
    program = shutil.which("promtool")
    assert program, "promtool is missing: `make setup-dev` installs it"
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def names_there_are() -> set[str]:
    metrics = Metrics()
    metrics.watch(bytes_moved=lambda: {"up": 0}, away={}, loop_ages=dict, held=lambda: 0, disk_free=lambda: 0)
    metrics.database(Numbers({}, 0, 0, 0, 0, 0, 0, 0))
    names = re.findall(r"^# TYPE (\w+) (\w+)", metrics.text().decode(), re.MULTILINE)
    histograms = {f"{name}_bucket" for name, kind in names if kind == "histogram"}
    return {name for name, _ in names} | histograms


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ovation_agent|process)_\w+", expression))


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", RULES)


def test_each_alert_fires_on_its_trouble_and_on_nothing_less() -> None:
    promtool("test", "rules", CASES)


def test_each_alert_has_a_case() -> None:
    tested = {
        case["alertname"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert tested == {alert["alert"] for alert in alerts()}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_each_alert_leads_to_its_paragraph(alert: dict[str, Any]) -> None:
    document, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert anchor in anchors((ROOT / document).read_text())


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_each_alert_asks_for_numbers_that_there_are(alert: dict[str, Any]) -> None:
    assert names_in(alert["expr"]) <= names_there_are()


def test_the_board_asks_for_numbers_that_there_are(tmp_path: Path) -> None:
    board = json.loads(BOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert set().union(*map(names_in, expressions)) <= names_there_are()
    rules = [{"record": f"board:{number}", "expr": each} for number, each in enumerate(expressions)]
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "board.yaml")


def test_the_runbook_lists_every_number() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    own = {name for name in names_there_are() if name.startswith("ovation_agent_") and not name.endswith("_bucket")}
    assert {name for name in own if f"`{name.removeprefix('ovation_agent_')}`" not in text} == set()
