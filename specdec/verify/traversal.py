"""traversal: children before their parent, so that a rejected branch leaves its share to the rest (arXiv 2505.12398; verification.md 5.2).

A node v has a chance a_v to be kept, 1 for the root. Each child with token x gets min(1, a_v P(x) / Q(x)) and is visited; where it is
rejected, with e = (a_v P - Q)+ and Z = sum e (both of the values before)::

    a_v <- Z / (Z + 1 - a_v)    P <- norm(e)    Q <- norm(Q without x)

After its children v is kept with chance a_v, and the next token is drawn from P. On a chain this is block verification. Q of a
deterministic child is one-hot; they come last, since a token of theirs that a sampled sibling leaves over costs nothing.

I.i.d. draws are taken without repetition: the next new token of i.i.d. draws has the law of a draw without replacement, whatever
was repeated in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from specdec.draft_tree import ROOT, DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.verify.step import Step, keep_or_rest

__all__ = ["traversal"]


def traversal(tree: DraftTree, law: Law, randomness: Randomness) -> Verdict:
    """The accepted path and the first token that the tree did not foresee.

    O(V) a node in the worst case; asks for the laws of nodes that it may then reject.

    Raises:
        ValueError: see legality.check.
    """
    verdict = _visit(Step("traversal", tree, law, randomness), ROOT, 1.0)
    assert verdict is not None, "the root is always kept"
    return verdict


def _visit(step: Step, node: int, keep: float) -> Verdict | None:
    """What is accepted at or below `node`, None: nothing."""
    if keep <= 0.0 or step.is_last(node):
        return step.verdict(node) if step.coin(keep, node) else None
    p = step.target(node)
    for child, q in _proposals(step, node):
        token = step.tree.tokens[child]
        verdict = _visit(step, child, min(1.0, keep * p[token] / q[token]))
        if verdict is not None:
            return verdict
        keep, p = keep_or_rest(keep, p, q)
    return step.verdict(node, p) if step.coin(keep, node) else None


def _proposals(step: Step, node: int) -> Iterator[tuple[int, np.ndarray]]:
    """The children of `node`, sampled ones first, each with the law [V] of its token given those before; valid until the next."""
    sampled = step.sampled(node).tolist()
    if sampled:
        q = step.draft(node)
        for child in sampled:
            q /= q.sum()
            yield child, q
            q[step.tree.tokens[child]] = 0.0
    for child in step.tree.children(node).tolist():
        if child not in sampled:
            yield child, step.proposal(child)
