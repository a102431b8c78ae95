"""Trust: how often what a draft model proposes turns out to be the target's token, learned online.

A drafter's probability of a token says how likely the drafter is to say it, not how likely the target is. So proposals fall in
classes, by kind and by the drafter's log-odds, and each class counts its trials and its successes, decayed. Trials are all candidates
of the nodes that the target visited, in the tree or not. Worked example: of 40 proposals to which the drafter gave about .5, 32
were right: the next one counts .80.

A request has too few tokens to find out class by class how far a drafter is to be believed. So a class also counts what its
neighbours saw, the less the further away they are, and begins with the drafter's odds times what the whole kind found: odds and
not chances, or a drafter that is too sure of its doubtful tokens would be disbelieved where it is certain and right. Of 10
proposals at .8, 2 were right, 8 expected: the odds of the kind are (2 + 1) / (8 + 1) * (2 + 1) / (8 + 1) = 1/9 of what the drafter
says, so that one at .9 would begin with .5; it counts .24, for its class is next to that one. One at .9998 counts .95.

Chosen by the log-loss of the next proposals, on `tune` prompts, two drafters (the first layers of the model, and Qwen 0.5B for
1.5B) and two temperatures: 5 to 9 % below that of chances scaled by kind, in all four.

It shapes trees and never judges them: any function of earlier steps may (verification.md 4.4).
"""

from __future__ import annotations

import numpy as np

__all__ = ["BINS", "CERTAIN", "DRAWS", "KINDS", "RATE", "Trust", "bins"]

KINDS = 7  # sorts of proposals that are told apart, see the builders
BINS = 24
_WIDTH = 0.75  # of a bin, in log-odds
NEAR = 0.6  # weight of a class's trials for the next class of its kind; squared for the one after
PRIOR = 1.0  # trials that the starting values count as
PRIOR_KIND = 1.0  # right proposals and wrong ones, as many as the drafter had said, that a kind begins with
DECAY = 0.998  # of a class's counts, at each of its own trials
CERTAIN = 0.98  # siblings exclude each other: their chances sum to at most this
HOLD = 0.6  # start of `hold`
DRAWS = 16  # children of a node that `draws` speaks of
RATE = 0.05
_CENTRES = 1 / (1 + np.exp(-(np.arange(BINS) + 0.5 - BINS / 2) * _WIDTH))
_ODDS = _CENTRES / (1 - _CENTRES)
_NEARNESS = NEAR ** np.abs(np.subtract.outer(np.arange(BINS), np.arange(BINS)))


class Trust:
    """What was learned of one drafter under one class of requests."""

    def __init__(self) -> None:
        self._trials = np.zeros((KINDS, BINS))
        self._hits = np.zeros((KINDS, BINS))
        self._table: np.ndarray | None = None  # of these counts: every node of a tree asks for it
        self.hold = HOLD  # chance that some child of a node is right, given that the node is: a mean over nodes
        self.draws = HOLD / np.arange(1, DRAWS + 1) ** 2  # [DRAWS] the same of the first, second ... child: see SampledTree

    def chances(self, kinds: np.ndarray, logs: np.ndarray) -> np.ndarray:
        """[C] chance of each of the children of one node that is right.

        Args:
            kinds: [C] in 0..KINDS-1.
            logs: [C] logarithms of the drafter's probabilities, <= 0.
        """
        places = bins(logs)
        found = self.table()[kinds, places]
        total = float(found.sum())
        if total > CERTAIN:
            found *= CERTAIN / total
        self.hold += RATE * (min(total, CERTAIN) - self.hold)
        return found

    def table(self) -> np.ndarray:
        """[KINDS, BINS] chance of a proposal of each class, its siblings aside."""
        if self._table is None:
            said, right, trials = (self._trials * _CENTRES).sum(1), self._hits.sum(1), self._trials.sum(1)
            ratio = (right + PRIOR_KIND) / (said + PRIOR_KIND) * (trials - said + PRIOR_KIND) / (trials - right + PRIOR_KIND)
            odds = ratio[:, None] * _ODDS
            self._table = (self._hits @ _NEARNESS + PRIOR * odds / (1 + odds)) / (self._trials @ _NEARNESS + PRIOR)
        return self._table

    def learn(self, kinds: np.ndarray, logs: np.ndarray, right: np.ndarray) -> None:
        """Children [C] of a node that the target visited; `right` [C] bool: it said this one."""
        self._table = None
        for kind, place, hit in zip(kinds.tolist(), bins(logs).tolist(), right.tolist()):
            self._trials[kind, place] = self._trials[kind, place] * DECAY + 1
            self._hits[kind, place] = self._hits[kind, place] * DECAY + hit


def bins(logs: np.ndarray) -> np.ndarray:
    """[C] class of each log-probability, by its log-odds."""
    logs = np.minimum(np.asarray(logs, np.float64), -1e-9)
    odds = logs - np.log(-np.expm1(logs))
    return np.clip(np.floor(odds / _WIDTH + BINS / 2), 0, BINS - 1).astype(np.intp)
