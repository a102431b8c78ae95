"""ByRate: steps go to the drafter where it is, or may well be, the faster one; what it may lose until that is known is bounded.

A drafter's forwards may cost more than they bring, on this machine or on this text; no model of costs knows that as well as the
clock. So every step is timed, from the start of the drafting to the last row's verdict, and priced: plain steps a token, where
the cost model says what a plain step takes at this context and number of rows. Prices of one class of requests and about one number
of rows are means of the latest steps; the drafter's begin with PRIOR steps at the price that the cost model expects. Worked example:
a drafted step takes 1.8 plain steps and emits 2.4 tokens, price .75; without a drafter a step takes 1.02 and emits 1, price 1.02.

The lower of the two prices' optimistic ends works (one standard error below; an arm that does not work is forgotten by and by, so that it
looks better and better until it is tried). The drafter may begin only if what it can save on the tokens that are left is WORTH its
stake, what reading the text takes and what a trial may lose, and if all losses, this one included, stay within SPARE tokens' time and
SPARE_SHARE of all; a trial that has lost its stake ends. Made-up drafters by their speed (and seconds of a forward, of which a plain
step takes 1), engines that know nothing, prompts of 200 tokens: time lost in %, and below it the share of the possible saving
that is reached, in % (`python -m bench.arms`: means of 40, 20 and 2 texts)::

    new tokens       48   256  2000
    0.5x   (1.0)    0.0   0.0   0.0
    0.8x   (.35)    0.0   1.5   1.0      prompts of 20 tokens: 4.1, 1.4, 1.0
    0.95x  (.1)     3.8   1.6   1.1
    1.2x   (.35)      0    92    95      prompts of 20 tokens: 72, 95, 95
    1.5x   (.2)      78    97    98
    2x     (.1)      84    96   100

No verdict depends on it: with `match` the text is the same whichever arm drafts; other rules draw other text of the same law.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, cast

from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.sequence import Sequence
from specdec.trees.base import TreeBuilder
from specdec.trees.by_model import TreeByModel
from specdec.trees.per_class import PerClass

__all__ = ["ByRate"]

FIRST = 4.0  # steps without the drafter before it is tried
PRIOR = 4.0  # steps that the cost model's word on the drafter counts as
DECAY = 0.97  # of what an arm has shown, at each of its steps
FADE = 0.99, 0.998  # of the same, at each of the other's, without and with the drafter: trying that one costs more
MARGIN = 1.03  # the drafter begins only if it may be this much better
STAKE = 1.0  # tokens' time that a trial may lose beside what reading the text takes, and
STAKE_SHARE = 0.02  # at most this share of those that are left
WORTH = 5.0  # times the stake that the drafter must be able to save
SPARE = 2.0  # tokens' time that all trials may lose together, and
SPARE_SHARE = 0.01  # this share of all time, that of the tokens that are left included


@dataclass(slots=True)
class _Price:
    """What an arm's latest steps cost, in plain steps of one row."""

    steps: float = 0.0
    tokens: float = 0.0
    cost: float = 0.0

    def scaled(self, factor: float) -> _Price:
        return _Price(factor * self.steps, factor * self.tokens, factor * self.cost)

    def plus(self, steps: float, tokens: float, cost: float) -> _Price:
        return _Price(self.steps + steps, self.tokens + tokens, self.cost + cost)

    @property
    def mean(self) -> float:
        """Plain steps a token."""
        return self.cost / self.tokens

    @property
    def low(self) -> float:
        """One standard error better: of geometric steps of e tokens, whose variance is e (e - 1); a half more, as a single token
        a step does not say that there will never be two."""
        return self.mean / (1 + math.sqrt((self.tokens / self.steps - 0.5) / self.tokens))


@dataclass(slots=True)
class _Step:
    """The one that is under way."""

    drafted: bool
    counts: bool  # into the price: no text was read first
    begin: float
    trees: list[DraftTree]  # whose verdicts are not known yet
    rows: int = 0  # whose verdicts are: a row that fails has none
    emitted: int = 0
    last: float = 0.0  # verdict


