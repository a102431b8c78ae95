"""Accuracy against budget: Markdown, a figure, and the JSON summary of a search experiment's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from .reasoning_metrics import (
    BASELINE,
    THIRDS,
    Interval,
    Row,
    accuracy,
    difference,
    failed,
    mean,
    measured,
    select,
    values_of,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "markdown", "summary"]

ORACLE = (
    "The oracle is an exact checker of the steps, which knows the rules and not the answer. Arithmetic: whether every equality that "
    "is stated holds, not whether it is the one the problem asks for. Countdown: whether the target is still within reach; what a "
    "final expression makes is among the rules, so there it verifies answers too. It costs no tokens; most real problems have none."
)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Group -> policy -> budget -> figures."""
    rows = measured(rows)
    return {
        group: {
            policy: {str(budget): _figures(rows, group, policy, budget) for budget in values_of(rows, "budget")}
            for policy in values_of(rows, "policy")
        }
        for group in values_of(rows, "group")
    }


def _figures(rows: Sequence[Row], group: str, policy: str, budget: int) -> dict[str, Any]:
    mine, theirs = (select(rows, group=group, policy=name, budget=budget) for name in (policy, BASELINE))
    gap = difference(mine, theirs)
    figures: dict[str, Any] = {"problems": len({row.task for row in mine}), "accuracy": _numbers(accuracy(mine))}
    if policy != BASELINE and gap.problems:
        figures["difference"] = {**_numbers(gap), "verdict": verdict(gap)}
    return {**figures, **{name: _rounded(mean(mine, name)) for name in ("answered", "used", "correct", "evaluator_tokens")}}


def _numbers(interval: Interval) -> dict[str, float | None]:
    return {name: _rounded(getattr(interval, name)) for name in ("mean", "low", "high")}


def _rounded(value: float) -> float | None:
    return None if isnan(value) else round(value, 4)


# ---- what a person reads -----------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """The report: a section a group."""
    errors, rows = failed(rows), measured(rows)
    used = f"{settings['model']}, {settings['dtype']}, temperature {settings['temperature']} (greedy: 0)"
    lines = [f"# Accuracy against budget, evaluator: {settings['evaluator']}", "", f"{used}; {settings['machine']}.", ""]
    lines += [ORACLE, ""] if settings["evaluator"] == "oracle" else []
    lines += [
        "Equal output tokens: a budget is a hard limit for every policy. Brackets: 95 % bootstrap intervals over problems; "
        '"no difference" means that none was shown with so many problems.',
        "",
    ]
    if errors:
        worst = errors[0]
        lines += [
            f"Errors: {len(errors)} searches ended with one and are in no figure, the first {worst.policy} on {worst.task} at "
            f"{worst.budget}: {worst.error}. The same command searches them again.",
            "",
        ]
    if len(commits := values_of(rows, "commit")) > 1:
        lines += [f"The rows are of {len(commits)} commits: {', '.join(map(str, commits))}.", ""]
    for group in values_of(rows, "group"):
        lines += _section(select(rows, group=group), group, settings)
    return "\n".join(lines)


def _section(rows: list[Row], group: str, settings: dict[str, Any]) -> list[str]:
    problems, seeds = len({row.task for row in rows}), len({row.seed for row in rows})
    sizes = settings["sizes"].get(group)
    counted = f"{problems} problems{f' ({sizes})' if sizes else ''}, seeds: {seeds}, evaluator: {settings['evaluator']}"
    return [
        f"## {group}: {counted}",
        "",
        *_table("accuracy", rows, _accuracy_cell),
        *_table(f"minus {BASELINE}, points", rows, lambda mine: _difference_cell(mine, rows)),
        *_table("answered, not forced", rows, lambda mine: _accuracy_cell(mine, "answered")),
        *_table("right answers in a tree / answers", rows, lambda mine: f"{mean(mine, 'correct'):.1f} / {mean(mine, 'answers'):.1f}"),
        *_table("used / evaluator's tokens", rows, lambda mine: f"{mean(mine, 'used'):.0f} / {mean(mine, 'evaluator_tokens'):.0f}"),
        *_table(
            "input tokens: computed / cached / computed again",
            rows,
            lambda mine: " / ".join(f"{mean(mine, f'{name}_tokens'):.0f}" for name in ("prefill", "cached", "recomputed")),
        ),
        *_table("seconds a problem, side by side; tokens a step", rows, _speed_cell),
        *_table("wide: share of widening steps by thirds of the budget", rows, lambda mine: _thirds_cell(mine, "widening")),
        *_table("deep: mean depth extended by thirds of the budget", rows, lambda mine: _thirds_cell(mine, "depth")),
    ]  # fmt: skip


