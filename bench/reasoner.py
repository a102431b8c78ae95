"""A synthetic reasoner: chains of about 8 steps of 65 tokens, an evaluator that is right with a fixed probability. No model.

It is for regression tests of the search's controller, not for claims (search.md 5.3: [toy]). A problem is a fixed infinite tree of
possible steps, so every policy explores the same one: step j below a state is the same text whoever draws it, and a full text is
step j below the prompt with the first step below each state after it. Rules:

* a right state is followed by a right one with the problem's own probability p, a wrong one by wrong ones for ever;
* a chain ends with an answer at the problem's depth (6 to 10): "right", or one of four wrong ones;
* the evaluator reads right or wrong with accuracy a, and answers near 1 or near 0 (within .1); saturated by s, it answers
  1 - (1 - s)(1 - that), between s and 1: at s = 1 it says nothing;
* with probability `repeat` a draw is the text of an earlier one at the same place (none by default);
* with probability `early` a state ends its chain before the problem's depth, so that chains differ in length (none by default).

A chain of depth 8 is right with probability p^8, which is drawn from Beta(.7, 1.1) for every problem: some easy, many hard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from specdec.search import ROOT, Completion, Finish, Kind, Request, Result, Search
from specdec.search.loop import run

__all__ = ["Problem", "Reasoner", "solve"]

_MASK = (1 << 64) - 1
_STEP_TOKENS, _SPREAD = 65, 20  # tokens of a step: uniform in 65 +- 20
_WRONG_ANSWERS = 4


def _mix(*parts: int) -> int:
    """64 bits from ints (splitmix64 chained)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ part) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def _uniform(*parts: int) -> float:
    return (_mix(*parts) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem."""

    key: int
    depth: int  # of its answers
    p: float  # a right step is followed by a right one

    @classmethod
    def make(cls, seed: int, index: int) -> Problem:
        """Problem `index` of one set."""
        rng = np.random.default_rng((seed, index))
        chain = float(rng.beta(0.7, 1.1))
        return cls(_mix(seed, index), int(rng.integers(6, 11)), chain ** (1 / 8))


@dataclass(frozen=True, slots=True)
class _State:
    """Where a text has got to: a step is done when `left` is 0."""

    key: int
    depth: int
    right: bool
    left: int = 0  # tokens of the present step still to come

    def child(self, problem: Problem, index: int) -> _State:
        """The state after step `index` below this one, none of its tokens written yet."""
        key = _mix(problem.key, self.key, index)
        right = self.right and _uniform(key, 1) < problem.p
        return _State(key, self.depth + 1, right, _STEP_TOKENS - _SPREAD + int(_uniform(key, 2) * (2 * _SPREAD + 1)))


class Reasoner:
    """Model and evaluator of one problem; `complete` answers requests of one search."""

    def __init__(
        self,
        problem: Problem,
        accuracy: float = 0.9,
        cost: int = 0,
        saturation: float = 0.0,
        repeat: float = 0.0,
        early: float = 0.0,
    ) -> None:
        self.problem, self.accuracy, self.cost = problem, accuracy, cost
        self.saturation, self.repeat, self.early = saturation, repeat, early
        self.states = {ROOT: _State(problem.key, 0, True)}
        self._draws: dict[int, int] = {}

    def complete(self, search: Search, request: Request) -> Completion:
        """Generate and evaluate."""
        state, written = self.states[request.parent], 0
        first = self._draws.get(request.parent, 0)
        self._draws[request.parent] = first + 1
        if request.kind == Kind.FORCED:
            return Completion((state.key, request.node), "forced", Finish.EOS, answer=self._answer(replace(state, right=False)))
        if request.kind == Kind.REFINE:
            state = _State(_mix(state.key, 6), 0, True)
        if not state.left:
            state = state.child(self.problem, self._step(state, first))
        while True:
            take = min(state.left, request.max_tokens - written)
            state, written = replace(state, left=state.left - take), written + take
            if state.left or not request.full or self._ends(state):
                break
            if written == request.max_tokens:
                break
            state = state.child(self.problem, 0)
        self.states[request.node] = state
        return self._completion(state, written, request.full)

    def _step(self, state: _State, draw: int) -> int:
        """Which step below a state a draw is."""
        while draw and _uniform(state.key, draw, 7) < self.repeat:
            draw = int(_uniform(state.key, draw, 8) * draw)
        return draw

    def _completion(self, state: _State, written: int, full: bool) -> Completion:
        done = not state.left and self._ends(state)
        finish = Finish.EOS if done else Finish.LENGTH if state.left or full else Finish.STOP
        answer = self._answer(state) if done else None
        text = f"step {state.depth}. "
        return Completion((state.key & 0xFFFF,) * written, text, finish, self._score(state), answer, evaluator_tokens=self.cost)

    def _ends(self, state: _State) -> bool:
        return state.depth >= self.problem.depth or _uniform(state.key, 9) < self.early

    def _answer(self, state: _State) -> str:
        return "right" if state.right else f"wrong {_mix(state.key, 3) % _WRONG_ANSWERS}"

    def _score(self, state: _State) -> float:
        seen_right = state.right == (_uniform(state.key, 4) < self.accuracy)
        noise = 0.1 * _uniform(state.key, 5)
        return 1.0 - (1.0 - self.saturation) * (noise if seen_right else 1.0 - noise)


def solve(search: Search, reasoner: Reasoner, width: int = 1) -> Result:
    """Drive a search to its end."""
    return run(search, lambda requests: [reasoner.complete(search, request) for request in requests], width)
