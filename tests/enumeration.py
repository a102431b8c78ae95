"""Exact laws of code that draws through a Randomness: run it once for every outcome of its draws and sum the probabilities.

`exact_law(run)` replays `run` depth first. Every draw is the inverse CDF of a uniform that belongs to the draw's key, and each
uniform's interval is narrowed draw by draw: a key that is used twice gives the same noise twice, exactly as in production, so a
rule that reuses noise wrongly shows its bias (verification.md section 7, T1 and T1b). Which inverse CDF is used (here: one
uniform a draw; in production: one Gumbel a token) changes no law of a rule that is right for any keyed sampler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np
import torch

from specdec.draft_tree import DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.sequence import Sequence

__all__ = ["Chance", "EnumeratingRandomness", "direct_law", "distance", "exact_law", "speculate"]

Outcome = TypeVar("Outcome", bound=Hashable)
Rule = Callable[[DraftTree, Law, Randomness], Verdict]
Build = Callable[[Sequence], DraftTree]
Learn = Callable[[Sequence, DraftTree, Verdict], None]
Target = Callable[[list[int]], torch.Tensor]  # token ids -> logits [V] of the next token

_IMPOSSIBLE = 1e-15  # what floating point leaves of an interval that is empty


class Chance:
    """One replay: the draws made so far, the probability of them, and what is known of each key's uniform."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.options: list[int] = []  # how many outcomes each draw had
        self.probability = 1.0
        self.keys: list[tuple] = []  # every key asked for, in order
        self._intervals: dict[tuple, tuple[float, float]] = {}

    def draw(self, key: tuple, probs: np.ndarray) -> int:
        """An index drawn from `probs` with the uniform of `key`."""
        self.keys.append(key)
        low, high = self._intervals.get(key, (0.0, 1.0))
        edges = np.concatenate([[0.0], np.cumsum(probs / probs.sum())])
        edges[-1] = 1.0
        lows, highs = np.maximum(edges[:-1], low), np.minimum(edges[1:], high)
        possible = np.flatnonzero(highs - lows > _IMPOSSIBLE)
        if len(self.options) == len(self.script):
            self.script.append(0)
        index = int(possible[self.script[len(self.options)]])
        self.options.append(len(possible))
        self.probability *= (highs[index] - lows[index]) / (high - low)
        self._intervals[key] = (float(lows[index]), float(highs[index]))
        return index


class EnumeratingRandomness(Randomness):
    """Randomness whose draws are enumerated by `chance`; keys are those of production."""

    def __init__(self, chance: Chance, seed: int = 0, stream: tuple[int, ...] | int = ()) -> None:
        super().__init__(seed, stream)
        self.chance = chance

    def choose(self, position: int, scores: torch.Tensor) -> int:
        return self.chance.draw(("gumbel", self.seed, self.stream, position), torch.softmax(scores.double(), -1).numpy())

    def coin(self, p: float, *key: int | str) -> bool:
        return self.chance.draw(("coin", self.seed, self.coin_stream, key), np.array([p, 1 - p])) == 0

    def pick(self, weights: torch.Tensor | np.ndarray, *key: int | str) -> int:
        return self.chance.draw(("coin", self.seed, self.coin_stream, key), np.asarray(weights, np.float64))

    def gumbel(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise NotImplementedError("raw noise has no finite set of outcomes: draw with choose()")

    gumbel_at = gumbel


def exact_law(run: Callable[[Chance], Outcome]) -> dict[Outcome, float]:
    """The law of what `run` returns, over all outcomes of its draws."""
    law: Counter[Outcome] = Counter()
    script: list[int] = []
    while True:
        chance = Chance(script)
        law[run(chance)] += chance.probability
        assert len(script) == len(chance.options), "run() must depend on its draws only"
        while script and script[-1] + 1 == chance.options[len(script) - 1]:
            script.pop()
        if not script:
            return dict(law)
        script[-1] += 1


def direct_law(scores: Target, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """The law of the next `length` tokens under plain sampling from softmax(scores(prefix))."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, mass in law.items():
            probs = torch.softmax(scores([*prompt, *text]).double(), -1).tolist()
            longer.update({(*text, token): mass * p for token, p in enumerate(probs) if p > 0})
        law = longer
    return law


def distance(first: dict[Outcome, float], second: dict[Outcome, float]) -> float:
    """Total variation."""
    return 0.5 * sum(abs(first.get(key, 0.0) - second.get(key, 0.0)) for key in first.keys() | second.keys())


def speculate(target: Target, rule: Rule, build: Build, learn: Learn, seq: Sequence) -> Sequence:
    """The engine's loop with a toy target: draft, logits of every node by its own path, accept, append, learn."""
    while not seq.finished:
        tree = build(seq)
        paths = [[int(tree.tokens[i]) for i in tree.path(node)[1:]] for node in range(len(tree))]
        logits = torch.stack([target(seq.token_ids + path) for path in paths])
        verdict = rule(tree, Law(logits, tree, seq), seq.randomness)
        seq.accept_lengths.append(seq.append([*tree.tokens[verdict.nodes[1:]].tolist(), verdict.next_token]))
        learn(seq, tree, verdict)
    return seq