class ByRate:
    """Tree builder that hands each step to one of two: one without a drafter, and one around a drafter.

    Args:
        builders: name -> builder, the one without a drafter first; one of them may have an acceptance rule other than `match`,
            which then judges all trees.
        clock: seconds.

    Raises:
        ValueError: not two builders, or builders of two rules other than `match`.
    """

    sizes_itself = True
    compiles = False

    def __init__(self, builders: Mapping[str, TreeBuilder], clock: Callable[[], float] = time.perf_counter) -> None:
        rules = {getattr(builder, "rule", "match") for builder in builders.values()} - {"match"}
        if len(builders) != 2 or len(rules) > 1:
            found = f"{list(builders)} with {sorted(rules)}"
            raise ValueError(f"builders must be two, the one without a drafter first, with one rule beside match, got {found}")
        self.rule = next(iter(rules), "match")
        self.top_k = max(builder.top_k for builder in builders.values())
        self.names, self.parts = list(builders), list(builders.values())
        self.base, self.drafting = self.parts[0], cast(TreeByModel, self.parts[1])
        self.model = getattr(self.drafting, "model", None)
        self._clock = clock
        self._restart()

    def _restart(self) -> None:
        self._prices: PerClass[dict[int, list[_Price]]] = PerClass(dict)
        self._now = [_Price(), _Price()]  # of the last step's class and rows, without and with the drafter
        self._drafts = False
        self._seconds = self._lost = self._limit = 0.0
        self._plain = 1.0  # seconds of a plain step, as of the last step
        self._step: _Step | None = None

    @property
    def forwards(self) -> int:
        """Of the drafter, for statistics."""
        return getattr(self.drafting, "forwards", 0)

    def start(self, seq: Sequence) -> None:
        for builder in self.parts:
            builder.start(seq)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        for builder in self.parts:
            if builder.top_k:
                builder.observe_prompt(seq, start, top)

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        """The trees of the arm that this step goes to."""
        self._close_step()
        begin = self._clock()
        self._now = self._prices_of(seqs)
        self._plain, reading = self.drafting.plain_seconds(seqs), self.drafting.reading_seconds(seqs)
        read = reading < self._plain / 4
        self._drafts = self._choose(seqs, reading, self._drafts and read)
        trees = self.parts[self._drafts].build(seqs, budgets, depths)
        self._step = _Step(self._drafts, not self._drafts or read, begin, list(trees))
        return trees

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        """Both see the verdict: the one that did not draft learns from the text and the logits."""
        for builder in self.parts:
            builder.update(seq, tree, verdict, top)
        step = self._step
        if step is not None and any(other is tree for other in step.trees):
            step.trees = [other for other in step.trees if other is not tree]
            step.rows, step.emitted, step.last = step.rows + 1, step.emitted + len(verdict.nodes), self._clock()

    def _close_step(self) -> None:
        """Count what the last step has shown."""
        step, self._step = self._step, None
        if step is None or not step.rows:
            return
        seconds = step.last - step.begin
        self._seconds += seconds
        if step.drafted:
            self._lost = max(0.0, self._lost + seconds - step.emitted / step.rows * self._now[0].mean * self._plain)
        if step.counts:
            arm = int(step.drafted)
            self._now[arm] = self._now[arm].scaled(DECAY).plus(step.rows, step.emitted, step.rows * seconds / self._plain)
            self._now[1 - arm] = self._now[1 - arm].scaled(FADE[1 - arm])

    def _prices_of(self, seqs: Seq[Sequence]) -> list[_Price]:
        """Those of the first request's class and of about as many rows, at first with a little of what was seen elsewhere."""
        by_rows, rows = self._prices[seqs[0].params], len(seqs).bit_length()
        if rows not in by_rows:
            by_rows[rows] = [price.scaled(min(1.0, PRIOR / max(price.steps, 1.0))) for price in self._now]
        return by_rows[rows]

    def _choose(self, seqs: Seq[Sequence], reading: float, goes_on: bool) -> bool:
        """Whether the drafter works in the next step, for which it must read for `reading` seconds, or `goes_on` with its work."""
        base = self._now[0]
        if base.steps < FIRST:
            return False
        tokens, cost = self.drafting.outlook(seqs) or (2.0, 2.0 * base.mean)
        hope = self._now[1].plus(PRIOR, PRIOR * tokens, PRIOR * cost)
        left = sum(seq.remaining for seq in seqs) / len(seqs)
        token = base.mean * self._plain  # seconds that one takes without the drafter
        stake = reading + min(STAKE, STAKE_SHARE * left) * token
        if goes_on:
            return hope.low < base.low and (self._lost <= self._limit or hope.mean < base.mean)
        self._limit = self._lost + stake
        saved = (1 - hope.low / base.mean) * left * token
        spare = SPARE * token + SPARE_SHARE * (self._seconds + left * token)
        return hope.low * MARGIN < base.low and saved > WORTH * stake and self._limit <= spare

    def finish(self, seq: Sequence) -> None:
        for builder in self.parts:
            builder.finish(seq)

    def reset(self) -> None:
        """Forget the prices and all that the arms have learned."""
        for builder in self.parts:
            builder.reset()
        self._restart()

    def info(self) -> dict[str, Any]:
        """Tokens a second and row of each arm that was tried, at the last step's context and number of rows."""
        prices = zip(self.names, self._now)
        return {"tokens_per_second": {name: round(1 / (price.mean * self._plain), 2) for name, price in prices if price.tokens}}

    def state(self) -> dict[str, Any]:
        """The base's under its own names, so that it fits the same method without a drafter."""
        return {**self.base.state(), **{self._prefix + name: value for name, value in self.drafting.state().items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of state(); of a state without the drafter's part that one learns nothing."""
        plain, drafted = self._split(state)
        self.base.load_state(plain)
        if drafted:
            self.drafting.load_state(drafted)

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """What each arm can take in of another ByRate's; the prices are this engine's own."""
        for builder, own in zip(self.parts, self._split(state)):
            if own and (merge := getattr(builder, "merge_state", None)) is not None:
                merge(own)

    @property
    def _prefix(self) -> str:
        return f"{self.names[1]}."

    def _split(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The base's and the drafter's."""
        drafted = {name.removeprefix(self._prefix): value for name, value in state.items() if name.startswith(self._prefix)}
        return {name: value for name, value in state.items() if not name.startswith(self._prefix)}, drafted
