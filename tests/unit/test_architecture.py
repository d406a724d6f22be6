"""The documents describe the code that is there: diagram, settings, modules, tables, log events, fault classes."""

from __future__ import annotations

import ast
import importlib.util
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from agent import settings
from agent.domain.job import TRANSITIONS, FaultClass, State

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
OPERATIONS = ROOT / "docs" / "operations.md"
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


@pytest.fixture(name="generator", scope="module")
def load_generator() -> ModuleType:
    """Load config/generate-docs, which is a program and has no suffix."""
    loader = SourceFileLoader("generate_docs", str(ROOT / "config" / "generate-docs"))
    loader.set_data = lambda *_, **__: None  # type: ignore[method-assign]  # no __pycache__ in config/
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def sources() -> list[Path]:
    """Return the agent's modules; the sandbox is a world of its own."""
    found = sorted((ROOT / "agent").rglob("*.py"))
    return [path for path in found if "sandbox" not in path.parts]


def events(tree: ast.AST) -> set[str]:
    """Return the names of the events that a module logs with `logger().level("event", ...)`."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(
                    attr=level,
                    value=ast.Call(func=ast.Name(id="logger") | ast.Attribute(attr="logger")),
                ),
                args=[event, *_],
            ) if level in LEVELS:
                assert isinstance(event, ast.Constant), f"line {node.lineno}: an event's name is a plain string"
                found.add(str(event.value))
    return found


def first_cells(text: str, heading: str) -> set[str]:
    """Return what stands in backquotes in the first column of the first table after a heading."""
    section = text.partition(heading)[2]
    table = re.search(r"^\|.*\n\|[ -|]+\n(?P<rows>(?:\|.*\n)+)", section, re.MULTILINE)
    assert table, f"no table after {heading!r}"
    cells = [row.split("|")[1] for row in table["rows"].splitlines()]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("document", [ARCHITECTURE, OPERATIONS], ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(generator: ModuleType, document: Path) -> None:
    text = document.read_text()
    assert "<!-- generated: " in text
    assert generator.generated(text) == text, "run config/generate-docs"


def test_the_diagram_is_the_transition_table(generator: ModuleType) -> None:
    """Read the diagram back, so that a mistake of the generator shows."""
    arrows = re.findall(r"^    (\S+) --> (\S+)$", generator.state_diagram(), re.MULTILINE)
    assert f"{generator.state_diagram()}\n" in ARCHITECTURE.read_text()
    drawn = {(State(before), State(after)) for before, after in arrows if "[*]" not in {before, after}}
    assert drawn == {(before, after) for before, targets in TRANSITIONS.items() for after in targets}
    assert [after for before, after in arrows if before == "[*]"] == [State.QUEUED]
    assert {before for before, after in arrows if after == "[*]"} == {
        state for state in State if not TRANSITIONS[state]
    }


def test_another_transition_table_makes_another_diagram(generator: ModuleType) -> None:
    shorter = {**TRANSITIONS, State.QUEUED: frozenset({State.STAGING})}
    assert generator.state_diagram(shorter) != generator.state_diagram()


def test_every_state_has_its_paragraph() -> None:
    section = ARCHITECTURE.read_text().partition("## States")[2].partition("\n## ")[0]
    told = {
        name.strip()
        for heading in re.findall(r"^- \*\*([^*]+)\.\*\*", section, re.MULTILINE)
        for name in heading.split(",")
    }
    assert told == set(State)


def test_every_setting_is_in_the_table() -> None:
    assert set(settings.variables()) <= first_cells(OPERATIONS.read_text(), "## Settings")


def test_every_module_is_in_the_house() -> None:
    told = first_cells(ARCHITECTURE.read_text(), "## The house")
    there = {str(path.relative_to(ROOT)) for path in sources() if path.name != "__init__.py"}
    assert there - told == set(), "say in docs/architecture.md what these are for"
    assert {name for name in told if not (ROOT / name).exists()} == set()


def test_every_event_of_the_log_is_explained() -> None:
    logged = set().union(*(events(ast.parse(path.read_text())) for path in sources()))
    assert first_cells(OPERATIONS.read_text(), "## Log") == logged


def test_an_event_is_found() -> None:
    tree = ast.parse(
        'logs.logger().info("one", x=1)\nlogger().exception("two")\nlogger().bind(x=1)\nother().info("three")'
    )
    assert events(tree) == {"one", "two"}


def test_every_table_of_the_database_is_explained() -> None:
    code = [*(ROOT / "agent" / "db").glob("migrations/*.sql"), ROOT / "agent" / "db" / "migrate.py"]
    made = {name for path in code for name in re.findall(r"CREATE TABLE (?:IF NOT EXISTS )?(\w+)", path.read_text())}
    assert first_cells(ARCHITECTURE.read_text(), "## The database") == made


@pytest.mark.parametrize(
    ("document", "heading"),
    [(ARCHITECTURE, "Fault classes say"), (OPERATIONS, "### A run failed")],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_every_fault_class_is_explained(document: Path, heading: str) -> None:
    assert first_cells(document.read_text(), heading) == set(FaultClass)
