"""A search tree as a picture: .svg, .png or .pdf, by the ending of the path. Needs matplotlib (extra: reason)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specdec.search.layout import Layout, tree_layout
from specdec.search.search_tree import ROOT, NodeStatus
from specdec.search.view import chosen_node, is_told, node_records

__all__ = ["write_plot"]

_NARROWEST, _WIDEST = 5.0, 24.0  # inches


def write_plot(source: Any, path: str | Path, title: str = "") -> None:
    """Draw the tree with its leaves side by side. Colour is the score, a star an answer, gold the chosen path.

    Args:
        source: see `view.node_records`; texts dropped or in flight are left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: see `view.node_records`, or an ending that matplotlib does not know.
    """
    if find_spec("matplotlib") is None:
        raise ImportError('write_plot needs matplotlib. Fix: pip install "specdec[reason]", or use view.write_html')
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    records = node_records(source)
    kept = [node for node, record in enumerate(records) if node == ROOT or is_told(record)]
    number = {node: index for index, node in enumerate(kept)}
    parents = [number.get(records[node]["parent"], -1) for node in kept]
    layout = tree_layout(parents)
    figure = Figure(figsize=_size(layout), layout="constrained")
    axes = figure.add_subplot()
    _draw_edges(axes, parents, layout, number[chosen_node(source, records)])
    scores = _draw_nodes(axes, [records[node] for node in kept], layout)
    figure.colorbar(scores, ax=axes, label="score", shrink=0.6, pad=0.02)
    axes.set_title(title or f"{len(kept) - 1} steps, {sum(record['tokens'] for record in records)} tokens", fontsize=10)
    axes.axis("off")
    figure.savefig(path, dpi=150)


def _size(layout: Layout) -> tuple[float, float]:
    width, height = 0.28 * (max(layout.places) + 1) + 2, 0.7 * (max(layout.levels) + 1) + 0.8
    return min(_WIDEST, max(_NARROWEST, width)), min(_WIDEST, max(3.0, height))


def _draw_edges(axes: Any, parents: list[int], layout: Layout, chosen: int) -> None:
    from matplotlib.collections import LineCollection

    points = list(zip(layout.places, (-level for level in layout.levels)))
    best = set()
    while chosen > ROOT:
        best.add(chosen)
        chosen = parents[chosen]
    for nodes, colour, width in ((set(range(1, len(parents))) - best, "#b8c0ca", 0.9), (best, "#d19a20", 2.5)):
        lines = [(points[parents[node]], points[node]) for node in sorted(nodes)]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, zorder=1))


def _draw_nodes(axes: Any, records: list[dict[str, Any]], layout: Layout) -> Any:
    """Returns what a colour bar needs."""
    scores = None
    for marker, size, answered in (("o", 40, False), ("*", 170, True)):
        nodes = [node for node in range(1, len(records)) if (records[node]["status"] == NodeStatus.ANSWERED) == answered]
        values = [
            float("nan") if records[node]["unscored"] or records[node]["q"] is None else records[node]["q"] for node in nodes
        ]
        xs, ys = [layout.places[node] for node in nodes], [-layout.levels[node] for node in nodes]
        style = {"marker": marker, "cmap": "viridis", "vmin": 0, "vmax": 1, "edgecolors": "#333", "linewidths": 0.6, "zorder": 2}
        scores = axes.scatter(xs, ys, size, values, plotnonfinite=True, **style)
    axes.scatter(layout.places[ROOT], 0, 80, "#555", marker="s", zorder=2)
    return scores
