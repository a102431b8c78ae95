"""block: a chain is accepted up to the greatest depth whose own test passes (Sun et al., arXiv 2403.10444; verification.md 5.1).

b_i = min(1, b_{i-1} p_i(x_i) / q_i(x_i)), b_0 = 1: the chance to keep i tokens. With e_i = (b_i p_{i+1} - q_{i+1})+, Z_i = sum e_i::

    depth i < L passes with Z_i / (Z_i + 1 - b_i), and norm(e_i) gives the next token; depth L with b_L, and p_{L+1} does

Depths are tested from the last on, each with its own coin: a failed one says nothing about those above it. No chain is accepted
less far than token by token: with p = (1/3, 2/3), q = (2/3, 1/3) and two tokens it is 11/9 against 10/9.
"""

from __future__ import annotations

from specdec.draft_tree import DraftTree, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.verify.step import Step, keep_or_rest

__all__ = ["block"]


def block(tree: DraftTree, law: Law, randomness: Randomness) -> Verdict:
    """The accepted path and the first token that the chain did not foresee.

    O(V) a node. Asks for the laws of nodes that it may then reject.

    Raises:
        ValueError: the tree is no chain; see legality.check for the rest.
    """
    step = Step("block", tree, law, randomness)
    reaches, keeps, last = [1.0], [], 0  # in a chain a node is its depth
    while last + 1 < len(tree) and reaches[last] > 0 and not step.is_last(last):
        p, token = step.target(last), tree.tokens[last + 1]
        q = step.proposal(last + 1)
        keeps.append(keep_or_rest(reaches[last], p, q).keep)
        reaches.append(min(1.0, reaches[last] * p[token] / q[token]))
        last += 1
    if step.coin(reaches[last], last):
        return step.verdict(last)
    depth = next(depth for depth in range(last - 1, -1, -1) if step.coin(keeps[depth], depth))  # the root's keep is 1
    rest = keep_or_rest(reaches[depth], step.target(depth), step.proposal(depth + 1)).rest  # anew: not kept, V numbers a depth
    return step.verdict(depth, rest)
