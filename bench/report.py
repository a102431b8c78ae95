"""Tables and the JSON summary of a benchmark's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from .metrics import (
    Row,
    agreement,
    by_category,
    groups_of,
    mean_speed,
    select,
    speed,
    speed_ratio,
    tokens_per_step,
)

__all__ = ["BASELINES", "WIDTH", "host_ms_per_step", "print_tables", "summary"]

BASELINES = ("model.generate", "none", "none+compile", "prompt_lookup", "assisted")
NOT_HOST = ("forward", "prefill")
WIDTH = 190  # of the totals with every baseline; rich cuts what does not fit
COLUMNS = 5  # methods in one table of categories


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
        "mean_tokens_per_second": _rounded(mean_speed(mine)),
        "prefill_seconds": _rounded(sum(row.prefill_seconds for row in mine)),
        "host_ms_per_step": _rounded(host_ms_per_step(mine)),
        "same_output": _rounded(agreement(mine, _reference(rows))),
        "accepted": _sum_of_histograms(mine),
        "groups": _by_group(mine, label),
        "categories": _by_group(by_category(mine), label) if _has_categories(mine) else {},
    }


def _by_group(mine: Sequence[Row], label: str) -> dict[str, Any]:
    each = {group: select(mine, label, group) for group in groups_of(mine)[:-1]}
    return {
        group: {"tokens_per_step": _rounded(tokens_per_step(rows)), "tokens_per_second": _rounded(speed(rows))}
        for group, rows in each.items()
    }


def _sum_of_histograms(rows: Sequence[Row]) -> list[int]:
    """[n]: steps of all rows that emitted n tokens."""
    return [sum(counts) for counts in zip_longest(*(row.accepted for row in rows), fillvalue=0)]


def _has_categories(rows: Sequence[Row]) -> bool:
    """Some group has more than one."""
    return len(groups_of(by_category(rows))) > len(groups_of(rows))


def _rounded(value: float) -> float | None:
    """Four decimals; None where there is nothing to report, since JSON has neither nan nor infinity."""
    return round(value, 4) if math.isfinite(value) else None


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
    """Totals, then tokens a step, speed and ratios by group, and a ratio (or speed) by category where there are any."""

    def steps_cell(label: str, group: str) -> str:
        return _text(tokens_per_step(select(rows, label, group)))

    console.print(_totals(rows, labels))
    console.print(_grouped(rows, labels, "tokens a step", steps_cell))
    console.print(_grouped(rows, labels, "tokens a second", _speed_cell(rows)))
    for baseline in BASELINES:
        if baseline in labels and len(labels) > 1:
            console.print(_grouped(rows, labels, f"speed / {baseline}", _ratio_cell(rows, baseline)))
    if _has_categories(rows):
        baseline = next((name for name in BASELINES if name in labels and len(labels) > 1), None)
        shown = [label for label in labels if label != baseline]
        for start in range(0, len(shown), COLUMNS):
            console.print(_categories(by_category(rows), shown[start : start + COLUMNS], baseline))


def _speed_cell(rows: Sequence[Row]) -> Callable[[str, str], str]:
    def cell(label: str, group: str) -> str:
        return _text(speed(select(rows, label, group)), 1)

    return cell


def _ratio_cell(rows: Sequence[Row], baseline: str) -> Callable[[str, str], str]:
    def cell(label: str, group: str) -> str:
        return _text(speed_ratio(select(rows, label, group), select(rows, baseline, group)).value)

    return cell


def _totals(rows: Sequence[Row], labels: Sequence[str]) -> Table:
    baselines = [name for name in BASELINES if name in labels]
    prompts = len({row.task for row in rows})
    title = f"{prompts} prompts; tok / s: sum of tokens / sum of seconds; its ratios with 95 % intervals over prompts; mean: of the prompts' own"
    table = Table(Column("\nmethod", no_wrap=True), title=title)
    headers = (
        "tok\n/ step",
        "\ntok / s",
        "mean\ntok / s",
        *(f"\nx {name}" for name in baselines),
        "host ms\n/ step",
        "same\noutput",
    )
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for label in labels:
        mine = select(rows, label)
        ratios = [speed_ratio(mine, select(rows, name)) for name in baselines]
        table.add_row(
            label,
            _text(tokens_per_step(mine)),
            _text(speed(mine), 1),
            _text(mean_speed(mine), 1),
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


def _categories(rows: Sequence[Row], labels: Sequence[str], baseline: str | None) -> Table:
    """Speed by category, over the baseline's if there is one. A category is a line, for there may be many; `rows` as by_category()
    gives them."""
    cell = _speed_cell(rows) if baseline is None else _ratio_cell(rows, baseline)
    table = Table("category", title="tokens a second by category" if baseline is None else f"speed / {baseline} by category")
    for name in ("prompts", *labels):
        table.add_column(name, justify="right")
    for group in groups_of(rows):
        prompts = {row.task for label in labels for row in select(rows, label, group)}
        table.add_row(group, str(len(prompts)), *(cell(label, group) for label in labels))
    return table


def _text(value: float, decimals: int = 2) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else "-"
