"""What a search experiment counts, with one ruler for every policy.

* right: the answer that the search gave equals the gold one. A forced answer counts; `answered` says whether there was another.
* used: output tokens of the policy, the tokens that a step rule cut off included. The evaluator's are beside it.
* accuracy: a problem's share of right seeds, averaged over problems. Intervals are 95 % bootstraps over problems, seeds kept together.
* difference: the same of (policy - best_of_n) on the problems that both ran; it helps or hurts where the interval leaves 0 out.

Worked example, two seeds of three problems: right (1, 1), (1, 0), (0, 0) is an accuracy of (1 + .5 + 0) / 3 = .5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

__all__ = [
    "BASELINE",
    "THIRDS",
    "Interval",
    "Row",
    "accuracy",
    "difference",
    "failed",
    "mean",
    "measured",
    "select",
    "values_of",
    "verdict",
]

BASELINE = "best_of_n"
RESAMPLES = 2000
THIRDS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One problem, searched once."""

    task: str
    group: str
    policy: str
    budget: int
    seed: int
    answer: str | None
    right: bool
    answered: bool  # without a forced answer
    status: str
    used: int  # at most `budget`
    steps: int  # verification steps: used / steps tokens a step
    evaluator_tokens: int
    prefill_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    answers: int  # in the tree, equal ones counted each time
    correct: int  # of these, right ones
    seconds: float  # since the row before it, of searches that run side by side: their sum is the time of all
    widening: list[float | None]  # [3]: share of steps drawn below a node that had its k, by thirds of the budget; None: no steps
    depth: list[float | None]  # [3]: mean depth of the nodes below which steps were drawn
    error: str | None = None  # the model failed twice on one request: in no figure, counted, and searched again next time
    commit: str | None = None  # that it was searched with


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval; nan without problems."""

    mean: float
    low: float
    high: float
    problems: int


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows whose fields have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def measured(rows: Iterable[Row]) -> list[Row]:
    """Rows of searches that ended."""
    return [row for row in rows if row.error is None]


def failed(rows: Iterable[Row]) -> list[Row]:
    """The last row of every search that has failed and not ended since."""
    rows = list(rows)
    ended = {_search(row) for row in measured(rows)}
    return list({_search(row): row for row in rows if row.error is not None and _search(row) not in ended}.values())


def _search(row: Row) -> tuple[Any, ...]:
    return row.group, row.policy, row.budget, row.seed, row.task


def mean(rows: Sequence[Row], name: str) -> float:
    """Of a field; nan without rows."""
    return fmean(getattr(row, name) for row in rows) if rows else float("nan")


def values_of(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of a field in order of first appearance, budgets ascending."""
    found = list(dict.fromkeys(getattr(row, name) for row in rows))
    return sorted(found) if name == "budget" else found


def accuracy(rows: Sequence[Row], name: str = "right") -> Interval:
    """Share of right answers, or of rows with another such field."""
    return _bootstrap(list(_by_problem(rows, name).values()))


def difference(rows: Sequence[Row], baseline: Sequence[Row]) -> Interval:
    """Accuracy minus the baseline's, paired by problem."""
    ours, theirs = _by_problem(rows), _by_problem(baseline)
    return _bootstrap([ours[task] - theirs[task] for task in ours if task in theirs])


def verdict(gap: Interval) -> str:
    """What a difference says, plainly."""
    return "helps" if gap.low > 0 else "hurts" if gap.high < 0 else "no difference"


def _by_problem(rows: Sequence[Row], name: str = "right") -> dict[str, float]:
    """Task -> share of right seeds."""
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row.task, []).append(getattr(row, name))
    return {task: fmean(each) for task, each in right.items()}


def _bootstrap(values: list[float], seed: int = 0) -> Interval:
    if not values:
        return Interval(*[float("nan")] * 3, 0)
    drawn = np.random.default_rng(seed).choice(values, size=(RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(fmean(values), float(low), float(high), len(values))
