"""recursive_rejection: try the sampled children one by one against what is left of the target's law (verification.md 3.1).

With r = p at first: accept x_i ~ q_i with probability min(1, r(x_i) / q_i(x_i)), else r <- norm((r - q_i)+). q_i is the true law of
the i-th draw given the earlier ones: q itself for i.i.d. draws, q without the earlier siblings for draws without replacement.
Sources: SpecInfer (arXiv 2305.09781), recursive SD (2402.14160), Sequoia (2402.12374). Worked example::

    p = (1/3, 2/3)  q = (2/3, 1/3)  draws 0, 1 without replacement
    0: accepted with 1/2, else r = (0, 1)   1: q_2 = (0, 1), accepted with 1
"""

from __future__ import annotations

import numpy as np

from specdec.draft_tree import DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.verify.step import TINY, Step, walk

__all__ = ["recursive_rejection"]


def recursive_rejection(tree: DraftTree, law: Law, randomness: Randomness) -> Verdict:
    """The accepted path and the first token that the tree did not foresee; any mix of deterministic and sampled children.

    O(V) a tried child.

    Raises:
        ValueError: see legality.check.
    """
    return walk(Step("recursive_rejection", tree, law, randomness), _select)


def _select(step: Step, node: int) -> tuple[int, np.ndarray]:
    left = step.target(node)
    children = step.sampled(node)
    if len(children) == 0:
        return -1, left
    q, replaced = step.draft(node), step.replaced(children)
    for draw, child in enumerate(step.draws(node)):
        token = step.tree.tokens[child]
        if step.coin(left[token] / q[token], node, draw):
            return child, left
        rest = np.maximum(left - q, 0.0)
        mass = rest.sum()
        if mass > TINY:
            left = rest / mass
        if not replaced:
            q[token] = 0.0
            q /= q.sum() or 1.0  # nothing left: there is no further draw
    return -1, left
