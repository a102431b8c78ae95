"""kseq: k i.i.d. draws, each accepted with min(1, p / (rho q)), the first accepted wins (SpecTr, arXiv 2310.15141; verification.md 1.3).

beta = sum min(q, p / rho) is the chance of one draw, alpha = 1 - (1 - beta)^k that of the node. rho in [1, k] is the smallest value
that leaves a residual, rho * beta = alpha; alpha is at least 1 - (1 - 1/k)^k of what any rule could accept. Worked example::

    p = (1/3, 2/3)  q = (2/3, 1/3)  k = 2:  rho = 1.434, beta = 0.566, alpha = 0.811
"""

from __future__ import annotations

import numpy as np

from specdec.draft_tree import DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.verify.step import TINY, Step, walk

__all__ = ["kseq", "smallest_rho"]

_HALVINGS = 50


def kseq(tree: DraftTree, law: Law, randomness: Randomness) -> Verdict:
    """The accepted path and the first token that the tree did not foresee; i.i.d. children, deterministic ones besides.

    k is the number of draws at the node, equal ones counted. O(V) a visited node.

    Raises:
        ValueError: see legality.check.
    """
    return walk(Step("kseq", tree, law, randomness), _select)


def smallest_rho(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """The smallest rho with rho * beta(rho) >= 1 - (1 - beta(rho))^k, from above, by bisection on [1, k].

    min(q, p / rho) is settled for every token whose p / q lies outside of the interval: only the others are summed again.
    """
    low, high = 1.0, float(k)
    settled_q = settled_p = 0.0  # tokens that contribute q, and p / rho
    for _ in range(_HALVINGS if k > 1 else 0):
        sure, never = p >= high * q, p <= low * q
        settled_q += q[sure].sum()
        settled_p += p[never & ~sure].sum()
        open_ = ~(sure | never)
        p, q = p[open_], q[open_]
        rho = (low + high) / 2
        beta = settled_q + settled_p / rho + np.minimum(q, p / rho).sum()
        low, high = (low, rho) if 1 - (1 - beta) ** k <= rho * beta else (rho, high)
    return high


def _select(step: Step, node: int) -> tuple[int, np.ndarray]:
    p, children = step.target(node), step.sampled(node)
    if len(children) == 0:
        return -1, p
    q, k = step.draft(node), int(step.counts(children).sum())
    rho = smallest_rho(p, q, k)
    for draw, child in enumerate(step.draws(node)):
        token = step.tree.tokens[child]
        if step.coin(p[token] / (rho * q[token]), node, draw):
            return child, p
    return -1, _residual(p, q, rho, k)


def _residual(p: np.ndarray, q: np.ndarray, rho: float, k: int) -> np.ndarray:
    """Weights [V] of the token after k rejections, right for every valid rho and not for the smallest alone."""
    each = np.minimum(q, p / rho)
    beta = min(1.0, each.sum())
    if beta == 0.0:
        return p
    rest = np.maximum(p - each * ((1 - (1 - beta) ** k) / beta), 0.0)
    return rest if rest.sum() > TINY else p
