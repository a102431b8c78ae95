"""What the rules that know q share: laws as float64 arrays, the sampled children of a node, coins with their keys, the walk.

Every random number is keyed (step, node, draw, purpose) in Randomness' coin domain and read once: noise shared with `match`, with
another node or with a later step would bias the text (verification.md 4.5). The step is the position of the root, which no other
step of the stream has. A drafter draws from the same domain with a purpose of its own, `DRAFT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from specdec.draft_tree import ROOT, DraftTree, Kind, Verdict
from specdec.randomness import Randomness
from specdec.sampling import Law
from specdec.verify.legality import check

__all__ = ["DRAFT", "TINY", "Remainder", "Step", "keep_or_rest", "walk"]

DRAFT = "draft"
TINY = 1e-12  # a branch of less probability than this is never taken; its residual would be rounding noise

Select = Callable[["Step", int], tuple[int, np.ndarray]]  # node -> (accepted child or -1, weights [V] of the token otherwise)


class Step:
    """One verification.

    Args:
        rule: name of the rule, checked against the tree.
        tree: see legality.py for what its fields promise.
        law: the target's laws.
        randomness: `coin` and `pick` are read.

    Raises:
        ValueError: the rule is not lossless for this tree.
    """

    def __init__(self, rule: str, tree: DraftTree, law: Law, randomness: Randomness) -> None:
        check(rule, tree)
        self.vocab_size = len(law.scores(ROOT))
        if tree.probs is not None and tree.probs.shape[-1] != self.vocab_size:
            raise ValueError(
                f"probs must have the target's {self.vocab_size} columns, got {tree.probs.shape[-1]}; "
                "pad with 0 what the drafter cannot draw"
            )
        self.tree = tree
        self._law = law
        self._randomness = randomness
        self._step = law.position(ROOT)

    def target(self, node: int) -> np.ndarray:
        """[V] float64: p, the law of the target's next token at `node`; errors as Law.probs."""
        return self._law.probs(node)

    def draft(self, node: int) -> np.ndarray:
        """[V] float64: q, the law from which the first sampled child of `node` was drawn.

        Raises:
            ValueError: `probs` holds no law there; a NaN would be a coin that always accepts.
        """
        assert self.tree.probs is not None
        q = self.tree.probs[node].astype(np.float64)
        total = q.sum()
        if not (q.min() >= 0.0 and total < np.inf):
            raise ValueError(
                f"probs of node {node} must be finite and >= 0, got {q.min()} to {q.max()}; fix: record the law of its draws"
            )
        return q / total

    def sampled(self, node: int) -> np.ndarray:
        """The sampled children of `node` in the order of their (first) draws, [S]."""
        if self.tree.kind is None:
            return np.empty(0, np.intp)
        children = self.tree.children(node)
        children = children[self.tree.kind[children] != Kind.DETERMINISTIC]
        return children if self.tree.draw_index is None else children[np.argsort(self.tree.draw_index[children])]

    def counts(self, children: np.ndarray) -> np.ndarray:
        """How often each of `children` was drawn, [S]."""
        return np.ones(len(children), np.int32) if self.tree.multiplicity is None else self.tree.multiplicity[children]

    def replaced(self, children: np.ndarray) -> bool:
        """The draws of these siblings were i.i.d."""
        assert self.tree.kind is not None
        return len(children) > 0 and self.tree.kind[children[0]] == Kind.IID

    def draws(self, node: int) -> Iterator[int]:
        """The sampled children of `node`, each as often as it was drawn.

        Without replacement the order is that of the draws. Given how often each token came, every order of i.i.d. draws is
        equally likely, so one is drawn: a node that stands for several draws has no place in the order of the others.
        """
        children = self.sampled(node)
        if not self.replaced(children):
            yield from children.tolist()
            return
        left = self.counts(children).astype(np.float64)
        for draw in range(int(left.sum())):
            index = self.pick(left, node, draw, "order")
            left[index] -= 1
            yield int(children[index])

    def coin(self, p: float, node: int, draw: int = 0) -> bool:
        """True with probability min(1, p): accept draw `draw` of `node`."""
        return self._randomness.coin(min(1.0, float(p)), self._step, node, draw, "accept")

    def pick(self, weights: np.ndarray, node: int, draw: int, purpose: str) -> int:
        """An index in proportion to `weights`."""
        return self._randomness.pick(weights, self._step, node, draw, purpose)

    def emit(self, weights: np.ndarray, node: int) -> int:
        """The token after `node`, in proportion to `weights` [V]."""
        return self.pick(weights, node, 0, "emit")

    def proposal(self, child: int) -> np.ndarray:
        """[V] float64: the law that an only child was drawn from; one-hot where it is deterministic."""
        if self.tree.kind is not None and self.tree.kind[child] != Kind.DETERMINISTIC:
            return self.draft(int(self.tree.parents[child]))
        law = np.zeros(self.vocab_size)
        law[self.tree.tokens[child]] = 1.0
        return law

    def is_last(self, node: int) -> bool:
        """Nothing is verified behind `node`: it was not forwarded, or the text ends with it."""
        virtual = self.tree.virtual is not None and bool(self.tree.virtual[node])
        return node != ROOT and (virtual or self._law.ends(int(self.tree.tokens[node])))

    def verdict(self, node: int, weights: np.ndarray | None = None) -> Verdict:
        """`node` is kept, with all above it; `weights` [V] of the next token, None: the target's law."""
        path = np.array(self.tree.path(node), np.int32)
        if self.is_last(node):
            return Verdict(path[:-1], int(self.tree.tokens[node]))
        return Verdict(path, self.emit(self.target(node) if weights is None else weights, node))


class Remainder(NamedTuple):
    """Whether a node is kept although the draft after it was not, and what follows then."""

    keep: float
    rest: np.ndarray  # [V] float64, of sum 1


def keep_or_rest(keep: float, p: np.ndarray, q: np.ndarray) -> Remainder:
    """A node kept with chance `keep`, with law p [V] of the next token, after its draft from q [V] was rejected."""
    rest = np.maximum(keep * p - q, 0.0)
    mass = float(rest.sum())
    if mass == 0.0:
        return Remainder(float(keep >= 1.0), p)
    return Remainder(mass / (mass + (1.0 - keep)), rest / mass)  # exactly 1 where keep is 1


def walk(step: Step, select: Select) -> Verdict:
    """From the root: accept a sampled child, or draw the token from the residual and go on if any child carries it.

    A child's subtree was drawn without looking at the coins of its parent, so moving to whichever child carries the token is
    lossless. Deterministic children live from that: sampled ones first, then they are free (verification.md 4.3).
    """
    nodes = [ROOT]
    while True:
        child, residual = select(step, nodes[-1])
        if child >= 0:
            token = int(step.tree.tokens[child])
        else:
            token = step.emit(residual, nodes[-1])
            child = step.tree.child(nodes[-1], token)
        if child < 0 or step.is_last(child):
            return Verdict(np.array(nodes, np.int32), token)
        nodes.append(child)
