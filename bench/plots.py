"""Figures of a benchmark's rows, PNG and SVG: `python -m bench.plots results/run.jsonl --out figures/`.

* speed_up: speed over the first baseline that ran, by category (or by group, where there are no categories).
* accepted: how many tokens a step emitted, as shares of all steps.
* budget: tokens a step against the node budget, for methods that ran with two or more.
* cost: milliseconds of a forward against its nodes, and what the cost model predicts of each budget beside what was measured.
* step: where the time of a step goes.

A figure without anything to show is left out. The last line on stdout is one JSON object that names the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from .log import read_log
from .metrics import Row, by_category, groups_of, medians, select, speed, speed_ratio, tokens_per_step
from .report import BASELINES, host_ms_per_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "main"]

Costs = dict[str, Any]
PHASES = {"forward": "0.75", "draft": "C0", "accept": "C2", "commit": "C1", "learn": "C3"}  # phase -> colour
LONGEST = 10  # steps that emitted more tokens share the last place
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True,
    "figure.dpi": 150, "legend.frameon": False, "axes.titlesize": "medium", "axes.titlelocation": "left", "svg.fonttype": "none",
}  # fmt: skip


def draw(rows: list[Row], costs: Costs, labels: list[str]) -> dict[str, Figure]:
    """Name -> figure, of those that have anything to show.

    Args:
        rows: one a task and method, see metrics.medians.
        costs: as in the log of a run; empty: unknown.
        labels: methods in the order of the legends.
    """
    figures = {
        "speed_up": speed_up(rows, labels),
        "accepted": accepted(rows, labels),
        "budget": budget(rows, labels),
        "cost": cost(rows, costs, labels),
        "step": step(rows, labels),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def speed_up(rows: list[Row], labels: list[str]) -> Figure | None:
    """One line a category, one mark a method; the line "all" has 95 % intervals over prompts."""
    baseline = next((name for name in BASELINES if name in labels), None)
    shown = [label for label in labels if label != baseline]
    if baseline is None or not shown:
        return None
    rows = by_category(rows)
    groups = groups_of(rows)
    figure, axes = _axes(8, max(1.2 + 0.32 * len(groups), 0.5 + 0.22 * len(shown)))
    for index, label in enumerate(shown):
        ratios = [speed_ratio(select(rows, label, group), select(rows, baseline, group)) for group in groups]
        heights = np.arange(len(groups)) + (index - (len(shown) - 1) / 2) * min(0.12, 0.7 / len(shown))
        marker, colour = "os^D"[index // 10 % 4], f"C{index}"  # ten colours, then other marks
        axes.plot([ratio.value for ratio in ratios], heights, marker, color=colour, ms=5, label=label)
        axes.plot([ratios[-1].low, ratios[-1].high], [heights[-1]] * 2, color=colour, lw=1.5)
    axes.axvline(1.0, color="0.4", lw=1)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"speed / {baseline}")
    axes.set_title("Speed-up by category (sum of tokens / sum of seconds)")
    _legend(axes)
    return figure


def accepted(rows: list[Row], labels: list[str]) -> Figure | None:
    """Shares of steps by the tokens that they emitted; methods that always emit one are left out."""
    counts = {label: _histogram(select(rows, label)) for label in labels}
    counts = {label: count for label, count in counts.items() if count[1:].sum()}
    if not counts:
        return None
    shares = np.array([100 * count / count.sum() for count in counts.values()])
    figure, axes = _axes(8, 1.2 + 0.36 * len(counts))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 60 else "black")
    means = [f"{label} ({tokens_per_step(select(rows, label)):.2f})" for label in counts]
    axes.set_yticks(range(len(counts)), means)
    axes.set_xticks(range(LONGEST), [*map(str, range(1, LONGEST)), f"{LONGEST}+"])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("tokens emitted by a step")
    axes.set_title("Accepted lengths, % of steps (mean in brackets)")
    return figure


def budget(rows: list[Row], labels: list[str]) -> Figure | None:
    """Tokens a step of every method that ran with two budgets or more."""
    methods = _budgets(labels)
    if not methods:
        return None
    figure, axes = _axes(7, 4)
    for index, (method, budgets) in enumerate(methods.items()):
        values = [tokens_per_step(select(rows, f"{method}@{nodes}")) for nodes in budgets]
        axes.plot(budgets, values, "o-", color=f"C{index}", label=method)
    _node_axis(axes, {nodes for budgets in methods.values() for nodes in budgets})
    axes.set_ylim(bottom=1.0)
    axes.set_xlabel("node budget")
    axes.set_ylabel("tokens a step")
    axes.set_title("Tokens a step against the node budget")
    _legend(axes)
    return figure


def cost(rows: list[Row], costs: Costs, labels: list[str]) -> Figure | None:
    """The cost curve; under it predicted (dashed) and measured speed by budget, the best of each marked with a star."""
    if not costs:
        return None
    methods = _budgets(labels)
    figure, (above, *below) = _panels(2 if methods else 1)
    for index, (context, milliseconds) in enumerate(costs["forward_ms"].items()):
        above.plot(costs["nodes"], milliseconds, "o-", color=f"{0.2 + 0.4 * index}", label=f"after {context} tokens")
    _node_axis(above, costs["nodes"])
    above.set_ylim(bottom=0)
    above.set_ylabel("forward, ms")
    above.set_title("Cost of a forward against its nodes")
    above.legend(loc="upper left")
    if below:
        _speeds(below[0], rows, costs, methods)
    above.set_xlabel("nodes")
    return figure


def _speeds(axes: Axes, rows: list[Row], costs: Costs, methods: dict[str, list[int]]) -> None:
    for index, (method, budgets) in enumerate(methods.items()):
        each = [select(rows, f"{method}@{nodes}") for nodes in budgets]
        curves = {
            "predicted": [_predicted(mine, nodes, costs) for mine, nodes in zip(each, budgets)],
            "measured": [*map(speed, each)],
        }
        for kind, values in curves.items():
            line = "--" if kind == "predicted" else "-"
            axes.plot(budgets, values, line, color=f"C{index}", lw=1.5, label=f"{method}, {kind}")
            best = int(np.argmax(values))
            axes.plot(budgets[best], values[best], "*", color=f"C{index}", ms=13, mfc="white" if kind == "predicted" else None)
    _node_axis(axes, {nodes for budgets in methods.values() for nodes in budgets})
    axes.set_ylim(bottom=0)
    axes.set_xlabel("node budget")
    axes.set_ylabel("tokens a second")
    axes.set_title("Speed by budget; stars: the best, predicted (hollow) and measured")
    _legend(axes)


def _predicted(rows: list[Row], nodes: int, costs: Costs) -> float:
    """Tokens a second by the cost model at its shortest context, if every tree were full: a size costs what the next measured one
    costs."""
    curve = next(iter(costs["forward_ms"].values()))
    place = min(int(np.searchsorted(costs["nodes"], nodes)), len(curve) - 1)
    return 1e3 * tokens_per_step(rows) / (curve[place] + host_ms_per_step(rows))


def step(rows: list[Row], labels: list[str]) -> Figure | None:
    """Milliseconds of a step by phase, one bar a method."""
    split = {label: _split(select(rows, label)) for label in labels}
    split = {label: each for label, each in split.items() if each}
    if not split:
        return None
    figure, axes = _axes(8, 1.4 + 0.36 * len(split))
    left = np.zeros(len(split))
    for phase, colour in PHASES.items():
        widths = np.array([each.get(phase, 0.0) for each in split.values()])
        axes.barh(list(split), widths, left=left, color=colour, label=phase, height=0.7)
        left += widths
    for place, (end, each) in enumerate(zip(left, split.values())):
        axes.text(end, place, f" {end:.1f}, host {end - each['forward']:.2f}", va="center", fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.25 * left.max())
    axes.set_xlabel("milliseconds a step")
    axes.set_title("Where the time of a step goes")
    _legend(axes)
    return figure


# ---- pieces ----------------------------------------------------------------------------------------------------------------


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure((8, 3.4 * count), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(count)))


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _node_axis(axes: Axes, nodes: Iterable[int]) -> None:
    ticks = sorted(nodes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()


def _budgets(labels: list[str]) -> dict[str, list[int]]:
    """Method -> its node budgets, ascending, where there are two or more; "auto" is none."""
    budgets: dict[str, list[int]] = {}
    for label in labels:
        method, _, nodes = label.rpartition("@")
        if nodes.isdecimal():
            budgets.setdefault(method, []).append(int(nodes))
    return {method: sorted(each) for method, each in budgets.items() if len(each) > 1}


def _by_name_and_budget(label: str) -> tuple[str, int]:
    method, _, nodes = label.rpartition("@")
    return (method, int(nodes)) if nodes.isdecimal() else (label, 0)


def _histogram(rows: list[Row]) -> np.ndarray:
    """[LONGEST]: steps that emitted 1, 2, ... tokens, all longer ones in the last place."""
    counts = np.zeros(LONGEST, np.int64)
    for row in rows:
        for tokens, times in enumerate(row.accepted):
            if tokens:
                counts[min(tokens, LONGEST) - 1] += times
    return counts


def _split(rows: list[Row]) -> dict[str, float]:
    """Milliseconds a step by phase; empty for peers."""
    steps = sum(row.steps for row in rows if row.times)
    return {phase: 1e3 * sum(row.times.get(phase, 0.0) for row in rows) / steps for phase in PHASES} if steps else {}


def main(
    log: Annotated[Path, typer.Argument(help="JSON-lines file that bench.run wrote")],
    out: Annotated[Path, typer.Option(help="folder of the figures")] = Path("figures"),
    methods: Annotated[str, typer.Option(help="only these, separated by commas, as the tables name them: none,auto@auto")] = "",
) -> None:
    """Draw the figures of one run."""
    console = Console(stderr=True)
    try:
        try:
            import matplotlib
        except ImportError as error:
            raise ValueError("plots need matplotlib; fix: pip install specdec[bench]") from error
        if not log.is_file():
            raise ValueError(f"log must be a file that bench.run --out wrote, got {log}")
        _, costs, rows = read_log(log)
        there = sorted({row.method for row in rows}, key=_by_name_and_budget)
        labels = [name for name in methods.split(",") if name] or there
        if unknown := set(labels) - set(there):
            raise ValueError(f"methods must be among {', '.join(there)}, got {', '.join(sorted(unknown))}")
        if not rows:
            raise ValueError(f"{log} has no row yet")
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with matplotlib.rc_context(STYLE):
        for name, figure in draw(medians(rows), costs, labels).items():
            for suffix in ("png", "svg"):
                files.append(str(out / f"{name}.{suffix}"))
                figure.savefig(files[-1])
    print(json.dumps({"bench": "plots", "files": files}))


if __name__ == "__main__":
    typer.run(main)
