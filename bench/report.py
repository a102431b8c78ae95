"""Tables and the JSON summary of a benchmark's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.metrics import Row, agreement, groups_of, select, speed, speed_ratio, tokens_per_step

__all__ = ["BASELINES", "host_ms_per_step", "print_tables", "summary"]

BASELINES = ("model.generate", "none", "prompt_lookup", "assisted")
NOT_HOST = ("forward", "prefill")


def host_ms_per_step(rows: Sequence[Row]) -> float:
    """Milliseconds a step outside the model's forward: draft, accept, commit, learn; nan for peers."""
    steps = sum(row.steps for row in rows if row.times)
    seconds = sum(value for row in rows for part, value in row.times.items() if part not in NOT_HOST)
    return 1000 * seconds / steps if steps else float("nan")


def summary(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    """Everything the tables show, for a program to read."""
    return {
        "prompts": len({row.task for row in rows}),
        "methods": {label: _method_summary(rows, label) for label in labels},
        "ratios": {
            f"{label}/{baseline}": {key: _rounded(value) for key, value in asdict(speed_ratio(mine, theirs)).items()}
            for label, baseline, mine, theirs in _pairs(rows, labels)
        },
    }


def _method_summary(rows: Sequence[Row], label: str) -> dict[str, Any]:
    mine = select(rows, label)
    return {
        "tokens_per_step": _rounded(tokens_per_step(mine)),
        "tokens_per_second": _rounded(speed(mine)),
        "host_ms_per_step": _rounded(host_ms_per_step(mine)),
        "same_output": _rounded(agreement(mine, _reference(rows))),
        "groups": {
            group: {
                "tokens_per_step": _rounded(tokens_per_step(select(mine, label, group))),
                "tokens_per_second": _rounded(speed(select(mine, label, group))),
            }
            for group in groups_of(mine)[:-1]
        },
    }


def _rounded(value: float) -> float | None:
    """Four decimals; None where there is nothing to report, since JSON has no nan."""
    return None if value != value else round(value, 4)


def _reference(rows: Sequence[Row]) -> list[Row]:
    """Rows of the plainest method that ran: the output that all others should equal."""
    ran = {row.method for row in rows}
    return next((select(rows, name) for name in ("model.generate", "none") if name in ran), [])


def _pairs(rows: Sequence[Row], labels: Sequence[str]) -> list[tuple[str, str, list[Row], list[Row]]]:
    """(label, baseline, rows of each): every method by every baseline, the baselines among themselves too."""
    return [
        (label, baseline, select(rows, label), select(rows, baseline))
        for baseline in BASELINES
        if baseline in labels
        for label in labels
        if label != baseline
    ]


def print_tables(rows: Sequence[Row], labels: Sequence[str], console: Console) -> None:
    """Totals, then tokens a step and speed by group; a group's column is its name."""

    def steps_cell(label: str, group: str) -> str:
        return _text(tokens_per_step(select(rows, label, group)))

    def speed_cell(label: str, group: str) -> str:
        return _text(speed(select(rows, label, group)), 1)

    console.print(_totals(rows, labels))
    console.print(_grouped(rows, labels, "tokens a step", steps_cell))
    console.print(_grouped(rows, labels, "tokens a second", speed_cell))
    for baseline in BASELINES:
        if baseline in labels and len(labels) > 1:
            console.print(_grouped(rows, labels, f"speed / {baseline}", _ratio_cell(rows, baseline)))


def _ratio_cell(rows: Sequence[Row], baseline: str) -> Callable[[str, str], str]:
    def cell(label: str, group: str) -> str:
        return _text(speed_ratio(select(rows, label, group), select(rows, baseline, group)).value)

    return cell


def _totals(rows: Sequence[Row], labels: Sequence[str]) -> Table:
    baselines = [name for name in BASELINES if name in labels]
    prompts = len({row.task for row in rows})
    table = Table("method", title=f"{prompts} prompts; ratios of speed with 95 % intervals over prompts")
    for name in ("tok / step", "tok / s", *(f"x {name}" for name in baselines), "host ms / step", "same output"):
        table.add_column(name, justify="right")
    for label in labels:
        mine = select(rows, label)
        ratios = [speed_ratio(mine, select(rows, name)) for name in baselines]
        table.add_row(
            label,
            _text(tokens_per_step(mine)),
            _text(speed(mine), 1),
            *(f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" for ratio in ratios),
            _text(host_ms_per_step(mine)),
            f"{agreement(mine, _reference(rows)):.0%}",
        )
    return table


def _grouped(rows: Sequence[Row], labels: Sequence[str], title: str, cell: Callable[[str, str], str]) -> Table:
    table = Table("method", title=title)
    for group in groups_of(rows):
        table.add_column(group, justify="right")
    for label in labels:
        table.add_row(label, *(cell(label, group) for group in groups_of(rows)))
    return table


def _text(value: float, decimals: int = 2) -> str:
    return "-" if value != value else f"{value:.{decimals}f}"
