"""From evidence to probabilities: one counter a bucket, and a softmax over the candidates of a node; both learned online.

Each source's bucket has decayed counts of trials and successes; their ratio, as log-odds x, is that source's opinion of a
candidate. A candidate scores z = w . x + w0, and its probability is exp(z) / (1 + sum of exp(z) over its siblings): siblings are
exclusive, and the 1 stands for "none of them", so they never sum above 1. The weights w follow the gradient of the
log-likelihood. Trials are all candidates of all visited nodes, drafted or cut by the budget; what lies below an unvisited node is
censored and teaches nothing (drafting.md 5.4). Worked example: one candidate, two sources that say 0.5 and 0.8, weights 1 and
0.5, w0 = 0: z = 0 + 0.5 * 1.39 = 0.69, probability 2 / 3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specdec._jit import njit
from specdec.trees.evidence import BUCKETS, CONTEXTS, SOURCES, Evidence, context_bucket, table_bucket

__all__ = ["Calibration", "initial", "learn", "score"]

DECAY = 0.998  # of a bucket's counts, at each of its own trials
PRIOR = 16.0  # trials that the starting values count as
RATE = 0.005  # step of the weights
CENTRE = 3.0  # minus the log-odds of 1 in 20
LEAST = 0.003  # opinions are clipped to LEAST .. 1 - LEAST
WEIGHTS = (0.3, 0.45, 0.0, 0.4, 0.5, 0.25, 0.2, -1.4)  # start; the last is w0


class Calibration(NamedTuple):
    """What was learned under one acceptance rule and temperature class."""

    success: np.ndarray  # [SOURCES, BUCKETS] float64, decayed
    trials: np.ndarray  # [SOURCES, BUCKETS] float64, decayed
    opinions: np.ndarray  # [SOURCES, BUCKETS] float64, log-odds of success / trials, relative to those of 1 in 20
    weights: np.ndarray  # [SOURCES + 1] float64


def initial() -> Calibration:
    """Starting values: rough shapes that held for SmolLM2 on mixed prompts; a few hundred tokens replace them."""
    odds = np.full((SOURCES, BUCKETS), 0.05)
    for source in range(SOURCES):
        fill = _context_prior if source < CONTEXTS else _table_prior
        fill(odds[source], source)
    trials = np.full((SOURCES, BUCKETS), PRIOR)
    clipped = np.clip(odds, LEAST, 1 - LEAST)
    return Calibration(odds * trials, trials, np.log(clipped / (1 - clipped)) + CENTRE, np.array(WEIGHTS))


def _context_prior(values: np.ndarray, source: int) -> None:
    for longest in (1, 2, 3, 4, 6, 9, 15, 16):
        values[context_bucket(longest, 0, 0.0, 0)] = 0.02
        values[context_bucket(longest, 0, 0.1, 1)] = 0.02
        values[context_bucket(longest, 0, 0.3, 1)] = 0.05
        trust = 0.4 + 0.1 * min(7, np.log2(longest) * 2)
        for level, share in enumerate((0.2, 0.5, 0.8, 1.0)):
            for more, count in enumerate((1, 2, 4)):
                values[context_bucket(longest, longest, share, count)] = min(0.97, (0.15 + 0.25 * level) * trust + 0.05 * more)


def _table_prior(values: np.ndarray, source: int) -> None:
    trust = (0.9, 0.8, 0.6, 0.1, 0.1)[source - CONTEXTS]
    values[table_bucket(True, -1, 0.0)] = 0.02
    for rank in range(8):
        for level in range(10):
            prob = (level + 0.5) / 10 if rank == 0 else 2.0 ** ((level - 9.5) / 1.5)
            values[table_bucket(True, rank, prob)] = prob * trust


@njit
def _opinion(success: float, trials: float) -> float:
    """Log-odds relative to those of 1 in 20, so that an opinion that says nothing is near 0."""
    prob = min(max(success / trials, LEAST), 1.0 - LEAST)
    return np.log(prob / (1.0 - prob)) + CENTRE


@njit
def score(evidence: Evidence, node: int, calibration: Calibration) -> None:
    """Write the probabilities of a node's candidates, and their order."""
    total = 1.0
    count = evidence.counts[node]
    weights, opinions = calibration.weights, calibration.opinions
    buckets, probs = evidence.buckets[node], evidence.probs[node]
    for place in range(count):
        z = weights[SOURCES]
        for source in range(SOURCES):
            z += weights[source] * opinions[source, buckets[place, source]]
        probs[place] = np.exp(min(z, 20.0))
        total += probs[place]
    for place in range(count):
        probs[place] /= total
    _sort(probs, evidence.order[node], count)


@njit
def _sort(probs: np.ndarray, order: np.ndarray, count: int) -> None:
    """Stable insertion sort by descending probability: ties keep the order of the sources."""
    for right in range(count):
        prob = probs[right]
        place = right
        while place > 0 and probs[order[place - 1]] < prob:
            order[place] = order[place - 1]
            place -= 1
        order[place] = right


@njit
def learn(evidence: Evidence, node: int, token: int, calibration: Calibration) -> None:
    """One visited node: `token` is what followed it in the end."""
    weights, opinions = calibration.weights, calibration.opinions
    success, trials = calibration.success, calibration.trials
    count = evidence.counts[node]
    step = evidence.step
    step[:] = 0.0
    for place in range(count):
        error = (1.0 if evidence.tokens[node, place] == token else 0.0) - evidence.probs[node, place]
        step[SOURCES] += error
        for source in range(SOURCES):
            step[source] += error * opinions[source, evidence.buckets[node, place, source]]
    for source in range(SOURCES + 1):
        weights[source] += RATE * min(max(step[source], -10.0), 10.0)
    for place in range(count):
        hit = 1.0 if evidence.tokens[node, place] == token else 0.0
        for source in range(SOURCES):
            bucket = evidence.buckets[node, place, source]
            success[source, bucket] = success[source, bucket] * DECAY + hit
            trials[source, bucket] = trials[source, bucket] * DECAY + 1.0
            opinions[source, bucket] = _opinion(success[source, bucket], trials[source, bucket])
