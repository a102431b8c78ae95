"""optimal_transport: k i.i.d. draws, one of them is selected and tested, and no rule accepts more (verification.md 1.2, 2).

Value. alpha = 1 + min over sets H of p(H) - q(H)^k, and the minimiser is a prefix of the tokens sorted by p / q: one sort.

Scheme. Select one draw so that its law is m, accept it with min(1, p / m), else draw from (p - m)+; alpha = sum min(p, m). A law m
can be selected iff m(H) >= q(H)^k for every H. With delta = 1 - alpha, one optimal m is p with its ratio to q clipped::

    m = q clip(p / q, a, b)      sum (a q - p)+ = sum (p - b q)+ = delta

Sort the tokens by p / q and draw M = cumulated m over x = cumulated q: the condition reads M(x) >= x^k, M convex. The left part of
m is the tangent from (0, 0) to P + delta, the right part the one from (1, 1); both touch on their side of the point where
P + delta meets x^k, so M stays above x^k.

Selection. Cut the sorted tokens into intervals; of the draws in the highest interval that has any, take one at random. Its law is
the chord of x^k over each interval. M is a mixture of such cuts: cut at all kinks of M, give this cut the greatest weight that
leaves the rest convex, which straightens one kink of the rest, and go on (at most one cut a kink). For two draws i < j this is
Khisti et al.'s importance-weighted selection (arXiv 2410.18234): j is taken with P(cut between) + P(no cut) / 2.

The law of the selected draw is computed from the cuts in use, never assumed, so the rule is lossless for any cuts; it is optimal
where p / q has at most `MAX_CLASSES` values from a to b. Beyond, ratios are grouped, which costs at most
(b - a) / (4 MAX_CLASSES) of alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specdec.draft_tree import DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.verify.step import TINY, Step, walk

__all__ = ["MAX_CLASSES", "Selection", "optimal_transport", "optimal_value", "select_optimally"]

MAX_CLASSES = 128


def optimal_transport(tree: DraftTree, law: Law, randomness: Randomness) -> Verdict:
    """The accepted path and the first token that the tree did not foresee; i.i.d. children, deterministic ones besides.

    k is the number of draws at the node, equal ones counted. O(V log V) a visited node.

    Raises:
        ValueError: see legality.check.
    """
    return walk(Step("optimal_transport", tree, law, randomness), _select)


def optimal_value(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """The most that any lossless rule accepts of k i.i.d. draws from q [V], where the target is p [V]: O(V log V)."""
    return 1.0 - _Curve(p, q, k).delta


@dataclass(frozen=True)
class Selection:
    """How one of k i.i.d. draws is selected: classes of tokens, and cuts between classes with their probabilities."""

    classes: np.ndarray  # [V] int32, -1 where q = 0; ascending p / q
    cuts: np.ndarray  # [K, C - 1] bool: cut between class c and c + 1
    weights: np.ndarray  # [K]
    law: np.ndarray  # [V] float64: m, of the selected draw


def select_optimally(p: np.ndarray, q: np.ndarray, k: int) -> Selection:
    """The selection that accepts most; p, q [V] float64, each of sum 1."""
    curve = _Curve(p, q, k)
    ratio = np.clip(curve.ratio, *curve.bounds())
    starts = _with_mass(_class_starts(ratio), curve.sum_q)
    mass = np.add.reduceat(curve.q, starts)
    slopes = np.add.reduceat(curve.q * ratio, starts) / mass
    cuts, weights, slopes = _mix(np.cumsum(mass), slopes, k)
    rank = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(ratio)))
    classes = np.full(len(p), -1, np.int32)
    classes[curve.tokens] = rank
    law = np.zeros(len(p))
    law[curve.tokens] = curve.q * slopes[rank]
    return Selection(classes, cuts, weights, law)


class _Curve:
    """Tokens that q can draw, sorted by p / q, and the cumulated laws over them."""

    def __init__(self, p: np.ndarray, q: np.ndarray, k: int) -> None:
        tokens = np.flatnonzero(q > 0)
        ratio = p[tokens] / q[tokens]
        order = np.argsort(ratio)
        self.tokens, self.ratio = tokens[order], ratio[order]
        self.q = q[self.tokens]
        self.sum_p = np.cumsum(p[self.tokens])  # [n], of the first 1, 2, ... tokens
        self.sum_q = np.minimum(np.cumsum(self.q), 1.0)
        self.sum_q[-1] = 1.0
        self.delta = min(1.0, max(0.0, float((self.sum_q**k - self.sum_p).max())))

    def bounds(self) -> tuple[float, float]:
        """a and b: slopes of the tangents to P + delta from (0, 0) and from (1, 1)."""
        low = ((self.sum_p + self.delta) / self.sum_q).min()
        left = np.cumsum(self.q[::-1])[::-1]  # from each token on
        before = np.concatenate([[0.0], self.sum_p[:-1]])
        high = ((1.0 - before - self.delta) / left).max()
        return float(low), max(float(low), float(high))


def _class_starts(ratio: np.ndarray) -> np.ndarray:
    """Where each class begins in the sorted ratios: one a value, or at most MAX_CLASSES of equal width."""
    starts = np.flatnonzero(np.diff(ratio, prepend=-1.0) > 1e-12)
    if len(starts) <= MAX_CLASSES:
        return starts
    edges = np.linspace(ratio[0], ratio[-1], MAX_CLASSES + 1)[1:-1]
    return np.unique(np.concatenate([[0], np.searchsorted(ratio, edges)]))


def _with_mass(starts: np.ndarray, sum_q: np.ndarray) -> np.ndarray:
    """The same without classes that q hardly ever draws, which join their neighbours: a chord over no width has no slope."""
    kept = [0]
    for start in starts[1:].tolist():
        before = float(sum_q[start - 1])
        if before - (float(sum_q[kept[-1] - 1]) if kept[-1] else 0.0) > TINY and 1.0 - before > TINY:
            kept.append(start)
    return np.array(kept)


def _mix(x: np.ndarray, slopes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The convex curve with `slopes` [C] over the classes that end at `x` [C], as a mixture of cuts.

    Returns cuts [K, C - 1], weights [K], and the slopes [C] of the mixture.
    """
    x = np.concatenate([[0.0], x])
    x[-1] = 1.0
    kinks = np.diff(slopes)
    cuts, weights, mixed, left = [], [], np.zeros_like(slopes), 1.0
    while left > TINY:
        cut = kinks > TINY
        ends = np.flatnonzero(np.concatenate([[True], cut, [True]]))
        chord = np.diff(x[ends] ** k) / np.diff(x[ends])
        bends = np.diff(chord)  # at the kinks
        share = min(left, float((kinks[cut] / np.maximum(bends, TINY)).min())) if len(bends) else left
        kinks[cut] -= share * bends
        if len(bends):
            kinks[np.flatnonzero(cut)[np.argmin(kinks[cut])]] = 0.0
        cuts.append(cut)
        weights.append(share)
        mixed += share * np.repeat(chord, np.diff(ends))
        left -= share
    return np.array(cuts), np.array(weights), mixed / sum(weights)


def _select(step: Step, node: int) -> tuple[int, np.ndarray]:
    p, children = step.target(node), step.sampled(node)
    if len(children) == 0:
        return -1, p
    q, counts = step.draft(node), step.counts(children)
    selection = select_optimally(p, q, int(counts.sum()))
    cut = selection.cuts[step.pick(selection.weights, node, 0, "cut")]
    interval = np.concatenate([[0], np.cumsum(cut)])[selection.classes[step.tree.tokens[children]]]
    child = int(children[step.pick(counts * (interval == interval.max()), node, 0, "select")])
    token = step.tree.tokens[child]
    if step.coin(p[token] / selection.law[token], node):
        return child, p
    rest = np.maximum(p - selection.law, 0.0)
    return -1, rest if rest.sum() > TINY else p
