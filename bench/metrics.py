"""What a benchmark counts, with one ruler for every method.

* token: a new token id in the output. Never re-tokenised text.
* tokens a step: sum of emitted tokens / sum of steps, prefill excluded.
* speed: sum of tokens / sum of decode seconds. A peer emits its first tokens in its prefill, which is not timed, so these are not
  counted either; specdec emits all of them in timed steps.
* ratio: one speed by another over the same prompts; its interval is a bootstrap over prompts, drawn within each group.

Worked example: two prompts of 10 and 30 tokens in 1 and 2 seconds are 40 / 3 = 13.3 tokens a second, not the mean of 10 and 15.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Ratio", "Row", "agreement", "groups_of", "select", "speed", "speed_ratio", "tokens_per_step"]

ALL = "all"


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt run by one method."""

    task: str
    group: str
    method: str  # label: "none", "best_first@16", "model.generate", ...
    tokens: int  # tokens that decode_seconds and steps cover
    steps: int  # forwards after the prefill
    decode_seconds: float
    prefill_seconds: float
    token_ids: list[int]  # all new tokens
    times: dict[str, float] = field(default_factory=dict)  # seconds by part of the step; empty for peers


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of speeds with its 95 % interval over prompts."""

    value: float
    low: float
    high: float


def select(rows: Iterable[Row], method: str, group: str = ALL) -> list[Row]:
    """Rows of one method, of one group or of all."""
    return [row for row in rows if row.method == method and group in (ALL, row.group)]


def groups_of(rows: Iterable[Row]) -> list[str]:
    """The groups in order of first appearance, then "all"."""
    return [*dict.fromkeys(row.group for row in rows), ALL]


def tokens_per_step(rows: Sequence[Row]) -> float:
    """Sum of tokens / sum of steps; nan without steps."""
    return _quotient(sum(row.tokens for row in rows), sum(row.steps for row in rows))


def speed(rows: Sequence[Row]) -> float:
    """Tokens a second: sum of tokens / sum of decode seconds; nan without any."""
    return _quotient(sum(row.tokens for row in rows), sum(row.decode_seconds for row in rows))


def agreement(rows: Sequence[Row], reference: Sequence[Row]) -> float:
    """Share of the common prompts whose output equals the reference's, token for token; nan without common prompts."""
    expected = {row.task: row.token_ids for row in reference}
    same = [row.token_ids == expected[row.task] for row in rows if row.task in expected]
    return _quotient(sum(same), len(same))


def speed_ratio(rows: Sequence[Row], baseline: Sequence[Row], resamples: int = 2000, seed: int = 0) -> Ratio:
    """Speed of `rows` by that of `baseline` over the prompts that both ran.

    Raises:
        ValueError: no prompt in common.
    """
    theirs = {row.task: row for row in baseline}
    pairs = [(row, theirs[row.task]) for row in rows if row.task in theirs]
    if not pairs:
        raise ValueError("a ratio needs prompts that both methods ran, got none")
    # [P, 4]: tokens and seconds of one side, tokens and seconds of the other
    table = np.array([[mine.tokens, mine.decode_seconds, other.tokens, other.decode_seconds] for mine, other in pairs], float)
    groups = [mine.group for mine, _ in pairs]
    low, high = _bootstrap(table, groups, resamples, seed)
    return Ratio(float(_ratio_of_sums(table.sum(0))), low, high)


def _ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """sums [..., 4] -> [...]"""
    return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])


def _bootstrap(table: np.ndarray, groups: list[str], resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the ratio of sums, prompts drawn with replacement within their group."""
    rng = np.random.default_rng(seed)
    sums = np.zeros((resamples, table.shape[1]))
    for group in dict.fromkeys(groups):
        members = np.flatnonzero([name == group for name in groups])
        drawn = rng.choice(members, size=(resamples, len(members)))
        sums += table[drawn].sum(1)
    low, high = np.quantile(_ratio_of_sums(sums), [0.025, 0.975])
    return float(low), float(high)


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
