"""ByRate: of several builders, the one whose steps give most tokens a second; the others are tried again now and then.

A drafter's forwards may cost more than they bring, on this machine or on this text; no model of costs knows that as well as the
clock. So each arm is timed over its own steps, from the start of the drafting to the last row's verdict, and the best one works.
A trial is a spell of SPELL steps, whose first is not counted (a drafter reads then what it has missed); after a lost one the
pause to the next doubles. Worked example: "draft_model" 38 tokens a second, "best_first" 61: best_first works, and
draft_model gets 6 steps after 64, then after 128, 256, ... of the others.

No verdict depends on it: with `match` the text is the same whichever arm drafts; other rules draw other text of the same law.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from specdec.draft_tree import DraftTree, TopK, Verdict
from specdec.sequence import Sequence
from specdec.trees.base import TreeBuilder

__all__ = ["ByRate"]

SPELL = 6  # steps of a trial, the first of which is not counted
PAUSE = 64  # steps of the best arm before another is tried
LONGEST_PAUSE = 2048
MARGIN = 1.03  # another arm must be this much better
DECAY = 0.98  # of what an arm has shown, at each of its steps


@dataclass(slots=True)
class _Arm:
    name: str
    builder: TreeBuilder
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second; 0 as long as it was not tried."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def count(self, tokens: int, seconds: float) -> None:
        self.tokens = DECAY * self.tokens + tokens
        self.seconds = DECAY * self.seconds + seconds


class ByRate:
    """Tree builder that hands each step to one of several.

    Args:
        builders: name -> builder; one of them may have an acceptance rule other than `match`, which then judges all trees.
        clock: seconds.

    Raises:
        ValueError: fewer than two builders, or builders of two rules other than `match`.
    """

    sizes_itself = True
    compiles = False

    def __init__(self, builders: Mapping[str, TreeBuilder], clock: Callable[[], float] = time.perf_counter) -> None:
        rules = {getattr(builder, "rule", "match") for builder in builders.values()} - {"match"}
        if len(builders) < 2 or len(rules) > 1:
            found = f"{list(builders)} with {sorted(rules)}"
            raise ValueError(f"builders must be at least two, with one rule beside match, got {found}")
        self.rule = next(iter(rules), "match")
        self.top_k = max(builder.top_k for builder in builders.values())
        self.parts = list(builders.values())
        self.model = next((model for builder in self.parts if (model := getattr(builder, "model", None)) is not None), None)
        self._clock = clock
        self._arms = [_Arm(name, builder) for name, builder in builders.items()]
        self._restart()

    def _restart(self) -> None:
        for arm in self._arms:
            arm.tokens = arm.seconds = 0.0
        self._home = self._now = 0
        self._left = SPELL  # steps of the running trial
        self._wait, self._pause = PAUSE, PAUSE
        self._step: tuple[_Arm, float, bool] | None = None  # arm, start and whether it counts, of the step that is under way
        self._emitted, self._last = 0, 0.0
        self._trees: set[int] = set()

    @property
    def forwards(self) -> int:
        """Of the drafter, for statistics."""
        return sum(getattr(builder, "forwards", 0) for builder in self.parts)

    def start(self, seq: Sequence) -> None:
        for builder in self.parts:
            builder.start(seq)

    def observe_prompt(self, seq: Sequence, start: int, top: TopK) -> None:
        for builder in self.parts:
            if builder.top_k:
                builder.observe_prompt(seq, start, top)

    def build(self, seqs: Seq[Sequence], budgets: Seq[int], depths: Seq[int]) -> list[DraftTree]:
        """The trees of the arm whose turn it is."""
        self._close_step()
        self._choose()
        arm = self._arms[self._now]
        self._step = arm, self._clock(), self._left < SPELL - 1
        trees = arm.builder.build(seqs, budgets, depths)
        self._trees = {id(tree) for tree in trees}
        return trees

    def update(self, seq: Sequence, tree: DraftTree, verdict: Verdict, top: TopK | None) -> None:
        """All arms see the verdict: those that did not draft learn from the text and the logits."""
        for builder in self.parts:
            builder.update(seq, tree, verdict, top)
        if id(tree) in self._trees:
            self._emitted += len(verdict.nodes)
            self._last = self._clock()

    def _close_step(self) -> None:
        """Count what the last step has shown."""
        if self._step is not None and self._emitted:
            arm, begin, counts = self._step
            if counts:
                arm.count(self._emitted, self._last - begin)
        self._step, self._emitted = None, 0

    def _choose(self) -> None:
        """Settles the arm of the next step."""
        if self._left:
            self._left -= 1
            return
        untried = next((index for index, arm in enumerate(self._arms) if not arm.seconds), None)
        if untried is not None:
            self._try(untried)
            return
        best = max(range(len(self._arms)), key=lambda index: self._arms[index].rate)
        if self._arms[best].rate > MARGIN * self._arms[self._home].rate:
            self._home, self._pause = best, PAUSE
        elif self._now != self._home:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if self._now != self._home:
            self._now, self._wait = self._home, self._pause
        elif self._wait:
            self._wait -= 1
        else:
            self._wait = self._pause
            self._try((self._home + 1 + self._turn()) % len(self._arms))

    def _turn(self) -> int:
        """Which of the other arms is tried: the one with the least to show for itself lately, 0 ... arms - 2."""
        others = [self._arms[(self._home + 1 + place) % len(self._arms)] for place in range(len(self._arms) - 1)]
        return min(range(len(others)), key=lambda place: others[place].seconds)

    def _try(self, index: int) -> None:
        self._now, self._left = index, SPELL - 1

    def finish(self, seq: Sequence) -> None:
        for builder in self.parts:
            builder.finish(seq)

    def reset(self) -> None:
        """Forget the rates and all that the arms have learned."""
        for builder in self.parts:
            builder.reset()
        self._restart()

    def info(self) -> dict[str, Any]:
        """Tokens a second of each arm, as far as it was tried."""
        return {"tokens_per_second": {arm.name: round(arm.rate, 2) for arm in self._arms if arm.seconds}}

    def state(self) -> dict[str, Any]:
        return {f"{arm.name}.{name}": value for arm in self._arms for name, value in arm.builder.state().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of state()."""
        for arm, own in self._split(state):
            arm.builder.load_state(own)

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """What each arm can take in of another ByRate's; the rates are this engine's own."""
        for arm, own in self._split(state):
            if (merge := getattr(arm.builder, "merge_state", None)) is not None:
                merge(own)

    def _split(self, state: Mapping[str, Any]) -> Iterator[tuple[_Arm, dict[str, Any]]]:
        """Each arm and what is its."""
        for arm in self._arms:
            prefix = f"{arm.name}."
            yield arm, {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
