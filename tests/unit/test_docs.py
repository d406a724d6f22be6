"""The documents keep their word: links lead somewhere, examples parse, and every setting they name exists."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from agent import settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("config/**/*.md")])
EXAMPLE = ROOT / "config" / "agent.example.toml"
FENCE = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,})(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^ {0,3}(?P=fence)[`~]*[ ]*$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(?P<target>\S+?)>?\s*$", re.MULTILINE)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(?P<text>.+?)\s*#*\s*$", re.MULTILINE)
ANCHOR = re.compile(r"<a\s+(?:id|name)=\"(?P<name>[^\"]+)\"")
VARIABLE = re.compile(r"\b(?:OVATION|AGENT|JWT)_[A-Z0-9_]*[A-Z0-9]\b|\bAWS_(?:ENDPOINT|DEFAULT)[A-Z0-9_]*\b")
# Names the file to read, and so cannot stand in it.
OUTSIDE_THE_TREE = {"AGENT_CONFIG"}

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


class Example(NamedTuple):
    """A fenced block of a document."""

    line: int
    language: str
    text: str


def examples(text: str) -> Iterator[Example]:
    """Find the fenced blocks of a document."""
    for block in FENCE.finditer(text):
        yield Example(text.count("\n", 0, block.start()) + 1, block["language"].lower(), block["text"])


def prose(text: str) -> str:
    """Return a document without its code."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the anchors of a document, headings as the usual renderers of Markdown name them."""
    without_blocks = FENCE.sub("", text)
    found = {anchor["name"] for anchor in ANCHOR.finditer(without_blocks)}
    for heading in HEADING.finditer(without_blocks):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading["text"]).lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        name, count = slug, 0
        while name in found:
            count += 1
            name = f"{slug}-{count}"
        found.add(name)
    return found


def broken_links(document: Path) -> list[str]:
    """Return the links of a document to files and anchors that are not there."""
    text = document.read_text()
    without_code = prose(text)
    broken = []
    for link in [*LINK.finditer(without_code), *REFERENCE.finditer(without_code)]:
        target = urlsplit(link["target"])
        if target.scheme or target.netloc:
            continue
        path = document if not target.path else (document.parent / unquote(target.path))
        found = path.exists() and path.resolve().is_relative_to(ROOT.resolve())
        if found and target.fragment and path.suffix == ".md":
            found = target.fragment in anchors(path.read_text())
        if not found:
            broken.append(link["target"])
    return broken


def settings_in_example(text: str) -> set[str]:
    """Return the variables whose keys stand in the example file, set or commented out."""
    found = set()
    group = ""
    for line in text.splitlines():
        if table := re.match(r"#?\s*\[(\w+)\]\s*$", line):
            group = table[1]
        elif key := re.match(r"#?\s*(\w+)\s*=", line):
            found.add(f"{group}_{key[1]}".upper())
    return found


def test_there_are_documents() -> None:
    assert {ROOT / "README.md", ROOT / "CHANGELOG.md"} <= set(DOCUMENTS)


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


@every_document
def test_examples_parse(document: Path) -> None:
    parsers = {"toml": tomllib.loads, "json": json.loads}
    for example in examples(document.read_text()):
        if parse := parsers.get(example.language):
            try:
                parse(example.text)
            except ValueError as error:
                pytest.fail(f"{document.name}, line {example.line}: {error}")


@every_document
def test_text_is_tidy(document: Path) -> None:
    text = document.read_text()
    untidy = [number for number, line in enumerate(text.splitlines(), 1) if "\t" in line or line != line.rstrip()]
    assert untidy == [], "these lines have tabs or trailing spaces"
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


@every_document
def test_variables_exist(document: Path) -> None:
    named = set(VARIABLE.findall(document.read_text()))
    assert named - set(settings.variables()) - OUTSIDE_THE_TREE == set()


def test_every_setting_is_in_the_example() -> None:
    text = EXAMPLE.read_text()
    tomllib.loads(text)
    assert settings_in_example(text) == set(settings.variables())


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    document = tmp_path / "a.md"
    (tmp_path / "b.md").write_text("# Over here\n\n## Over `here`!\n\n```sh\n# not a heading\n```\n")
    document.write_text(
        "# Top\n[1](b.md) [2](b.md#over-here) [3](b.md#over-here-1) [4](#top) [5](https://example.org/x) `[6](none)`\n"
        "[7](none.md) [8](b.md#not-a-heading) [9](#none) [10](../b.md)\n\n[ref]: lost.md\n\n```\n[11](none)\n```\n"
    )
    assert broken_links(document) == ["none.md", "b.md#not-a-heading", "#none", "../b.md", "lost.md"]


def events_in_the_code() -> set[str]:
    """Return the names that the agent logs."""
    call = re.compile(r"logger\(\)\s*\.(?:debug|info|warning|error|exception)\(\s*\"([a-z_]+)\"")
    modules = [path for path in (ROOT / "agent").rglob("*.py") if "sandbox" not in path.parts]
    return {name for path in modules for name in call.findall(path.read_text())}


def test_recipes_name_events_that_there_are() -> None:
    text = (ROOT / "docs/operations.md").read_text().partition("### Five recipes")[2].partition("\n## ")[0]
    named = set(re.findall(r'\.event == "([a-z_]+)"', text))
    assert named
    assert named <= events_in_the_code()