def _table(title: str, rows: list[Row], cell: Callable[[list[Row]], str]) -> list[str]:
    """Policies by budgets, and an empty line."""
    budgets = values_of(rows, "budget")
    lines = [f"| {title} | {' | '.join(map(str, budgets))} |", f"|---|{'---|' * len(budgets)}"]
    for policy in values_of(rows, "policy"):
        each = [select(rows, policy=policy, budget=budget) for budget in budgets]
        cells = [cell(mine) if mine else "-" for mine in each]
        if any(text.strip("- /") for text in cells):
            lines.append(f"| {policy} | {' | '.join(cells)} |")
    return [*lines, ""]


def _accuracy_cell(mine: list[Row], name: str = "right") -> str:
    found = accuracy(mine, name)
    return f"{found.mean:.0%} ({found.low:.0%} to {found.high:.0%})"


def _difference_cell(mine: list[Row], rows: list[Row]) -> str:
    gap = difference(mine, select(rows, policy=BASELINE, budget=mine[0].budget))
    if mine[0].policy == BASELINE or not gap.problems:
        return "-"
    return f"{100 * gap.mean:+.0f} ({100 * gap.low:+.0f} to {100 * gap.high:+.0f}) {verdict(gap)}"


def _speed_cell(mine: list[Row]) -> str:
    steps = sum(row.steps for row in mine)
    return f"{mean(mine, 'seconds'):.1f}; {sum(row.used for row in mine) / steps if steps else 0:.2f}"


def _thirds_cell(mine: list[Row], name: str) -> str:
    columns = ([getattr(row, name)[third] for row in mine] for third in range(THIRDS))
    known = ([value for value in column if value is not None] for column in columns)
    return " / ".join(f"{fmean(values):.2f}" if values else "-" for values in known)


def draw(rows: Sequence[Row], settings: dict[str, Any]) -> Figure:
    """Accuracy by budget, a panel a group, a line a policy with its intervals."""
    from matplotlib.figure import Figure

    rows = measured(rows)
    groups = values_of(rows, "group")
    figure = Figure((8, 0.6 + 3.2 * len(groups)), layout="constrained")
    for axes, group in zip(np.atleast_1d(figure.subplots(len(groups))), groups):
        _panel(axes, select(rows, group=group))
        axes.set_title(f"{group}, evaluator: {settings['evaluator']}")
    axes.set_xlabel("budget, output tokens")
    figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    policies, budgets = values_of(rows, "policy"), values_of(rows, "budget")
    for index, policy in enumerate(policies):
        found = {budget: accuracy(mine) for budget in budgets if (mine := select(rows, policy=policy, budget=budget))}
        places = [budget * 1.02 ** (index - (len(policies) - 1) / 2) for budget in found]  # beside each other
        below = [max(0.0, each.mean - each.low) for each in found.values()]
        above = [max(0.0, each.high - each.mean) for each in found.values()]
        style = {"fmt": "o--" if policy == BASELINE else "o-", "ms": 4, "lw": 1.5, "elinewidth": 0.7}
        axes.errorbar(
            places, [each.mean for each in found.values()], [below, above], color=f"C{index % 10}", label=policy, **style
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, list(map(str, budgets)))
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy")
