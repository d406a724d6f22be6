"""Chains of runs for people: as text, and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.console import show_json, show_table
from agent.errors import ConfigurationError
from agent.logs import printable

__all__ = ["draw", "show_chain", "show_comparison", "show_json"]

_MOST_NAMED = 12
_COLOURS = {"run": "#3b6ea5", "image": "#8a5fa3", "file": "#4f7f4f", "person": "#a5673b", "Activity": "#777777"}


def show_chain(chain: dict[str, Any]) -> None:
    """Print each run with what went into it and what came of it, the one that was asked for first."""
    runs = {run["job_id"]: run for run in chain["runs"]}
    for run in chain["runs"]:
        print("\n".join(printable(line) for line in _told(run, runs)) + "\n")  # noqa: T201 this is the command's answer


def _told(run: dict[str, Any], runs: dict[str, Any]) -> Iterator[str]:
    yield f"run {run['run']} of {run['activity_name']}: {run['state']}  (job {run['job_id']})"
    if run["started_at"]:
        yield f"  when    {run['started_at']} to {run['finished_at'] or 'now'}"
    yield f"  who     {run['requested_by'] or 'nobody asked: it was started by ' + run['trigger']}"
    yield f"  image   {_origin(run['image'], runs)}"
    for file in run["inputs"]:
        yield f"  input   {_origin(file, runs)}"
    for file in run["outputs"][:_MOST_NAMED]:
        digest = f"  sha256 {file['sha256'][:12]}…" if file["sha256"] else ""
        yield f"  output  {file['name']}  ({file['id']}){digest}"
    if len(run["outputs"]) > _MOST_NAMED:
        yield f"  output  and {len(run['outputs']) - _MOST_NAMED} more"


def _origin(file: dict[str, Any], runs: dict[str, Any]) -> str:
    shown = f"{file['name']}  ({file['id']})"
    if maker := runs.get(file["made_by"] or ""):
        return f"{shown}  ← run {maker['run']} of {maker['activity_name']}"
    if file["activities"]:
        return f"{shown}  in Ovation also with {', '.join(file['activities'][:_MOST_NAMED])}"
    return shown


def show_comparison(job: dict[str, Any], comparison: dict[str, Any]) -> None:
    """Say which outputs of a repetition are the same."""
    found = [(each["path"], each["result"]) for each in comparison["outputs"]]
    show_table(("output", "result"), found)
    others = sum(result != "identical" for _, result in found)
    if job["state"] != "succeeded":
        print(f"\nthe repetition {job['state']}")  # noqa: T201
    elif others:
        print(f"\n{others} of {len(found)} outputs are not as they were")  # noqa: T201
    else:
        print(f"\nall {len(found)} outputs are byte-identical")  # noqa: T201


def draw(chain: dict[str, Any], path: Path) -> None:
    """Draw a chain from left to right into an SVG or PNG file.

    Raises:
        ConfigurationError: what draws is not installed, or the file cannot be written.
    """
    try:
        import matplotlib as mpl
        import networkx as nx
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError("--graph needs matplotlib and networkx: install ovation-agent[demo]") from None
    graph = _graph(nx, chain)
    if graph.number_of_nodes() == 0:
        raise ConfigurationError("there is nothing to draw: the run has neither inputs nor outputs yet")
    places = nx.multipartite_layout(graph, subset_key="column")
    columns = [graph.nodes[key]["column"] for key in graph]
    height = max(columns.count(column) for column in set(columns))
    figure = Figure(figsize=(3.2 * (max(columns) + 1), max(2.5, 0.55 * height + 1)), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.margins(0.18, 0.12)
    for is_run, margin in ((True, _RUN_MARGIN), (False, _MARGIN)):
        edges = [edge for edge in graph.edges if (graph.nodes[edge[1]]["kind"] == "run") == is_run]
        nx.draw_networkx_edges(
            graph, places, edges, ax=axes, edge_color="#999999", node_size=600, arrowsize=12, min_target_margin=margin
        )
    for key, (x, y) in places.items():
        kind, label = graph.nodes[key]["kind"], graph.nodes[key]["label"]
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": _COLOURS[kind], "linewidth": 1.6}
        text = axes.text(x, y, _short(label), ha="center", va="center", fontsize=8, bbox=box)
        text.set_parse_math(False)
    try:
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ovation-agent"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise ConfigurationError(f"--graph: {path}: {error.strerror}") from None


_RUN_MARGIN, _MARGIN = 52, 44  # half the width of a box, in points
_Node = tuple[str, str, str]


def _graph(nx: Any, chain: dict[str, Any]) -> Any:
    """Return the chain as a graph; `column` says how far to the right a node is."""
    graph = nx.DiGraph()
    for source, target in _edges(chain):
        for key, kind, label in (source, target):
            graph.add_node(key, kind=kind, label=label)
        graph.add_edge(source[0], target[0])
    for column, keys in enumerate(nx.topological_generations(graph)):
        for key in keys:
            graph.nodes[key]["column"] = column
    for key in [key for key, degree in graph.in_degree() if degree == 0]:  # beside the run that it went into
        graph.nodes[key]["column"] = min(graph.nodes[after]["column"] for after in graph.successors(key)) - 1
    return graph


def _edges(chain: dict[str, Any]) -> Iterator[tuple[_Node, _Node]]:
    for run in chain["runs"]:
        node = (run["job_id"], "run", f"{run['activity_name']}\nrun {run['run']}: {run['state']}")
        yield (run["image"]["id"], "image", run["image"]["name"]), node
        if run["requested_by"]:
            yield (f"person {run['requested_by']}", "person", run["requested_by"]), node
        for file in run["inputs"]:
            for name in file["activities"]:
                yield (f"Activity {name}", "Activity", name), (file["id"], "file", file["name"])
            yield (file["id"], "file", file["name"]), node
        for file in run["outputs"][:_MOST_NAMED]:
            yield node, (file["id"], "file", file["name"])
        if len(run["outputs"]) > _MOST_NAMED:
            more = f"{len(run['outputs']) - _MOST_NAMED} more"
            yield node, (f"more of {run['job_id']}", "file", more)


def _short(label: str) -> str:
    lines = [printable(line) for line in label.splitlines()]
    return "\n".join(line if len(line) <= 24 else f"{line[:11]}…{line[-11:]}" for line in lines)  # noqa: PLR2004
