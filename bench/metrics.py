"""What a benchmark counts, with one ruler for every method.

* token: a new token id in the output. Never re-tokenised text.
* tokens a step: sum of emitted tokens / sum of steps, prefill excluded.
* speed: sum of tokens / sum of decode seconds. A peer emits its first tokens in its prefill, which is not timed, so these are not
  counted either; specdec emits all of them in timed steps.
* ratio: one speed by another over the same prompts; its interval is a bootstrap over prompts, drawn within each group.
* rounds: a prompt's seconds are the median of its rounds, before anything is summed.
* batch: each of its prompts has an equal share of its seconds.

Worked example: two prompts of 10 and 30 tokens in 1 and 2 seconds are 40 / 3 = 13.3 tokens a second. The mean over prompts, of 10
and 15, is 12.5: it is reported beside, since it is what others print, and weighs a short answer like a long one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

import numpy as np

__all__ = [
    "Ratio", "Row", "agreement", "by_category", "groups_of", "histogram", "mean_speed", "medians", "select", "speed", "speed_ratio", "tokens_per_step",
]  # fmt: skip

ALL = "all"


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt run once by one method."""

    task: str
    group: str
    method: str  # label: "none", "best_first@16", "model.generate", ...
    tokens: int  # tokens that decode_seconds and steps cover
    steps: int  # forwards after the prefill
    decode_seconds: float
    prefill_seconds: float
    token_ids: list[int]  # all new tokens
    times: dict[str, float] = field(default_factory=dict)  # seconds by part of the step; empty for peers
    category: str = ""  # finer than the group; "": the group is all there is
    round: int = 0
    accepted: list[int] = field(default_factory=list)  # accepted[n]: steps that emitted n tokens


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of speeds with its 95 % interval over prompts."""

    value: float  # of sums
    low: float
    high: float
    mean: float  # of the prompts' own ratios


def histogram(lengths: Iterable[int]) -> list[int]:
    """How often each length occurs: [0, 2, 1] for 1, 1, 2."""
    return np.bincount(np.fromiter(lengths, np.int64)).tolist()


def medians(rows: Iterable[Row]) -> list[Row]:
    """One row a task and method: that of its first round, with the median seconds of all its rounds.

    Where rounds emitted different numbers of tokens (rounding in half precision), it is the seconds a token whose median counts.
    """
    rounds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        rounds.setdefault((row.task, row.method), []).append(row)
    return [_median(each) for each in rounds.values()]


def _median(rounds: list[Row]) -> Row:
    first = min(rounds, key=lambda row: row.round)
    seconds = median(row.decode_seconds * (first.tokens / row.tokens if row.tokens else 1.0) for row in rounds)
    times = {part: median(row.times[part] for row in rounds) for part in first.times}
    return replace(first, decode_seconds=seconds, prefill_seconds=median(row.prefill_seconds for row in rounds), times=times)


def select(rows: Iterable[Row], method: str, group: str = ALL) -> list[Row]:
    """Rows of one method, of one group or of all."""
    return [row for row in rows if row.method == method and group in (ALL, row.group)]


def groups_of(rows: Iterable[Row]) -> list[str]:
    """The groups in order of first appearance, then "all"."""
    return [*dict.fromkeys(row.group for row in rows), ALL]


def by_category(rows: Iterable[Row]) -> list[Row]:
    """The same rows, each in a group of its category: "group/category", or the group where there is none."""
    return [replace(row, group=f"{row.group}/{row.category}" if row.category else row.group) for row in rows]


def tokens_per_step(rows: Sequence[Row]) -> float:
    """Sum of tokens / sum of steps; nan without steps."""
    return _quotient(sum(row.tokens for row in rows), sum(row.steps for row in rows))


def speed(rows: Sequence[Row]) -> float:
    """Tokens a second: sum of tokens / sum of decode seconds; nan without any."""
    return _quotient(sum(row.tokens for row in rows), sum(row.decode_seconds for row in rows))


def mean_speed(rows: Sequence[Row]) -> float:
    """Mean over prompts of each one's tokens a second; nan without any."""
    each = [row.tokens / row.decode_seconds for row in rows if row.tokens]
    return fmean(each) if each else float("nan")


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
    own = _ratio_of_sums(table[(table[:, 0] > 0) & (table[:, 2] > 0)])  # a peer's prefill may have emitted a prompt's only token
    return Ratio(float(_ratio_of_sums(table.sum(0))), low, high, fmean(own) if len(own) else float("nan"))


def _ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """sums [..., 4] -> [...]; nan or inf where prompts had a single token, which a peer's prefill emits."""
    with np.errstate(divide="ignore", invalid="ignore"):
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
